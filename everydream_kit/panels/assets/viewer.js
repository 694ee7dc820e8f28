// Opens a thumbnail of this panel large: click or Enter; arrow keys go to the neighbors of its gallery; Escape closes.
// Thumbnails: <img data-edk-image="KEY">, or a widget's <img> with the class edk-image-KEY.
const GALLERIES = ".edk-shots, .edk-wide, .edk-cards, .edk-few, .edk-table", PATIENCE_MS = 30000;
let made = 0;
const keyOf = (img) => img.dataset.edkImage || ([...img.classList].find((c) => c.startsWith("edk-image-")) || "").slice(10);
const part = (tag, name, text) => { const e = document.createElement(tag); e.className = name; e.textContent = text || ""; return e; };

function render({ model, el }) {
  el.style.display = "none";
  const page = Math.random().toString(36).slice(2), waiting = new Map();
  const panelOf = () => el.closest(".edk");
  const onMessage = (m, buffers) => {
    const take = m.to === "viewer" && waiting.get(m.number);
    if (take) { waiting.delete(m.number); take(m, buffers); }
  };
  model.on("msg:custom", onMessage);
  const ask = (kind, key) => new Promise((resolve, reject) => {
    const number = `${page}-${++made}`;
    const timer = setTimeout(() => { waiting.delete(number); reject(new Error("No answer from the kernel.")); }, PATIENCE_MS);
    waiting.set(number, (m, buffers) => {
      clearTimeout(timer);
      if (m.error) reject(new Error(m.error)); else resolve({ name: m.name, url: URL.createObjectURL(new Blob([buffers[0]], { type: m.type })) });
    });
    model.send({ kind, key, number });
  });

  const dialog = part("dialog", "edk-viewer"), image = document.createElement("img"), words = part("figcaption", "");
  const button = (text, label, act) => {
    const b = part("button", "", text);
    b.type = "button"; b.setAttribute("aria-label", label); b.title = label; b.addEventListener("click", act);
    return b;
  };
  let group = [], at = 0, shown = "";
  const show = async (index) => {
    at = (index + group.length) % group.length;
    const now = at, thumb = group[at];
    image.src = thumb.src; image.alt = thumb.alt;
    words.textContent = `${thumb.alt}${group.length > 1 ? ` · ${at + 1} of ${group.length}` : ""}`;
    try {
      const found = await ask("image", keyOf(thumb));
      if (at !== now || !dialog.open) { URL.revokeObjectURL(found.url); return; }
      if (shown) URL.revokeObjectURL(shown);
      image.src = shown = found.url;
    } catch (error) { if (at === now) words.textContent = error.message; }
  };
  const download = async () => {
    try {
      const found = await ask("file", keyOf(group[at])), link = document.createElement("a");
      link.href = found.url; link.download = found.name; link.click();
      setTimeout(() => URL.revokeObjectURL(found.url), 60000);
    } catch (error) { words.textContent = error.message; }
  };
  const back = button("‹", "Previous image (left arrow)", () => show(at - 1)), next = button("›", "Next image (right arrow)", () => show(at + 1));
  const row = part("div", "edk-viewer-row");
  row.append(back, next, words, button("⤓ Download", "Download the file", download), button("✕", "Close (Escape)", () => dialog.close()));
  const figure = part("figure", "");
  figure.append(image, row); dialog.append(figure); dialog.setAttribute("aria-label", "Image");
  dialog.addEventListener("click", (e) => { if (e.target === dialog) dialog.close(); });
  dialog.addEventListener("keydown", (e) => {
    e.stopPropagation();  // the notebook has keys of its own
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[e.key];
    if (step) { e.preventDefault(); show(at + step); }
  });
  let opener = null;
  dialog.addEventListener("close", () => { dialog.remove(); if (opener && opener.isConnected) opener.focus(); });

  const open = (img) => {
    const gallery = img.closest(GALLERIES) || panelOf();
    group = [...gallery.querySelectorAll("img")].filter((i) => keyOf(i) && i.offsetParent !== null);
    opener = img;
    panelOf().append(dialog);  // inside the panel, for its colors
    dialog.showModal();
    back.hidden = next.hidden = group.length < 2;
    image.tabIndex = -1; image.focus();
    show(group.indexOf(img));
  };
  const target = (e) => {
    const img = e.target instanceof HTMLImageElement ? e.target : null, panel = panelOf();
    return img && panel && panel.contains(img) && !dialog.contains(img) && keyOf(img) ? img : null;
  };
  const onClick = (e) => { const img = target(e); if (img) { e.preventDefault(); open(img); } };
  const onKey = (e) => { const img = (e.key === "Enter" || e.key === " ") && target(e); if (img) { e.preventDefault(); e.stopPropagation(); open(img); } };
  document.addEventListener("click", onClick);
  document.addEventListener("keydown", onKey, true);
  return () => {
    model.off("msg:custom", onMessage);
    document.removeEventListener("click", onClick); document.removeEventListener("keydown", onKey, true);
    dialog.remove();
  };
}
export default { render };
