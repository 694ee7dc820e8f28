// Beats while the panel is on the page, and gives screen readers what widgets omit: names of slider handles and of
// their number fields, which page is shown, which fold is open; and takes icons out of the names of buttons.
function describe(panel) {
  for (const widget of panel.querySelectorAll(".widget-slider, .jupyter-widget-slider")) {
    const label = widget.querySelector("label, .widget-label");
    for (const part of widget.querySelectorAll(".noUi-handle, .ui-slider-handle, .widget-readout"))
      if (label && !part.hasAttribute("aria-label")) part.setAttribute("aria-label", label.textContent);
  }
  for (const icon of panel.querySelectorAll(".jupyter-button i:not([aria-hidden])")) icon.setAttribute("aria-hidden", "true");
  for (const image of panel.querySelectorAll('.edk-card img[class*="edk-image-"]')) {  // opened large by `viewer.js`
    const label = image.closest(".edk-card").querySelector(".edk-name");
    const name = label ? label.textContent.trim() : "";
    if (image.alt !== name) { image.alt = image.title = name; image.tabIndex = 0; image.setAttribute("role", "button"); }
  }
  const state = (selector, name, test) => {
    for (const button of panel.querySelectorAll(selector)) {
      const now = String(test(button));
      if (button.getAttribute(name) !== now) button.setAttribute(name, now);
    }
  };
  state(".edk-tab", "aria-pressed", (button) => button.classList.contains("edk-current"));
  state(".edk-fold", "aria-expanded", (button) => button.querySelector(".fa-caret-down") !== null);
}
// Nobody sees what changes in a panel out of view, and each beat costs the page, the server and the kernel work that a training
// on the same machine lacks: there only every fourth beat counts.
const BEATS_OUT_OF_VIEW = 4;
// Brings its panel into view when the kernel asks (`reveal`): Run All leaves the page at the last cell. A page that somebody
// has touched since is left alone.
const TOUCHES = ["pointerdown", "wheel", "keydown", "touchstart"], HELD_MS = 15000;
function render({ model, el }) {
  el.style.display = "none";
  let isTouched = false, heldUntil = 0;
  const touch = () => { isTouched = true; };
  for (const name of TOUCHES) window.addEventListener(name, touch, { capture: true, passive: true });
  const hold = () => {  // panels above may still grow, so for a while it is brought back
    const panel = el.closest(".edk");
    if (isTouched || !panel || Date.now() > heldUntil) return;
    const place = panel.getBoundingClientRect();
    if (place.top < 0 || place.top > innerHeight / 4) panel.scrollIntoView({ block: "start" });
  };
  const reveal = () => { if (model.get("reveal")) { heldUntil = Date.now() + HELD_MS; hold(); } };
  model.on("change:reveal", reveal);
  reveal();
  let missed = 0;
  const beat = () => {
    const panel = el.closest(".edk");
    hold();
    const place = panel && panel.getBoundingClientRect();
    const isInView = place && !document.hidden && place.bottom > 0 && place.top < innerHeight;
    missed = isInView ? 0 : (missed + 1) % BEATS_OUT_OF_VIEW;
    if (missed) return;
    if (panel) describe(panel);
    if (!model.get("on")) return;
    model.set("beats", model.get("beats") + 1);
    model.save_changes();
  };
  const timer = setInterval(beat, model.get("interval"));
  return () => {
    clearInterval(timer);
    model.off("change:reveal", reveal);
    for (const name of TOUCHES) window.removeEventListener(name, touch, { capture: true });
  };
}
export default { render };
