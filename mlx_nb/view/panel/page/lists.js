// The pages Settings, Checkpoints, Completions and Log.

function settingsPage(page) {
  const { model } = page, fields = new Map();
  const grid = h("div", { class: "mlx-nb-settings" });
  const el = h("div", {}, h("div", { class: "mlx-nb-note" }, "Press Enter to apply a value from the next update on. null switches a setting off."), grid);

  function field(name, help) {
    const input = h("input", { type: "text", class: "mlx-nb-field", id: `${page.id}-${name}`, spellcheck: "false", autocomplete: "off" });
    const apply = () => {
      if (input.value === input.dataset.value) return;
      page.act({ do: "set", name, text: input.value }, `setting ${name} to ${input.value} …`);
    };
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter") { event.preventDefault(); apply(); }
      if (event.key === "Escape") input.value = input.dataset.value;
    });
    input.addEventListener("change", apply);
    grid.append(h("label", { for: input.id }, name), input, h("span", { class: "mlx-nb-note" }, help));
    fields.set(name, input);
    return input;
  }

  function draw() {
    for (const [name, value, help] of model.get("settings")) {
      const input = fields.get(name) ?? field(name, help);
      const isTouched = input === document.activeElement && input.value !== input.dataset.value;
      if (!isTouched || input.dataset.value !== value) input.value = value;
      input.dataset.value = value;
      input.disabled = page.isGone();
    }
  }
  // A refused value is replaced by the current one.
  return { el, draw, on: ["settings", "notice"] };
}

function checkpointsPage(page) {
  const { model, store } = page;
  const none = h("div", { class: "mlx-nb-note" }, "there is no checkpoint yet");
  const body = h("tbody", {}), compared = h("div", { class: "mlx-nb-note" });
  const heads = ["update", "kind", "saved at", "MB", ""].map((name, at) => h("th", { scope: "col", class: at === 0 || at === 3 ? "mlx-nb-number" : "" }, name));
  const table = h("div", { class: "mlx-nb-scrolls" }, h("table", { class: "mlx-nb-table mlx-nb-acts" }, h("thead", {}, h("tr", {}, heads)), body));
  const el = h("div", {}, none, table, compared);

  const compare = (save, step) => {
    page.say(`comparing with update ${step} …`);
    store.ask({ show: "compare", save }, false).then((reply) => {
      page.say(reply.error ?? "", Boolean(reply.error));
      compared.replaceChildren(h("b", {}, `now against update ${step}`), h("table", { class: "mlx-nb-table" },
        (reply.rows ?? []).map(([label, value]) => h("tr", {}, h("td", {}, label), h("td", {}, value)))));
    });
  };

  function line([save, step, kind, time, size]) {
    const small = (text, title, act) => h("button", { type: "button", class: "mlx-nb-small", title, onclick: act }, text);
    const rewind = small("Rewind to it", "go back to this update; the curves still show the old branch", () => page.rewind(step, rewind));
    const remove = small("Delete", "delete this checkpoint from disk", () =>
      page.confirm(remove, `Delete the checkpoint of update ${step} (${size} MB) from disk? This cannot be undone.`, "Delete it",
        () => page.act({ do: "delete", save }, `deleting the checkpoint of update ${step} …`)));
    return h("tr", {}, h("td", { class: "mlx-nb-number" }, step), h("td", {}, kind), h("td", {}, time), h("td", { class: "mlx-nb-number" }, size),
      h("td", {}, h("span", { class: "mlx-nb-line" }, rewind, small("Compare", "compare the current run with this checkpoint", () => compare(save, step)), remove)));
  }

  function draw() {
    const infos = model.get("checkpoints");
    none.hidden = infos.length > 0;
    table.hidden = !infos.length;
    sync(body, infos, ([save]) => save, line);
    for (const [at, row] of [...body.children].entries()) {
      const rewind = row.querySelector("button"), ahead = infos[at][1] - page.step();
      rewind.disabled = ahead >= 0 || page.isGone();
      setText(rewind, ahead ? "Rewind to it" : "The run is here");
      rewind.title = ahead > 0 ? "this checkpoint is ahead of the run" : "go back to this update; the curves still show the old branch";
    }
  }
  return { el, draw, on: ["checkpoints", "progress"] };
}

function completionsPage(page) {
  const { model, store } = page;
  let place = 0, coloredOf = null;
  const rollout = h("select", { class: "mlx-nb-field", "aria-label": "rollout", onchange: () => { place = rollout.selectedIndex; draw(); } });
  const color = h("button", { type: "button", class: "mlx-nb-choice", title: "log(current policy / sampling policy) for each token of the newest completions",
    onclick: () => { page.put("coloring", !model.get("coloring")); draw(); } }, "Color by log-prob ratio");
  const note = h("div", { class: "mlx-nb-note" }), view = h("div", { class: "mlx-nb-row" });
  const el = h("div", {}, h("div", { class: "mlx-nb-line" }, rollout, color), note, view);

  function show(html, text) {
    setText(note, text ?? "");
    if (view.of !== html) setHtml(view, html ?? "");
    view.of = html;
  }

  function draw() {
    if (el.hidden) return;
    const reply = model.get("completions"), colored = model.get("coloring"), updates = reply.updates ?? [];
    color.setAttribute("aria-pressed", colored);
    const names = updates.map((update, at) => (at ? `after update ${update}` : `newest, after update ${update}`));
    if (String(names) !== String([...rollout.options].map(({ text }) => text))) {
      // Selected completions stay selected when newer ones arrive.
      const chosen = place ? rollout.dataset.update : null;
      rollout.replaceChildren(...names.map((name) => new Option(name)));
      place = chosen === null ? 0 : Math.max(0, updates.map(String).indexOf(chosen));
    }
    rollout.selectedIndex = place;
    rollout.dataset.update = updates[place] ?? "";
    rollout.hidden = !updates.length;
    if (place === 0 && reply.html !== null && reply.html !== undefined) return show(reply.html, reply.note);
    if (!updates.length) return show("", reply.note);
    coloredOf = `${updates[place]} ${colored}`;
    const of = coloredOf;
    store.ask({ show: "rollout", place, colored }, false).then((answer) => {
      if (of === coloredOf) show(answer.html, answer.error ?? answer.note);
    });
  }
  return { el, draw, on: ["completions", "coloring"] };
}

function logPage(page) {
  const text = h("div", { class: "mlx-nb-log", role: "log", tabindex: 0, "aria-label": "log, newest first" });
  const el = h("div", {}, text);
  function draw() {
    const lines = [...page.store.eventLog.lines].reverse();
    if (!lines.length) return text.replaceChildren(h("div", { class: "mlx-nb-note" }, "nothing has happened yet"));
    sync(text, lines, (line, at) => `${lines.length - at} ${line}`, (line) => h("div", {}, line));
  }
  return { el, draw, on: ["event_log"] };
}
