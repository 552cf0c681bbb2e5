// What a page knows of a run apart from its view: curves that grow, answers that are kept, signs of life.

const MOST_KEPT = 300; // answers of the kernel
const BEATS_MISSED = 4, SECONDS_TO_ANSWER = 15; // before the kernel counts as gone
const stores = new Map();

function storeOf(model) {
  const id = model.get("panel_id");
  if (!stores.has(id)) stores.set(id, makeStore(model));
  return stores.get(id);
}

function applySeries(series, { lines, clocks, ...others }) {
  for (const [group, number, kept, steps, values] of lines) {
    const line = series.groups[group].lines[number];
    line.step.splice(kept, Infinity, ...steps);
    line.value.splice(kept, Infinity, ...values);
  }
  for (const [number, kept, ...columns] of clocks)
    ["step", "tokens", "seconds"].forEach((name, at) => series.clocks[number][name].splice(kept, Infinity, ...columns[at]));
  Object.assign(series, others);
}

function makeStore(model) {
  const listeners = new Set(), waiting = new Map(), kept = new Map();
  let number = 0, heardAt = null, hasBeat = false, beatEvery = 3;
  const openedAt = Date.now();
  const tell = (what) => listeners.forEach((listener) => listener(what));
  const store = {
    // Copies: what the model holds goes back to the kernel when it is changed there.
    series: structuredClone(model.get("series")),
    happened: structuredClone(model.get("happened")),
    gone: false,
    goneSince: null,
    listen(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
    // What the kernel answers to a question; the same question is asked once as long as the answer is kept.
    ask(message, isKept = true) {
      const key = JSON.stringify(message);
      if (kept.has(key)) return Promise.resolve(kept.get(key));
      if (waiting.has(key)) return waiting.get(key).promise;
      const id = ++number, entry = { id };
      entry.promise = new Promise((resolve) => { entry.resolve = resolve; });
      waiting.set(key, entry);
      model.send({ ...message, id });
      entry.promise.then((answer) => {
        if (!isKept || answer.error) return;
        kept.set(key, answer);
        if (kept.size > MOST_KEPT) kept.delete(kept.keys().next().value);
      });
      return entry.promise;
    },
    kept: (message) => kept.get(JSON.stringify(message)),
    heard: () => heardAt !== null,
    // A page that never heard the kernel is one that was reopened; where beats came, their end says that it is gone.
    check() {
      const silent = heardAt === null ? Date.now() - openedAt > 1000 * SECONDS_TO_ANSWER
        : hasBeat && Date.now() - heardAt > 1000 * BEATS_MISSED * beatEvery;
      if (!silent || store.gone) return;
      Object.assign(store, { gone: true, goneSince: heardAt === null ? null : new Date(heardAt) });
      tell("life");
    },
  };
  const lives = () => {
    const isFirst = heardAt === null;
    heardAt = Date.now();
    if (!store.gone && !isFirst) return;
    store.gone = false;
    tell("life");
  };
  const onMessage = (message) => {
    lives();
    if (message.kind === "beat") [hasBeat, beatEvery] = [true, message.seconds];
    if (message.kind === "series") {
      if (message.series) store.series = message.series;
      else if (store.series.version === message.from) applySeries(store.series, message.changes);
      else if (store.series.version < message.version) return model.send({ do: "whole" });
      store.series.version = message.version;
      tell("series");
    }
    if (message.kind === "happened") {
      const { happened } = store;
      if (message.from > happened.count) return model.send({ do: "whole" });
      const fresh = message.lines.slice(happened.count - message.from);
      happened.count += fresh.length;
      happened.lines = [...happened.lines, ...fresh].slice(-200);
      tell("happened");
    }
    if (message.kind === "whole") {
      Object.assign(store, { series: message.series, happened: message.happened });
      tell("series");
      tell("happened");
    }
    if (message.kind === "answer") {
      for (const [key, entry] of waiting)
        if (entry.id === message.id) {
          waiting.delete(key);
          entry.resolve(message);
        }
    }
  };
  model.on("msg:custom", onMessage);
  // Jupyter says when the connection of a widget changed; whether it is lost then, the next beats tell.
  model.on("comm_live_update", () => {
    if (heardAt !== null) heardAt = Math.min(heardAt, Date.now() - 2000 * beatEvery);
  });
  store.timer = setInterval(store.check, 1000);
  store.close = () => {
    clearInterval(store.timer);
    model.off("msg:custom", onMessage);
    stores.delete(model.get("panel_id"));
  };
  return store;
}
