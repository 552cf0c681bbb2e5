// The form for a new run. The kernel receives the typed values and returns the cell and its problems.

const MULTILINE = ["sample_prompts"];

function newRunPage({ model, el }) {
  const id = `mlx-nb-${Math.random().toString(36).slice(2)}`;
  const grid = h("div", { class: "mlx-nb-settings" });
  const problems = h("div", { class: "mlx-nb-failure mlx-nb-problems", role: "alert" });
  const cell = h("pre", { class: "mlx-nb-cell", tabindex: 0, "aria-label": "the cell" });
  const status = h("span", { class: "mlx-nb-note", "aria-live": "polite" });
  const copy = h("button", { type: "button", class: "mlx-nb-action mlx-nb-primary", onclick: () => copyCell() }, "Copy the cell");
  const look = h("button", { type: "button", class: "mlx-nb-action", onclick: () => showRow(0) }, "Show the rows");
  const check = h("button", { type: "button", class: "mlx-nb-action", onclick: () => showCheck() }, "Check the rows");
  const back = h("button", { type: "button", class: "mlx-nb-small", onclick: () => showRow(row - 1) }, "◀ Previous row");
  const on = h("button", { type: "button", class: "mlx-nb-small", onclick: () => showRow(row + 1) }, "Next row ▶");
  const where = h("span", { class: "mlx-nb-note" }), leaf = h("span", { class: "mlx-nb-line", hidden: true }, back, where, on);
  const shown = h("div", { class: "mlx-nb-row" }), findings = h("div", { class: "mlx-nb-row" });
  const verdict = h("div", { class: "mlx-nb-verdict", "aria-live": "polite" }), plan = h("div", { class: "mlx-nb-plan" });
  const planned = h("section", { "aria-label": "plan of the memory" }, h("h4", {}, "Memory"), verdict, plan);
  const root = h("div", { class: "mlx-nb-panel mlx-nb-new", "data-lm-suppress-shortcuts": "true", role: "region", "aria-label": "new run" },
    h("div", { class: "mlx-nb-note" }, "Empty fields keep their default. The result is the cell below."),
    grid, problems, h("h4", {}, "The cell"), cell, h("div", { class: "mlx-nb-line" }, copy, status), planned,
    h("h4", {}, "Its rows, as the model will see them"), h("div", { class: "mlx-nb-line" }, look, check, leaf), shown, findings);
  const made = new Map(), waiting = new Map();
  let row = 0, number = 0;

  function put(name, text) {
    model.set("values", { ...model.get("values"), [name]: text });
    model.save_changes();
  }

  function input({ name, default: usual, choices, only_these: onlyThese }) {
    const attributes = { id: `${id}-${name}`, class: "mlx-nb-field", spellcheck: "false", autocomplete: "off" };
    if (onlyThese) {
      const unset = h("option", { value: "" }, usual ? `${usual} (default)` : "(default)");
      return h("select", attributes, unset, choices.filter(([text]) => text !== usual).map(([text, words]) => h("option", { value: text }, words ? `${text}: ${words}` : text)));
    }
    if (MULTILINE.includes(name)) return h("textarea", { ...attributes, rows: 2, placeholder: "one per line" });
    return h("input", { ...attributes, type: "text", list: `${id}-list-${name}`, placeholder: usual });
  }

  function field(one) {
    const box = input(one);
    box.addEventListener("change", () => put(one.name, box.value));
    const list = h("datalist", { id: `${id}-list-${one.name}` }, one.choices.map(([text, words]) => h("option", { value: text }, words)));
    return { of: JSON.stringify(one), box, parts: [h("label", { for: box.id }, one.name), box, h("span", { class: "mlx-nb-note" }, one.help, list)] };
  }

  function drawFields() {
    const typed = model.get("values"), named = { name: "name", default: "run", help: "also the run's folder in adapters/", choices: [], only_these: false };
    const wanted = [named, ...model.get("fields")];
    for (const one of wanted) if (made.get(one.name)?.of !== JSON.stringify(one)) made.set(one.name, field(one));
    const parts = wanted.flatMap(({ name }) => made.get(name).parts), at = document.activeElement?.id;
    if (parts.length !== grid.children.length || parts.some((part, place) => part !== grid.children[place])) {
      grid.replaceChildren(...parts);
      if (at) grid.querySelector(`[id="${at}"]`)?.focus();
    }
    for (const { name } of wanted) if (made.get(name).box !== document.activeElement) made.get(name).box.value = typed[name] ?? "";
  }

  function draw() {
    setText(cell, model.get("cell"));
    const wrong = model.get("problems");
    problems.hidden = !wrong.length;
    problems.replaceChildren(...wrong.map((line) => h("div", {}, line)));
    for (const button of [look, check]) button.disabled = wrong.length > 0;
  }

  async function copyCell() {
    let isCopied = true;
    try {
      await navigator.clipboard.writeText(model.get("cell"));
    } catch { // a page without https, or without the permission
      getSelection().selectAllChildren(cell);
      isCopied = document.execCommand("copy");
    }
    setText(status, `${isCopied ? "copied; paste it into a cell" : "select the text to copy it"}, or run \`%finetune new --write\`, which writes it into the next cell`);
  }

  function ask(message, into) {
    setText(into, "loading …");
    return new Promise((resolve) => {
      waiting.set(++number, resolve);
      model.send({ ...message, id: number });
    });
  }

  function drawPlan() {
    const { state = "", verdict: words = "", sizes = [], changes = [], limits = [], complete } = model.get("plan");
    planned.hidden = !state;
    verdict.dataset.state = state;
    setText(verdict, state === "fits" ? `✓ ${words}` : state === "too large" ? `✗ ${words}` : words);
    const line = ([name, number]) => h("tr", {}, h("td", {}, name), h("td", { class: "mlx-nb-number" }, number));
    const change = ([text, saving, values]) => h("tr", {}, h("td", { class: "mlx-nb-setting" }, text), h("td", { class: "mlx-nb-number" }, `saves ${saving}`),
      h("td", {}, h("button", { type: "button", class: "mlx-nb-small", "aria-label": `use ${text}`, onclick: () => use(values) }, "Use")));
    const table = (title, lines) => h("table", { class: "mlx-nb-table" }, h("caption", {}, title), h("tbody", {}, lines));
    const parts = [["the peak of an update", sizes.map(line)], ["to use less", changes.map(change)], ["what fits", limits.map(line)]];
    plan.style.opacity = state === "planning" ? 0.6 : 1;
    plan.replaceChildren(...parts.filter(([, lines]) => lines.length).map(([title, lines]) => table(title, lines)),
      ...(sizes.length && state !== "planning" && !complete ? [h("span", { class: "mlx-nb-note" }, "looking for settings that need less …")] : []));
  }

  // The settings of a suggestion become typed values.
  function use(values) {
    model.set("values", { ...model.get("values"), ...values });
    model.save_changes();
    setText(status, "");
  }

  async function showRow(wanted) {
    const reply = await ask({ show: "row", row: wanted }, shown);
    leaf.hidden = !reply.rows;
    if (reply.error) return setText(shown, reply.error);
    row = reply.row;
    setText(where, `row ${row} (0 to ${reply.rows - 1})`);
    back.disabled = row <= 0;
    on.disabled = row >= reply.rows - 1;
    setHtml(shown, reply.html);
  }

  async function showCheck() {
    const reply = await ask({ show: "check" }, findings);
    reply.error ? setText(findings, reply.error) : setHtml(findings, reply.html);
  }

  // The shown rows belong to the previous cell.
  function changed() {
    draw();
    setText(status, "");
    leaf.hidden = true;
    for (const one of [shown, findings]) one.replaceChildren();
  }

  function onMessage(message) {
    if (message.kind !== "answer") return;
    waiting.get(message.id)?.(message);
    waiting.delete(message.id);
  }

  const listeners = [["change:fields", drawFields], ["change:values", drawFields], ["change:cell", changed], ["change:problems", draw], ["change:plan", drawPlan], ["msg:custom", onMessage]];
  for (const [name, listener] of listeners) model.on(name, listener);
  // A notebook has single-key commands: two letters delete a cell.
  root.addEventListener("keydown", (event) => { if (!event.ctrlKey && !event.metaKey && !event.altKey) event.stopPropagation(); });
  el.append(root);
  const lightOrDark = followTheme(root);
  drawFields();
  draw();
  drawPlan();
  return () => {
    for (const [name, listener] of listeners) model.off(name, listener);
    lightOrDark();
  };
}

export default { render: newRunPage };
