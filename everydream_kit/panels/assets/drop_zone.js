function render({ model, el }) {
  const area = document.createElement("label");
  area.className = "edk-drop";
  area.tabIndex = 0;
  area.setAttribute("role", "button");
  area.innerHTML = "<b>Drop pictures, captions or a .zip here</b><span>or click to choose · folders can be dropped too</span>";
  const input = document.createElement("input");
  input.type = "file"; input.multiple = true; input.style.display = "none";
  const bar = document.createElement("div"); bar.className = "edk-drop-bar";
  const words = document.createElement("div"); words.className = "edk-hint"; words.setAttribute("role", "status");
  area.append(input); el.append(area, bar, words);

  const queue = []; let busy = false; let done = 0, total = 0, sent = 0, failed = 0;
  let answer = null;
  const onMessage = (m) => { if (m.to === "drop" && answer) { const a = answer; answer = null; a(m); } };
  model.on("msg:custom", onMessage);
  const ask = (content, buffers) => new Promise((resolve, reject) => {
    const timer = setTimeout(() => { answer = null; reject(new Error("no answer from the kernel")); }, 60000);
    answer = (m) => { clearTimeout(timer); resolve(m); };
    model.send(content, undefined, buffers);
  });
  const size = model.get("piece");
  const show = (text) => {
    words.textContent = text;
    bar.style.width = total ? (100 * sent / total) + "%" : "0";
  };
  async function sendOne(entry) {
    const { file, name } = entry;
    let m = await ask({ kind: "begin", name, size: file.size });
    if (m.error) { sent += file.size; throw new Error(m.error); }
    for (let at = 0; at < file.size; at += size) {
      const piece = await file.slice(at, at + size).arrayBuffer();
      for (let attempt = 0; ; attempt++) {
        try { m = await ask({ kind: "piece", name, at }, [piece]); break; }
        catch (error) { if (attempt >= 3) throw error; }
      }
      if (m.error) throw new Error(m.error);
      sent += piece.byteLength;
      show(`${name}: ${Math.round(100 * sent / total)} %`);
    }
    m = await ask({ kind: "end", name });
    if (m.error) throw new Error(m.error);
  }
  async function work() {
    if (busy) return;
    busy = true;
    const errors = [];
    while (queue.length) {
      const entry = queue.shift();
      try { await sendOne(entry); done++; }
      catch (error) { failed++; errors.push(`${entry.name}: ${error.message}`); }
    }
    busy = false;
    show(`${done} file${done === 1 ? "" : "s"} received` + (failed ? `, ${failed} refused. ${errors.slice(0, 5).join(" · ")}` : "."));
    model.send({ kind: "all", done, failed });
    done = total = sent = failed = 0;
  }
  const add = (file, name) => { queue.push({ file, name: name || file.name }); total += file.size; };
  async function walk(entry, base) {
    if (entry.isFile) { add(await new Promise((ok, no) => entry.file(ok, no)), base + entry.name); return; }
    const reader = entry.createReader();
    for (;;) {
      const some = await new Promise((ok, no) => reader.readEntries(ok, no));
      if (!some.length) return;
      for (const child of some) await walk(child, base + entry.name + "/");
    }
  }
  input.addEventListener("change", () => { for (const f of input.files) add(f); input.value = ""; work(); });
  area.addEventListener("keydown", (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); input.click(); } });
  for (const name of ["dragenter", "dragover"]) area.addEventListener(name, (e) => { e.preventDefault(); e.stopPropagation(); area.classList.add("over"); });
  for (const name of ["dragleave", "drop"]) area.addEventListener(name, () => area.classList.remove("over"));
  area.addEventListener("drop", async (e) => {
    e.preventDefault(); e.stopPropagation();
    const entries = [...e.dataTransfer.items].map((i) => i.webkitGetAsEntry && i.webkitGetAsEntry()).filter(Boolean);
    const files = [...e.dataTransfer.files];
    if (entries.length) { for (const entry of entries) await walk(entry, ""); } else files.forEach((f) => add(f));
    work();
  });
  return () => model.off("msg:custom", onMessage);
}
export default { render };
