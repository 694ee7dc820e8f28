// Sends what is dropped or chosen to the kernel (`upload.py`): small files in bundles, large ones in pieces, several
// messages under way at once. Asks once where names are taken. A message without an answer is sent again by its number.
const MESSAGES_UNDER_WAY = 4, FILES_OF_A_BUNDLE = 64, TRIES = 4, PATIENCE_MS = 60000;
const MEGABYTE = 1e6, SHOW_EVERY_MS = 200, SHOWN_ERRORS = 5;

class Wire {
  constructor(model) {
    this.model = model; this.waiting = new Map(); this.sent = 0; this.free = MESSAGES_UNDER_WAY; this.queue = [];
    this.page = Math.random().toString(36).slice(2);  // numbers of another page, or of this one before a reload, are others
    this.onMessage = (m) => { const a = m.to === "drop" && this.waiting.get(m.number); if (a) a(m); };
    model.on("msg:custom", this.onMessage);
  }
  close() { this.model.off("msg:custom", this.onMessage); }
  once(content, buffers) {
    return new Promise((resolve, reject) => {
      const end = (act) => (value) => { clearTimeout(timer); this.waiting.delete(content.number); act(value); };
      const timer = setTimeout(() => end(reject)(new Error("no answer from the kernel")), PATIENCE_MS);
      this.waiting.set(content.number, end(resolve));
      this.model.send(content, undefined, buffers);
    });
  }
  async ask(content, makeBuffers) {
    if (this.free > 0) this.free--; else await new Promise((go) => this.queue.push(go));
    try {
      const numbered = { ...content, number: `${this.page}-${++this.sent}` };
      const buffers = makeBuffers ? await makeBuffers() : undefined;
      for (let left = TRIES; ; left--) {
        try { const m = await this.once(numbered, buffers); if (m.error) throw new Refused(m.error); return m; }
        catch (error) { if (error instanceof Refused || left <= 1) throw error; }
      }
    } finally { const next = this.queue.shift(); if (next) next(); else this.free++; }
  }
}
class Refused extends Error {}

const element = (tag, name, text) => { const e = document.createElement(tag); e.className = name; e.textContent = text || ""; return e; };
const files = (n) => `${n.toLocaleString("en")} file${n === 1 ? "" : "s"}`;

function render({ model, el }) {
  const area = element("label", "edk-drop");
  area.tabIndex = 0;
  area.setAttribute("role", "button");
  area.append(element("b", "", "Drop images, captions or a .zip here"), element("span", "", "or click to choose · folders can be dropped too"));
  const input = document.createElement("input");
  input.type = "file"; input.multiple = true; input.style.display = "none";
  const bar = element("div", "edk-drop-bar"), words = element("div", "edk-hint"), question = element("div", "edk-drop-question");
  words.setAttribute("role", "status");
  area.append(input); el.append(area, question, bar, words);
  const wire = new Wire(model), piece = model.get("piece");
  let chain = Promise.resolve();

  function decide(existing, total) {
    return new Promise((resolve) => {
      const text = existing.length === 1 ? `${existing[0]} already exists.` : `${existing.length.toLocaleString("en")} of ${files(total)} already exist.`;
      const buttons = [["Replace", "replace", "What was there moves out of the dataset; Undo brings it back"],
        ["Keep both", "keep", "New names, the same for an image and its caption"], ["Skip", "skip", "Upload the others only"]];
      question.replaceChildren(element("span", "", text), ...buttons.map(([label, choice, hint]) => {
        const button = element("button", "jupyter-button widget-button", label);
        button.type = "button"; button.title = hint;
        button.addEventListener("click", () => { question.replaceChildren(); area.focus(); resolve(choice); });
        return button;
      }));
      question.querySelector("button").focus();
    });
  }

  async function send(entries) {
    const state = { done: 0, bytes: 0, refused: [], total: entries.length, all: entries.reduce((sum, e) => sum + e.file.size, 0), shown: 0 };
    const show = () => {
      if (Date.now() - state.shown < SHOW_EVERY_MS) return;
      state.shown = Date.now();
      words.textContent = `${state.done.toLocaleString("en")} of ${files(state.total)} · ${(state.bytes / MEGABYTE).toFixed(0)} of ${(state.all / MEGABYTE).toFixed(0)} MB`;
      bar.style.width = (state.all ? 100 * state.bytes / state.all : 0) + "%";
    };
    const settle = (entry, error) => { if (error) state.refused.push(`${entry.name}: ${error}`); else state.done++; };

    async function sendBundle(bundle) {
      const content = { kind: "bundle", files: bundle.map((e) => ({ name: e.name, size: e.file.size, replace: e.replace })) };
      try {
        const m = await wire.ask(content, async () => [await new Blob(bundle.map((e) => e.file)).arrayBuffer()]);
        for (const entry of bundle) settle(entry, m.errors[entry.name]);
      } catch (error) { for (const entry of bundle) settle(entry, error.message); }
      state.bytes += bundle.reduce((sum, e) => sum + e.file.size, 0); show();
    }
    async function sendLarge(entry, number) {
      const { file } = entry, id = `${wire.page}-${number}-${entry.name}`;
      try {
        await wire.ask({ kind: "begin", id, name: entry.name, size: file.size, replace: entry.replace });
        const starts = Array.from({ length: Math.ceil(file.size / piece) }, (_, k) => k * piece);
        await Promise.all(starts.map(async (at) => {
          await wire.ask({ kind: "piece", id, at }, async () => [await file.slice(at, at + piece).arrayBuffer()]);
          state.bytes += Math.min(piece, file.size - at); show();
        }));
        await wire.ask({ kind: "end", id });
        settle(entry);
      } catch (error) { settle(entry, error.message); }
    }

    words.textContent = `Looking at ${files(entries.length)} …`;
    try {
      const { existing, keep } = await wire.ask({ kind: "names", names: entries.map((e) => e.name) });
      if (existing.length) {
        const choice = await decide(existing, entries.length), taken = new Set(existing);
        if (choice === "skip") entries = entries.filter((e) => !taken.has(e.name));
        if (choice === "replace") for (const e of entries) e.replace = taken.has(e.name);
        if (choice === "keep") for (const e of entries) e.name = keep[e.name] || e.name;
        state.total = entries.length; state.all = entries.reduce((sum, e) => sum + e.file.size, 0);
      }
      const under_way = [];
      let bundle = [], size = 0;
      const flush = () => { if (bundle.length) under_way.push(sendBundle(bundle)); bundle = []; size = 0; };
      entries.forEach((entry, number) => {
        if (entry.file.size > piece) { under_way.push(sendLarge(entry, number)); return; }
        if (size + entry.file.size > piece || bundle.length >= FILES_OF_A_BUNDLE) flush();
        bundle.push(entry); size += entry.file.size;
      });
      flush();
      await Promise.all(under_way);
    } catch (error) { state.refused.push(error.message); }
    bar.style.width = "0";
    const more = state.refused.length > SHOWN_ERRORS ? ` · and ${state.refused.length - SHOWN_ERRORS} more` : "";
    words.textContent = `${files(state.done)} received` + (state.refused.length
      ? `, ${state.refused.length} refused. ${state.refused.slice(0, SHOWN_ERRORS).join(" · ")}${more}` : ".");
    model.send({ kind: "all" });
  }
  const enqueue = (entries) => { if (entries.length) chain = chain.then(() => send(entries)); };

  async function walk(entry, base, found) {
    if (entry.isFile) { found.push({ file: await new Promise((ok, no) => entry.file(ok, no)), name: base + entry.name }); return; }
    const reader = entry.createReader();
    for (;;) {
      const some = await new Promise((ok, no) => reader.readEntries(ok, no));
      if (!some.length) return;
      for (const child of some) await walk(child, base + entry.name + "/", found);
    }
  }
  input.addEventListener("change", () => { enqueue([...input.files].map((file) => ({ file, name: file.name }))); input.value = ""; });
  area.addEventListener("keydown", (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); input.click(); } });
  for (const name of ["dragenter", "dragover"]) area.addEventListener(name, (e) => { e.preventDefault(); e.stopPropagation(); area.classList.add("over"); });
  for (const name of ["dragleave", "drop"]) area.addEventListener(name, () => area.classList.remove("over"));
  area.addEventListener("drop", async (e) => {
    e.preventDefault(); e.stopPropagation();
    const entries = [...e.dataTransfer.items].map((i) => i.webkitGetAsEntry && i.webkitGetAsEntry()).filter(Boolean);
    const found = entries.length ? [] : [...e.dataTransfer.files].map((file) => ({ file, name: file.name }));
    for (const entry of entries) await walk(entry, "", found);
    enqueue(found);
  });
  return () => wire.close();
}
export default { render };
