// The page Rows: the rows of an update, with the highest loss, or of a split, or the next batch; and one row as tokens.

const LISTED = { update: "One update", worst: "Highest loss", all: "All rows", batch: "Next batch" };
const COLORS = { mask: "Loss mask", loss: "Loss now", compare: "Change from the base" };
const WAIT = "loading …", WAIT_LONGER = "waiting for the current activity …";

// A group of toggle buttons, one of which is pressed.
function choice(label, options, chosen, choose) {
  const buttons = Object.entries(options).map(([value, text]) =>
    h("button", { type: "button", class: "mlx-nb-choice", value, onclick: () => choose(value) }, text));
  const set = h("span", { class: "mlx-nb-choices", role: "group", "aria-label": label }, buttons);
  set.show = (value) => buttons.forEach((button) => button.setAttribute("aria-pressed", button.value === value));
  set.show(chosen);
  return set;
}

function rowsPage(page) {
  const { model, store } = page;
  const selection = () => ({ split: "train", rows: "update", update: null, row: null, color: "mask", ...model.get("selection") });
  const select = (changes) => page.put("selection", { ...selection(), ...changes });
  let listPage = 0, tokenPage = 0, perToken = false;
  const which = choice("which rows", LISTED, selection().rows, (rows) => { listPage = 0; select({ rows, update: null, row: null }); });
  const split = choice("split", { train: "Training", valid: "Validation" }, "train", (value) => { listPage = 0; select({ split: value, row: null }); });
  const color = choice("color the tokens by", COLORS, "mask", (value) => select({ color: value }));
  const cells = h("label", { class: "mlx-nb-check" }, h("input", { type: "checkbox", onchange: (event) => { perToken = event.target.checked; draw(); } }), "one cell per token");
  const note = h("div", { class: "mlx-nb-note" });
  const latest = h("button", { type: "button", class: "mlx-nb-small", onclick: () => select({ update: null, row: null }) }, "Follow the newest update");
  const list = h("div", { class: "mlx-nb-list", role: "listbox", tabindex: 0, "aria-label": "rows" });
  const back = h("button", { type: "button", class: "mlx-nb-small", onclick: () => { listPage -= 1; draw(); } }, "◀ Previous");
  const on = h("button", { type: "button", class: "mlx-nb-small", onclick: () => { listPage += 1; draw(); } }, "Next ▶");
  const pages = h("div", { class: "mlx-nb-line" }, back, h("span", { class: "mlx-nb-pages" }), on);
  const tokensBack = h("button", { type: "button", class: "mlx-nb-small", onclick: () => { tokenPage -= 1; draw(); } }, "◀ Previous tokens");
  const tokensOn = h("button", { type: "button", class: "mlx-nb-small", onclick: () => { tokenPage += 1; draw(); } }, "Next tokens ▶");
  const tokensLine = h("div", { class: "mlx-nb-line", style: "display: none" }, tokensBack, tokensOn);
  const shown = h("div", { class: "mlx-nb-row" }), visits = h("div", { class: "mlx-nb-note" });
  const look = h("div", { class: "mlx-nb-line" }, color, cells);
  const el = h("div", {}, h("div", { class: "mlx-nb-line" }, which, split, latest), note,
    h("div", { class: "mlx-nb-two" }, h("div", {}, list, pages), h("div", { class: "mlx-nb-wide" }, look, tokensLine, shown, visits)));
  let drawn = 0;

  list.addEventListener("keydown", (event) => {
    const options = [...list.querySelectorAll("[role=option]")], at = options.findIndex((one) => one.getAttribute("aria-selected") === "true");
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: options.length - 1 }[event.key];
    if (to === undefined || !options[to]) return;
    event.preventDefault();
    options[to].click();
    options[to].scrollIntoView({ block: "nearest" });
  });

  function listed({ rows, update, split: of }) {
    const newest = model.get("latest");
    if (rows === "update" && (update === null || update === newest.update)) return newest;
    if (rows === "batch") return { rows: [], note: "the arrays of the next update" };
    const message = { show: "rows", which: rows, split: of, update, page: listPage };
    // The rows of a split and of an update do not change, but their losses do.
    const answer = rows === "worst" ? el.worst?.of === of ? el.worst.answer : null : store.kept(message);
    if (!answer || (rows === "worst" && el.worst.step !== page.step()))
      store.ask(message, rows !== "worst").then((reply) => {
        if (rows === "worst") el.worst = { of, answer: reply, step: page.step() };
        if (reply.error) page.say(reply.error, true);
        draw();
      });
    return answer ?? { rows: [], note: page.isBusy() ? WAIT_LONGER : WAIT };
  }

  function drawList(now) {
    const reply = listed(now);
    setText(note, reply.note ?? reply.error ?? "");
    sync(list, reply.rows ?? [], ([row]) => row, ([row, loss, where]) =>
      h("div", { role: "option", class: "mlx-nb-entry", onclick: () => select({ row }) },
        h("span", {}, `row ${row}`), h("span", { class: "mlx-nb-number" }, loss === null ? "" : loss.toFixed(3)), h("span", { class: "mlx-nb-where", title: where }, where)));
    const rows = (reply.rows ?? []).map(([row]) => row), chosen = rows.includes(now.row) ? now.row : rows[0] ?? null;
    for (const option of list.children) option.setAttribute("aria-selected", option.dataset.key === String(chosen));
    list.style.display = now.rows === "batch" ? "none" : "";
    pages.style.display = (reply.pages ?? 1) > 1 ? "" : "none";
    setText(pages.querySelector(".mlx-nb-pages"), `${listPage + 1} of ${reply.pages ?? 1}`);
    back.disabled = listPage <= 0;
    on.disabled = listPage >= (reply.pages ?? 1) - 1;
    return chosen;
  }

  function show(reply, key) {
    if (shown.dataset.of !== key) {
      shown.dataset.of = key;
      setHtml(shown, reply.html ?? "");
      if (reply.error) setText(shown, reply.error);
    }
    setText(visits, reply.visits ?? "");
    const many = (reply.pages ?? 1) > 1;
    tokensLine.style.display = many ? "" : "none";
    tokensBack.disabled = tokenPage <= 0;
    tokensOn.disabled = tokenPage >= (reply.pages ?? 1) - 1;
  }

  function draw() {
    if (el.hidden) return;
    const now = selection(), turn = ++drawn;
    which.show(now.rows);
    color.show(now.color);
    split.show(now.split);
    split.style.display = now.rows === "worst" || now.rows === "all" ? "" : "none";
    latest.style.display = now.rows === "update" && now.update !== null ? "" : "none";
    look.style.display = now.rows === "batch" ? "none" : "";
    const row = drawList(now);
    // Clear the content of the previous list while waiting for the kernel.
    if (el.which !== now.rows) {
      if (el.which === "batch" || now.rows === "batch") show({ html: "" }, "");
      el.which = now.rows;
    }
    if (now.rows !== "batch" && row === null) return show({ html: "" }, "");
    const of = now.rows === "worst" || now.rows === "all" ? now.split : "train";
    if (now.row !== row || el.row !== `${of} ${row}`) { el.row = `${of} ${row}`; tokenPage = 0; }
    // The losses of a row change with every update; its tokens do not.
    const at = now.rows === "batch" || now.color !== "mask" ? page.step() : 0;
    const message = now.rows === "batch" ? { show: "batch" } : { show: "row", split: of, row, color: now.color, page: tokenPage, tokens: perToken };
    const key = JSON.stringify([message, at]);
    if (shown.dataset.of === key) return;
    if (el.answers?.has(key)) return show(el.answers.get(key), key);
    // During training, shown losses are not requested again at every update.
    if (at && el.requested === JSON.stringify(message) && page.isRunning() && shown.dataset.of) return;
    el.requested = JSON.stringify(message);
    const kept = at ? null : store.kept(message);
    if (kept) return show(kept, key);
    if (!shown.childNodes.length) setText(shown, page.isBusy() ? WAIT_LONGER : WAIT);
    shown.setAttribute("aria-busy", "true");
    store.ask(message, !at).then((reply) => {
      if (at) (el.answers ??= new Map()).set(key, reply);
      if (turn !== drawn && el.requested !== JSON.stringify(message)) return;
      shown.removeAttribute("aria-busy");
      show(reply, key);
    });
  }

  return { el, draw, on: ["latest", "selection", "progress"] };
}
