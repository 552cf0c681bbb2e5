// Settings, checkpoints, completions and what happened.

function settingsPage(page) {
  const { model } = page, fields = new Map();
  const grid = h("div", { class: "mlx-nb-settings" });
  const el = h("div", {}, h("div", { class: "mlx-nb-note" }, "Enter applies a value at the next update. null switches a setting off."), grid);

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
  // What was refused is put back to what holds.
  return { el, draw, on: ["settings", "said"] };
}

function checkpointsPage(page) {
  const { model, store } = page;
  const none = h("div", { class: "mlx-nb-note" }, "no checkpoint is there yet");
  const body = h("tbody", {}), compared = h("div", { class: "mlx-nb-note" });
  const heads = ["update", "kind", "saved at", "MB", ""].map((name, at) => h("th", { scope: "col", class: at === 0 || at === 3 ? "mlx-nb-number" : "" }, name));
  const table = h("div", { class: "mlx-nb-scrolls" }, h("table", { class: "mlx-nb-table mlx-nb-acts" }, h("thead", {}, h("tr", {}, heads)), body));
  const el = h("div", {}, none, table, compared);

  const compare = (save, step) => {
    page.say(`comparing with update ${step} …`);
    store.ask({ look: "compare", save }, false).then((told) => {
      page.say(told.error ?? "", Boolean(told.error));
      compared.replaceChildren(h("b", {}, `now against update ${step}`), h("table", { class: "mlx-nb-table" },
        (told.rows ?? []).map(([label, value]) => h("tr", {}, h("td", {}, label), h("td", {}, value)))));
    });
  };

  function line([save, step, kind, time, size]) {
    const small = (text, title, act) => h("button", { type: "button", class: "mlx-nb-small", title, onclick: act }, text);
    const rewind = small("Rewind to it", "go back to this update; the branch that is left stays visible", () => page.rewind(step, rewind));
    const remove = small("Delete", "remove this checkpoint from disk", () =>
      page.confirm(remove, `Delete the checkpoint of update ${step} (${size} MB) from disk? Nothing brings it back.`, "Delete it",
        () => page.act({ do: "delete", save }, `deleting the checkpoint of update ${step} …`)));
    return h("tr", {}, h("td", { class: "mlx-nb-number" }, step), h("td", {}, kind), h("td", {}, time), h("td", { class: "mlx-nb-number" }, size),
      h("td", {}, h("span", { class: "mlx-nb-line" }, rewind, small("Compare", "the run as it is now against this checkpoint", () => compare(save, step)), remove)));
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
      rewind.title = ahead > 0 ? "the run has gone back to before it" : "go back to this update; the branch that is left stays visible";
    }
  }
  return { el, draw, on: ["checkpoints", "progress"] };
}

function completionsPage(page) {
  const { model, store } = page;
  let place = 0, coloredOf = null;
  const rollout = h("select", { class: "mlx-nb-field", "aria-label": "rollout", onchange: () => { place = rollout.selectedIndex; draw(); } });
  const color = h("button", { type: "button", class: "mlx-nb-choice", title: "log(policy now / policy that sampled) of each token of the newest completions",
    onclick: () => { page.put("coloring", !model.get("coloring")); draw(); } }, "Color by log-prob ratio");
  const note = h("div", { class: "mlx-nb-note" }), view = h("div", { class: "mlx-nb-row" });
  const el = h("div", {}, h("div", { class: "mlx-nb-line" }, rollout, color), note, view);

  function show(html, said) {
    setText(note, said ?? "");
    if (view.of !== html) setHtml(view, html ?? "");
    view.of = html;
  }

  function draw() {
    if (el.hidden) return;
    const told = model.get("completions"), colored = model.get("coloring"), updates = told.updates ?? [];
    color.setAttribute("aria-pressed", colored);
    const names = updates.map((update, at) => (at ? `after update ${update}` : `newest, after update ${update}`));
    if (String(names) !== String([...rollout.options].map(({ text }) => text))) {
      // Completions that were chosen stay chosen when newer ones come.
      const chosen = place ? rollout.dataset.update : null;
      rollout.replaceChildren(...names.map((name) => new Option(name)));
      place = chosen === null ? 0 : Math.max(0, updates.map(String).indexOf(chosen));
    }
    rollout.selectedIndex = place;
    rollout.dataset.update = updates[place] ?? "";
    rollout.hidden = !updates.length;
    if (place === 0 && told.html !== null && told.html !== undefined) return show(told.html, told.note);
    if (!updates.length) return show("", told.note);
    coloredOf = `${updates[place]} ${colored}`;
    const of = coloredOf;
    store.ask({ look: "rollout", place, colored }, false).then((answer) => {
      if (of === coloredOf) show(answer.html, answer.error ?? answer.note);
    });
  }
  return { el, draw, on: ["completions", "coloring"] };
}

function logPage(page) {
  const text = h("div", { class: "mlx-nb-log", role: "log", tabindex: 0, "aria-label": "what happened, the newest first" });
  const el = h("div", {}, text);
  function draw() {
    const lines = [...page.store.happened.lines].reverse();
    if (!lines.length) return text.replaceChildren(h("div", { class: "mlx-nb-note" }, "nothing happened yet"));
    sync(text, lines, (line, at) => `${lines.length - at} ${line}`, (line) => h("div", {}, line));
  }
  return { el, draw, on: ["happened"] };
}
