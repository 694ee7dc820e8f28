// A loss mask over an image: what is painted red is not learned. Mouse, pen and touch; with keys the arrows move the brush
// (Shift: farther), Space or Enter paints. The mask goes to the kernel as a PNG, white where the image counts.
const STEP = 8, FAR = 40;

function render({ model, el }) {
  const part = (tag, name) => { const e = document.createElement(tag); if (name) e.className = name; return e; };
  const root = part("div", "edk-brush"), bar = part("div", "edk-brush-bar"), stage = part("div", "edk-brush-stage");
  const image = part("img"), canvas = part("canvas");
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "application");
  canvas.setAttribute("aria-label", "Mask. Arrow keys move the brush, Space paints.");
  stage.append(image, canvas);
  const button = (text, label, act) => {
    const b = part("button"); b.type = "button"; b.textContent = text; b.title = label;
    b.addEventListener("click", act); bar.append(b); return b;
  };
  let out = true, size = 40, at = null, dirty = false;
  const draw = canvas.getContext("2d");
  const mode = button("Brush: exclude", "Switch between excluding and including again", () => {
    out = !out; mode.textContent = out ? "Brush: exclude" : "Brush: include"; mode.setAttribute("aria-pressed", String(!out));
  });
  const label = part("label"), slider = part("input");
  label.textContent = "Size "; slider.type = "range"; slider.min = 6; slider.max = 200; slider.value = size;
  slider.addEventListener("input", () => { size = Number(slider.value); });
  label.append(slider); bar.append(label);
  button("Exclude all", "Paint the whole image", () => { draw.globalCompositeOperation = "source-over"; draw.fillStyle = "#e5484d"; draw.fillRect(0, 0, canvas.width, canvas.height); dirty = true; });
  button("Clear", "Take the whole image back in", () => { draw.clearRect(0, 0, canvas.width, canvas.height); dirty = true; });
  button("Save mask", "Write the mask next to the image", save);
  root.append(bar, stage); el.append(root);

  function paint(x, y) {
    draw.globalCompositeOperation = out ? "source-over" : "destination-out";
    draw.fillStyle = draw.strokeStyle = "#e5484d";
    draw.lineWidth = size; draw.lineCap = "round";
    draw.beginPath();
    if (at) { draw.moveTo(at[0], at[1]); draw.lineTo(x, y); draw.stroke(); } else { draw.arc(x, y, size / 2, 0, 7); draw.fill(); }
    at = [x, y]; dirty = true;
  }
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height];
  };
  canvas.addEventListener("pointerdown", (e) => { canvas.setPointerCapture(e.pointerId); at = null; paint(...place(e)); });
  canvas.addEventListener("pointermove", (e) => { if (e.buttons) paint(...place(e)); });
  canvas.addEventListener("pointerup", () => { at = null; });
  let cursor = [0, 0];
  canvas.addEventListener("keydown", (e) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[e.key];
    if (move) {
      const far = e.shiftKey ? FAR : STEP;
      cursor = [Math.min(canvas.width, Math.max(0, cursor[0] + move[0] * far)), Math.min(canvas.height, Math.max(0, cursor[1] + move[1] * far))];
      ring.style.left = `${100 * cursor[0] / canvas.width}%`; ring.style.top = `${100 * cursor[1] / canvas.height}%`;
      ring.hidden = false;
    } else if (e.key === " " || e.key === "Enter") { at = null; paint(...cursor); at = null; } else return;
    e.preventDefault(); e.stopPropagation();
  });
  const ring = part("span", "edk-brush-ring"); ring.hidden = true; stage.append(ring);

  function load() {
    dirty = false;
    const bytes = model.get("image");
    root.style.display = bytes && bytes.byteLength ? "" : "none";
    if (!bytes || !bytes.byteLength) return;
    image.onload = () => {
      canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
      cursor = [canvas.width / 2, canvas.height / 2];
      const mask = model.get("mask");
      if (!mask || !mask.byteLength) return;
      const held = new Image();
      held.onload = () => {
        draw.globalCompositeOperation = "source-over";
        draw.drawImage(held, 0, 0, canvas.width, canvas.height);
        const pixels = draw.getImageData(0, 0, canvas.width, canvas.height);
        for (let i = 0; i < pixels.data.length; i += 4) {
          const dark = 255 - pixels.data[i];
          pixels.data.set([229, 72, 77, dark], i);
        }
        draw.putImageData(pixels, 0, 0);
      };
      held.src = URL.createObjectURL(new Blob([mask], { type: "image/png" }));
    };
    image.alt = model.get("name");
    image.src = URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" }));
  }

  async function save() {
    const copy = document.createElement("canvas");
    copy.width = canvas.width; copy.height = canvas.height;
    const pen = copy.getContext("2d"), pixels = draw.getImageData(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < pixels.data.length; i += 4) {
      const light = 255 - pixels.data[i + 3];
      pixels.data.set([light, light, light, 255], i);
    }
    pen.putImageData(pixels, 0, 0);
    const blob = await new Promise((done) => copy.toBlob(done, "image/png"));
    model.send({ kind: "mask", name: model.get("name") }, undefined, [await blob.arrayBuffer()]);
    dirty = false;
  }
  model.on("change:version", load);
  load();
  return () => model.off("change:version", load);
}
export default { render };
