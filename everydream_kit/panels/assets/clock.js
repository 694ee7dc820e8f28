function render({ model, el }) {
  el.style.display = "none";
  const beat = () => {
    if (!model.get("on")) return;
    model.set("beats", model.get("beats") + 1);
    model.save_changes();
  };
  const timer = setInterval(beat, model.get("interval"));
  return () => clearInterval(timer);
}
export default { render };
