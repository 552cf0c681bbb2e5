// The data of a run that all its views share: curves, cached replies of the kernel, and whether it is alive.

const MOST_KEPT = 300; // cached replies
const BEATS_MISSED = 4, SECONDS_TO_ANSWER = 15; // limits after which the kernel counts as gone
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
  let number = 0, lastMessageAt = null, hasBeat = false, beatEvery = 3;
  const openedAt = Date.now();
  const notify = (what) => listeners.forEach((listener) => listener(what));
  const store = {
    // Copies, because a change in the model would be sent back to the kernel.
    series: structuredClone(model.get("series")),
    eventLog: structuredClone(model.get("event_log")),
    gone: false,
    goneSince: null,
    listen(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
    // The reply of the kernel to a request; a cached reply is not requested again.
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
    isConnected: () => lastMessageAt !== null,
    // A page without any message was reopened; a page with heartbeats notices when they stop.
    check() {
      const silent = lastMessageAt === null ? Date.now() - openedAt > 1000 * SECONDS_TO_ANSWER
        : hasBeat && Date.now() - lastMessageAt > 1000 * BEATS_MISSED * beatEvery;
      if (!silent || store.gone) return;
      Object.assign(store, { gone: true, goneSince: lastMessageAt === null ? null : new Date(lastMessageAt) });
      notify("life");
    },
  };
  const markAlive = () => {
    const isFirst = lastMessageAt === null;
    lastMessageAt = Date.now();
    if (!store.gone && !isFirst) return;
    store.gone = false;
    notify("life");
  };
  const onMessage = (message) => {
    markAlive();
    if (message.kind === "beat") [hasBeat, beatEvery] = [true, message.seconds];
    if (message.kind === "series") {
      if (message.series) store.series = message.series;
      else if (store.series.version === message.from) applySeries(store.series, message.changes);
      else if (store.series.version < message.version) return model.send({ do: "whole" });
      store.series.version = message.version;
      notify("series");
    }
    if (message.kind === "event_log") {
      const { eventLog } = store;
      if (message.from > eventLog.count) return model.send({ do: "whole" });
      const fresh = message.lines.slice(eventLog.count - message.from);
      eventLog.count += fresh.length;
      eventLog.lines = [...eventLog.lines, ...fresh].slice(-200);
      notify("event_log");
    }
    if (message.kind === "whole") {
      Object.assign(store, { series: message.series, eventLog: message.event_log });
      notify("series");
      notify("event_log");
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
  // Jupyter reports when a widget's connection changes; the next heartbeats show whether it is lost.
  model.on("comm_live_update", () => {
    if (lastMessageAt !== null) lastMessageAt = Math.min(lastMessageAt, Date.now() - 2000 * beatEvery);
  });
  store.timer = setInterval(store.check, 1000);
  store.close = () => {
    clearInterval(store.timer);
    model.off("msg:custom", onMessage);
    stores.delete(model.get("panel_id"));
  };
  return store;
}
