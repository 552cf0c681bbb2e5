// The page of rows: those of an update, those of highest loss, all of them, or the next batch; one of them by tokens.

const LISTED = { update: "Of one update", worst: "Highest loss", all: "All rows", batch: "Next batch" };
const COLORS = { mask: "Loss mask", loss: "Loss now", compare: "Change against the base" };
const WAIT = "asking the kernel …", WAIT_LONGER = "asking the kernel; it answers after what it is doing …";

// Buttons of which one is pressed: they choose, and do nothing else.
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
  const back = h("button", { type: "button", class: "mlx-nb-small", onclick: () => { listPage -= 1; draw(); } }, "◀ Earlier");
  const on = h("button", { type: "button", class: "mlx-nb-small", onclick: () => { listPage += 1; draw(); } }, "Later ▶");
  const pages = h("div", { class: "mlx-nb-line" }, back, h("span", { class: "mlx-nb-pages" }), on);
  const tokensBack = h("button", { type: "button", class: "mlx-nb-small", onclick: () => { tokenPage -= 1; draw(); } }, "◀ Tokens before");
  const tokensOn = h("button", { type: "button", class: "mlx-nb-small", onclick: () => { tokenPage += 1; draw(); } }, "Tokens after ▶");
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
    const message = { look: "rows", which: rows, split: of, update, page: listPage };
    // The rows of a split and of an update stay what they are; losses do not.
    const answer = rows === "worst" ? el.worst?.of === of ? el.worst.answer : null : store.kept(message);
    if (!answer || (rows === "worst" && el.worst.step !== page.step()))
      store.ask(message, rows !== "worst").then((told) => {
        if (rows === "worst") el.worst = { of, answer: told, step: page.step() };
        if (told.error) page.say(told.error, true);
        draw();
      });
    return answer ?? { rows: [], note: page.isBusy() ? WAIT_LONGER : WAIT };
  }

  function drawList(now) {
    const told = listed(now);
    setText(note, told.note ?? told.error ?? "");
    sync(list, told.rows ?? [], ([row]) => row, ([row, loss, where]) =>
      h("div", { role: "option", class: "mlx-nb-entry", onclick: () => select({ row }) },
        h("span", {}, `row ${row}`), h("span", { class: "mlx-nb-number" }, loss === null ? "" : loss.toFixed(3)), h("span", { class: "mlx-nb-where", title: where }, where)));
    const rows = (told.rows ?? []).map(([row]) => row), chosen = rows.includes(now.row) ? now.row : rows[0] ?? null;
    for (const option of list.children) option.setAttribute("aria-selected", option.dataset.key === String(chosen));
    list.style.display = now.rows === "batch" ? "none" : "";
    pages.style.display = (told.pages ?? 1) > 1 ? "" : "none";
    setText(pages.querySelector(".mlx-nb-pages"), `${listPage + 1} of ${told.pages ?? 1}`);
    back.disabled = listPage <= 0;
    on.disabled = listPage >= (told.pages ?? 1) - 1;
    return chosen;
  }

  function show(told, key) {
    if (shown.dataset.of !== key) {
      shown.dataset.of = key;
      setHtml(shown, told.html ?? "");
      if (told.error) setText(shown, told.error);
    }
    setText(visits, told.visits ?? "");
    const many = (told.pages ?? 1) > 1;
    tokensLine.style.display = many ? "" : "none";
    tokensBack.disabled = tokenPage <= 0;
    tokensOn.disabled = tokenPage >= (told.pages ?? 1) - 1;
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
    // What is on show belongs to another list: it does not stand under this one while the kernel is asked.
    if (el.which !== now.rows) {
      if (el.which === "batch" || now.rows === "batch") show({ html: "" }, "");
      el.which = now.rows;
    }
    if (now.rows !== "batch" && row === null) return show({ html: "" }, "");
    const of = now.rows === "worst" || now.rows === "all" ? now.split : "train";
    if (now.row !== row || el.row !== `${of} ${row}`) { el.row = `${of} ${row}`; tokenPage = 0; }
    // What the model says of a row changes with every update; the row itself does not.
    const at = now.rows === "batch" || now.color !== "mask" ? page.step() : 0;
    const message = now.rows === "batch" ? { look: "batch" } : { look: "row", split: of, row, color: now.color, page: tokenPage, tokens: perToken };
    const key = JSON.stringify([message, at]);
    if (shown.dataset.of === key) return;
    if (el.answers?.has(key)) return show(el.answers.get(key), key);
    // While it trains, the losses on show are not asked for again at every update.
    if (at && el.asked === JSON.stringify(message) && page.isRunning() && shown.dataset.of) return;
    el.asked = JSON.stringify(message);
    const kept = at ? null : store.kept(message);
    if (kept) return show(kept, key);
    if (!shown.childNodes.length) setText(shown, page.isBusy() ? WAIT_LONGER : WAIT);
    shown.setAttribute("aria-busy", "true");
    store.ask(message, !at).then((told) => {
      if (at) (el.answers ??= new Map()).set(key, told);
      if (turn !== drawn && el.asked !== JSON.stringify(message)) return;
      shown.removeAttribute("aria-busy");
      show(told, key);
    });
  }

  return { el, draw, on: ["latest", "selection", "progress"] };
}
