// The panel of a run: activity, buttons and pages. Clicks are acknowledged here at once.

const TONES = { running: "blue", finished: "green", failed: "orange" };
const PAGES = {
  Rows: rowsPage, Completions: completionsPage, Samples: samplesPage, Chat: chatPage,
  Settings: settingsPage, Checkpoints: checkpointsPage, Log: logPage,
};

function initialize({ model }) {
  const store = storeOf(model);
  return () => store.close();
}

// State shared by all parts of one view.
function makePage(model, store) {
  const acknowledged = h("div", { class: "mlx-nb-notice", "aria-live": "polite" });
  const buttons = new Map();
  let openStrip = null; // the open confirmation
  const page = {
    model, store, acknowledged, buttons, id: `mlx-nb-${Math.random().toString(36).slice(2)}`, pending: false,
    step: () => model.get("progress").step ?? 0,
    isGone: () => store.gone,
    isRunning: () => model.get("head").state === "running" && !store.gone,
    isBusy: () => Boolean(model.get("activity").words) && !store.gone,
    // A request waits for the current activity.
    later: (words) => (page.isRunning() ? `${words} after this update …` : page.isBusy() ? `${words} after the current activity …` : `${words} …`),
    put(name, value) {
      model.set(name, value);
      model.save_changes();
    },
    say(text, isBad = false) {
      setText(acknowledged, text);
      acknowledged.classList.toggle("mlx-nb-bad", isBad);
    },
    act(message, words) {
      if (store.gone) return page.say("the kernel is gone; nothing was done", true);
      page.say(words);
      page.pending = true;
      model.send(message);
    },
    button(name, text, title, act, kind = "") {
      const made = h("button", { type: "button", class: `mlx-nb-action ${kind}`, title, onclick: act }, text);
      buttons.set(name, [...(buttons.get(name) ?? []), made]);
      return made;
    },
    // Asks for confirmation, next to the clicked button.
    confirm(anchor, words, yes, act) {
      page.dismiss();
      const done = (acts) => () => { page.dismiss(); anchor.focus(); if (acts) act(); };
      const sure = h("button", { type: "button", class: "mlx-nb-action mlx-nb-danger", onclick: done(true) }, yes);
      const strip = h("div", { class: "mlx-nb-confirm", role: "group", "aria-label": words },
        h("span", {}, words), sure, h("button", { type: "button", class: "mlx-nb-action", onclick: done(false) }, "Cancel"));
      strip.addEventListener("keydown", (event) => { if (event.key === "Escape") done(false)(); });
      anchor.closest(".mlx-nb-toolbar, .mlx-nb-scrolls").after(strip);
      openStrip = strip;
      sure.focus();
    },
    dismiss() {
      openStrip?.remove();
      openStrip = null;
    },
    rewind(to, anchor) {
      const at = page.step(), dropped = at - to === 1 ? `update ${at}` : `updates ${to + 1} to ${at}`;
      page.confirm(anchor, `Go back from update ${at} to ${to}? The run drops ${dropped}. The curves still show the old branch.`, "Rewind",
        () => page.act({ do: "rewind", to }, page.later(`going back to update ${to}`)));
    },
  };
  return page;
}

function toolbar(page) {
  const { act, later } = page;
  const loads = () => (page.model.get("head").state === "built" ? "loading model and rows …" : "starting …");
  const run = page.button("run", "▶ Run", "train to the end", () => act({ do: "run" }, loads()), "mlx-nb-primary");
  const pause = page.button("pause", "❚❚ Pause", "pause after this update; nothing is lost", () => act({ do: "pause" }, "pausing after this update …"));
  const steps = (count) => () => act({ do: "step", updates: count }, page.model.get("head").state === "built" ? loads() : count === 1 ? "computing one update …" : `computing ${count} updates …`);
  const stop = page.button("stop", "■ Stop", "end the run after this update and save the adapter", () =>
    page.confirm(stop, "End the run after this update and save its adapter?", "Stop the run", () => act({ do: "stop" }, later("stopping"))));
  const save = page.button("save", "Save", "write the adapter now", () => act({ do: "save" }, later("saving")));
  const evaluate = page.button("evaluate", "Evaluate", "measure the loss on the validation rows now", () => act({ do: "evaluate" }, later("evaluating")));
  const back = h("input", { type: "number", class: "mlx-nb-field mlx-nb-back", min: 1, value: 10, "aria-label": "updates to go back" });
  const rewind = page.button("rewind", "⟲ Rewind", "go back this many updates; the curves still show the old branch", () =>
    page.rewind(Math.max(0, page.step() - Math.max(1, Number(back.value) || 1)), rewind));
  const skip = page.button("skip", "Skip batch", "leave out the batch that caused the failure", () => act({ do: "skip" }, "leaving out the batch …"));
  const set = (...children) => h("span", { class: "mlx-nb-set-of-actions" }, children);
  const bar = h("div", { class: "mlx-nb-toolbar", role: "toolbar", "aria-label": "run" },
    set(run, pause, skip, page.button("step", "Step", "exactly one update", steps(1)), page.button("step", "Step 10", "exactly ten updates", steps(10))),
    set(save, evaluate), set(rewind, back), set(stop));
  const enable = () => {
    const useful = new Set(page.store.gone ? [] : page.model.get("clicks"));
    for (const [name, some] of page.buttons) for (const one of some) one.disabled = !useful.has(name);
    back.disabled = !useful.has("rewind");
    // A failed run cannot be paused, but its batch can be skipped.
    skip.hidden = !useful.has("skip");
    for (const cancel of page.buttons.get("cancel")) cancel.hidden = !useful.has("cancel");
    pause.hidden = useful.has("skip");
  };
  return { bar, enable };
}

function header(page) {
  const { model, store } = page;
  const name = h("b", { class: "mlx-nb-name" }), pill = h("span", { role: "status", class: "mlx-nb-pill" });
  const failure = h("div", { class: "mlx-nb-failure" }), facts = h("div", { class: "mlx-nb-facts" });
  const nextStep = h("div", { class: "mlx-nb-note" });
  const notes = h("div", { class: "mlx-nb-note", role: "note" }), words = h("div", { class: "mlx-nb-words-of-progress" });
  const fill = h("div", {}), bar = h("div", { class: "mlx-nb-progress", role: "progressbar", "aria-label": "updates" }, fill);
  const doing = h("span", {}), doingFill = h("div", {}), doingBar = h("div", { class: "mlx-nb-doing-bar", role: "progressbar", "aria-label": "activity" }, doingFill);
  const cancel = page.button("cancel", "Cancel", "cancel the current request", () => page.act({ do: "cancel" }, "canceling …"), "mlx-nb-small");
  const activity = h("div", { class: "mlx-nb-doing" }, doingBar, doing, cancel);
  const el = h("header", {}, h("div", { class: "mlx-nb-title" }, name, pill), failure, nextStep, facts, notes, bar, words, activity);
  let seen = "", since = Date.now(), changedAt = Date.now();

  function draw() {
    const head = model.get("head"), progress = model.get("progress");
    setText(name, head.name ?? "");
    const state = store.gone ? "✗ kernel gone" : store.isConnected() ? `${head.sign} ${head.state}` : "… connecting to the kernel";
    setText(pill, state);
    pill.dataset.tone = store.gone ? "orange" : TONES[head.state] ?? "grey";
    const when = store.goneSince ? ` since ${timeOfDay(store.goneSince)}` : "";
    const resume = head.resume ? ` Resume with ${head.resume}` : " Run the cell again.";
    const last = head.state === "running" ? "" : `, ${head.state}`;
    setText(failure, store.gone ? `kernel gone${when}; this is the last state${last}, after update ${progress.step ?? 0}.${resume}` : head.failure ?? "");
    failure.hidden = !failure.textContent;
    setText(nextStep, store.gone ? "" : head.next_step ?? "");
    nextStep.hidden = !nextStep.textContent;
    facts.replaceChildren(...(head.facts ?? []).map((fact) => h("span", {}, fact)));
    sync(notes, head.notes ?? [], ([, words]) => words, ([isWarning, words]) => h("div", {}, isWarning ? `⚠ ${words}` : words));
    notes.hidden = !notes.children.length;
    const parts = progress.parts ?? [], share = progress.iters ? Math.min(1, progress.step / progress.iters) : 0;
    if (String(parts) !== String([...words.children].map(({ textContent }) => textContent))) words.replaceChildren(...parts.map((part) => h("span", {}, part)));
    fill.style.width = `${100 * share}%`;
    for (const [label, value] of [["valuenow", progress.step ?? 0], ["valuemin", 0], ["valuemax", progress.iters ?? 0]]) bar.setAttribute(`aria-${label}`, value);
    tick();
  }

  // The kernel reports the activity; the elapsed time advances here, however long an update takes.
  function tick() {
    const now = model.get("activity"), isMoving = page.isBusy();
    activity.style.visibility = isMoving ? "visible" : "hidden";
    if (!isMoving) { seen = ""; return; }
    const what = now.update ? `update ${now.update}` : now.words.replace(/[\d.,]+/g, "");
    if (what !== seen) [seen, since] = [what, Date.now()];
    const text = JSON.stringify(now);
    if (text !== activity.dataset.activity) [activity.dataset.activity, changedAt] = [text, Date.now()];
    const spent = (Date.now() - since) / 1000, pace = model.get("progress").pace ?? 0;
    const share = now.total ? now.done / now.total : now.update && pace ? Math.min(0.96, spent / pace) : null;
    doingBar.classList.toggle("mlx-nb-unknown", share === null);
    doingFill.style.width = share === null ? "" : `${100 * share}%`;
    share === null ? doingBar.removeAttribute("aria-valuenow") : doingBar.setAttribute("aria-valuenow", Math.round(100 * share));
    const left = now.left === null || now.left === undefined ? null : Math.max(0, now.left - (Date.now() - changedAt) / 1000);
    const time = left !== null && left >= 1 ? `${seconds(left)} left` : now.update && pace ? `${seconds(spent)} of about ${seconds(pace)}` : spent > 0.5 ? seconds(spent) : "";
    setText(doing, time && !(now.update && pace < 0.5) ? `${now.words} · ${time}` : now.words);
  }
  return { el, draw, tick };
}

// An adapter between the model and the curves: the points of the store, and the selected update.
function curvesPage(page) {
  const { model, store } = page, callbacks = {};
  const el = h("div", {});
  const facade = {
    get(name) {
      if (name === "series") return store.series;
      return name === "selected" ? model.get("selection").update ?? null : model.get(name);
    },
    set(name, value) {
      if (name !== "selected") return model.set(name, value);
      model.set("selection", { ...model.get("selection"), update: value, rows: "update", row: null });
      for (const callback of callbacks["change:selected"] ?? []) callback();
      if (value !== null) model.set("tab", "Rows");
    },
    save_changes: () => model.save_changes(),
    on(name, callback) {
      (callbacks[name] ??= []).push(callback);
      if (!["change:series", "change:selected"].includes(name)) model.on(name, callback);
    },
    off: (name, callback) => model.off(name, callback),
  };
  const close = renderCurves({ model: facade, el });
  const draw = () => { if (!el.hidden) for (const callback of callbacks["change:series"] ?? []) callback(); };
  return { el, draw, on: ["series", "selection"], close };
}

function tabsOf(page, pages) {
  const { model } = page, names = model.get("tabs"), made = new Map();
  const list = h("div", { class: "mlx-nb-tabs", role: "tablist", "aria-label": "pages" });
  const frame = h("div", { class: "mlx-nb-pages-frame" });
  for (const name of names) {
    const tab = h("button", { type: "button", role: "tab", id: `${page.id}-tab-${name}`, "aria-controls": `${page.id}-${name}`, onclick: () => page.put("tab", name) }, name);
    const panel = h("div", { role: "tabpanel", id: `${page.id}-${name}`, "aria-labelledby": tab.id });
    list.append(tab);
    frame.append(panel);
    made.set(name, { tab, panel });
  }
  list.addEventListener("keydown", (event) => {
    const at = names.indexOf(model.get("tab")), last = names.length - 1;
    const to = { ArrowRight: at === last ? 0 : at + 1, ArrowLeft: at ? at - 1 : last, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    page.put("tab", names[to]);
    made.get(names[to]).tab.focus();
  });
  function draw() {
    const shown = made.has(model.get("tab")) ? model.get("tab") : names[0];
    for (const [name, { tab, panel }] of made) {
      const isShown = name === shown;
      tab.setAttribute("aria-selected", isShown);
      tab.tabIndex = isShown ? 0 : -1;
      panel.hidden = !isShown;
      if (isShown && !pages.has(name)) {
        pages.set(name, (PAGES[name] ?? curvesPage)(page));
        panel.append(pages.get(name).el);
      }
      if (pages.has(name)) pages.get(name).el.hidden = !isShown;
    }
    pages.get(shown).draw();
    page.enable?.();
  }
  return { list, frame, draw };
}

function render({ model, el }) {
  const store = storeOf(model), page = makePage(model, store), pages = new Map();
  const top = header(page), tools = toolbar(page), tabs = tabsOf(page, pages);
  const root = h("div", { class: "mlx-nb-panel", "data-lm-suppress-shortcuts": "true", role: "region", "aria-label": `run ${model.get("head").name}` },
    top.el, tools.bar, page.acknowledged, tabs.list, tabs.frame);
  el.append(root);
  page.enable = tools.enable;
  let state = model.get("head").state, notice = model.get("notice").count;

  function onChange(name) {
    if (name === "head" || name === "progress" || name === "life" || name === "activity") top.draw();
    if (name === "head" && model.get("head").state !== state) {
      state = model.get("head").state;
      if (page.pending) page.say(state === "running" ? "" : `${state} after update ${page.step()}`);
      page.pending = false;
    }
    if (name === "notice" && model.get("notice").count !== notice) {
      const { text, bad, count } = model.get("notice");
      [notice, page.pending] = [count, false];
      page.say(text, bad);
    }
    if (name === "talk" && page.pending && model.get("talk").at(-1)?.content) {
      page.pending = false;
      page.say("");
    }
    if (name === "life") {
      root.classList.toggle("mlx-nb-live", !store.gone);
      if (store.gone) {
        page.pending = false;
        page.say("");
        page.dismiss();
      }
    }
    for (const one of pages.values()) if (one.on.includes(name) && !one.el.hidden) one.draw();
    if (["clicks", "life", "talk", "samples"].includes(name)) tools.enable();
  }

  const traits = ["head", "progress", "activity", "clicks", "notice", "latest", "completions", "samples", "settings", "checkpoints", "talk", "selection", "coloring"];
  const listeners = traits.map((name) => [`change:${name}`, () => onChange(name)]);
  listeners.push(["change:tab", tabs.draw]);
  for (const [name, listener] of listeners) model.on(name, listener);
  const unlisten = store.listen(onChange), timer = setInterval(top.tick, 250), lightOrDark = followTheme(root);
  // A notebook has single-key commands: two letters delete a cell.
  root.addEventListener("keydown", (event) => { if (!event.ctrlKey && !event.metaKey && !event.altKey) event.stopPropagation(); });
  root.classList.toggle("mlx-nb-live", !store.gone);
  top.draw();
  tabs.draw();
  tools.enable();
  model.send({ do: "open" });
  return () => {
    for (const [name, listener] of listeners) model.off(name, listener);
    for (const one of pages.values()) one.close?.();
    unlisten();
    lightOrDark();
    clearInterval(timer);
    model.send({ do: "shut" });
  };
}

export default { initialize, render };
