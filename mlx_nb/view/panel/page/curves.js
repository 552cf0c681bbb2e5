// Draws the curves of one run as SVG, from the data of SeriesBuilder.series in view/curves/curves.py.

const TRAIN = "var(--mlx-nb-train)", SECOND = "var(--mlx-nb-second)", VALID = "var(--mlx-nb-valid)";
const LEFT = "var(--mlx-nb-left)";
const LOOKS = {
  raw: { stroke: TRAIN, "stroke-width": 1, "stroke-opacity": 0.75 },
  train: { stroke: TRAIN, "stroke-width": 2 },
  second: { stroke: SECOND, "stroke-width": 2.2, "stroke-dasharray": "9 3 2 3" },
  valid: { stroke: VALID, "stroke-width": 1.6, "stroke-dasharray": "6 4" },
  "valid-first": { stroke: TRAIN, "stroke-width": 1.6, "stroke-dasharray": "6 4" },
  "valid-second": { stroke: SECOND, "stroke-width": 1.6, "stroke-dasharray": "6 4" },
  left: { stroke: LEFT, "stroke-width": 1.8, "stroke-dasharray": "0.1 4", "stroke-linecap": "round" },
};
// With few updates, the single updates are emphasized, because their average lags behind.
const SHORT_LOOKS = {
  raw: { stroke: TRAIN, "stroke-width": 2.2 },
  train: { stroke: TRAIN, "stroke-width": 1, "stroke-opacity": 0.65 },
};
const HEIGHT = 230, NARROWEST = 260, TOP = 26, BOTTOM = HEIGHT - 40, RIGHT = 14, NEAR = 5;
const LETTER = 6.6; // Width of a digit, to reserve space for the axis before drawing.
const CHOICES = {
  scale: ["vertical scale", { linear: "Linear", log: "Log" }],
  axis: ["horizontal axis", { update: "Updates", tokens: "Tokens", time: "Time" }],
  lines: ["lines", { all: "Both", raw: "Each update", smooth: "Smoothed" }],
};
const CURVES_STYLE = `
.mlx-nb-curves { --mlx-nb-train: #0072B2; --mlx-nb-second: #B5568F; --mlx-nb-valid: #D55E00; --mlx-nb-left: #8A8A8A; }
.mlx-nb-curves.mlx-nb-dark { --mlx-nb-train: #56B4E9; --mlx-nb-second: #DE8FC0; --mlx-nb-valid: #F0924C;
  --mlx-nb-left: #A0A0A0; }
.mlx-nb-curves { min-width: ${NARROWEST}px; padding: 2px; color: var(--jp-ui-font-color0, inherit);
  font: 12px/1.4 var(--jp-ui-font-family, system-ui, sans-serif); font-variant-numeric: tabular-nums; }
.mlx-nb-bar, .mlx-nb-legend { display: flex; flex-wrap: wrap; gap: 4px 12px; margin-bottom: 4px; min-height: 17px; }
.mlx-nb-set { display: inline-flex; overflow: hidden; }
.mlx-nb-set, .mlx-nb-bar select, .mlx-nb-tip { border: 1px solid rgba(128, 128, 128, 0.65); border-radius: 3px; }
.mlx-nb-bar button, .mlx-nb-bar select { font: inherit; padding: 0 9px; margin: 0; cursor: pointer; }
.mlx-nb-bar button { color: inherit; background: transparent; border: 0; height: 24px; }
.mlx-nb-bar [aria-pressed="true"] { background: rgba(128, 128, 128, 0.22); box-shadow: inset 0 -2px currentColor; }
.mlx-nb-bar select, .mlx-nb-bar option, .mlx-nb-tip { color: var(--jp-ui-font-color0, CanvasText);
  background: var(--jp-layout-color1, Canvas); max-width: 100%; overflow-wrap: anywhere; }
.mlx-nb-chart { display: block; cursor: crosshair; font-size: 11px; touch-action: pan-y; outline: none; }
.mlx-nb-curves :focus-visible { outline: 2px solid var(--jp-brand-color1, #0072B2); outline-offset: -2px; }
.mlx-nb-plot { position: relative; } .mlx-nb-tip svg { flex: none; }
.mlx-nb-tip { position: absolute; top: ${TOP + 4}px; padding: 4px 8px; pointer-events: none; box-sizing: border-box; }
.mlx-nb-help { margin-bottom: 4px; overflow-wrap: anywhere; } .mlx-nb-bar .mlx-nb-set { flex-wrap: wrap; }
.mlx-nb-legend span, .mlx-nb-tip div { display: flex; align-items: center; gap: 6px; max-width: 250px; }
.mlx-nb-tip b { margin-left: auto; padding-left: 6px; overflow-wrap: normal; }`;
const isValid = (role) => role.startsWith("valid"), isTrend = (role) => role === "train" || role === "second";
const DRAWN = new Set(["svg", "g", "path", "circle", "text", "title"]);

function add(parent, tag, attributes = {}, text = "") {
  const namespace = DRAWN.has(tag) ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
  const element = document.createElementNS(namespace, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  parent.append(element);
  return element;
}

// The index of the number nearest to `wanted`, or -1.
const nearest = (numbers, wanted) => numbers.reduce((best, number, index) =>
  best < 0 || Math.abs(number - wanted) < Math.abs(numbers[best] - wanted) ? index : best, -1);

function clockAt(clock, step, column) {
  const steps = clock.step, values = clock[column];
  const after = steps.findIndex((known) => known >= step);
  if (after <= 0) return after < 0 ? (values.at(-1) ?? 0) : step < steps[0] ? 0 : values[0];
  const share = (step - steps[after - 1]) / (steps[after] - steps[after - 1]);
  return values[after - 1] + share * (values[after] - values[after - 1]);
}

const range = (from, to) => Array.from({ length: Math.max(0, to - from + 1) }, (_, index) => from + index);

function niceTicks(low, high, count, smallest = 0) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const gap = Math.max(smallest, power * ([1, 2, 5].find((factor) => factor * power >= rough) ?? 10));
  const ticks = range(Math.ceil(low / gap - 1e-9), Math.floor(high / gap + 1e-9)).map((index) => index * gap);
  return { ticks, gap };
}

function logTicks(low, high, count) {
  const powers = range(Math.floor(Math.log10(low)), Math.floor(Math.log10(high)));
  for (const factors of [[1], [1, 3], [1, 2, 5]]) {
    const ticks = powers.flatMap((power) => factors.map((factor) => Number(`${factor}e${power}`)));
    const inside = ticks.filter((tick) => tick >= low && tick <= high), every = Math.ceil(inside.length / count);
    if (inside.length >= 3) return { ticks: inside.filter((_, index) => index % every === 0) };
  }
  return niceTicks(low, high, count);
}

const whole = (value) => Math.round(value).toLocaleString("en");
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 4 });
const timeUnit = (seconds) => (seconds < 120 ? [1, "seconds"] : seconds < 7200 ? [60, "minutes"] : [3600, "hours"]);

// `gap` is the distance of the ticks, and determines their number of decimals.
function short(value, gap) {
  if (Math.abs(value) >= 1e4) return compact.format(value);
  if (value && Math.abs(value) < 1e-3) return Number(value.toPrecision(3)).toExponential();
  return value && gap < 1 ? value.toFixed(Math.ceil(-Math.log10(gap) - 1e-9)) : String(Number(value.toPrecision(4)));
}

const hasBoth = ({ lines }) => ["raw", "train"].every((role) => lines.some((line) => line.role === role));

// The geometry of the shown group in pixels; depends on scale, axis and width.
function layout(series, group, scale, axis, width, shown) {
  const column = { tokens: "tokens", time: "seconds" }[axis];
  const along = (step, clock = 0) => (column ? clockAt(series.clocks[clock], step, column) : step);
  const into = scale === "log" ? Math.log10 : (value) => value;
  const isDrawn = (value) => value !== null && (scale !== "log" || value > 0);
  const all = group.lines.map((line) => ({ ...line, along: line.step.map((step) => along(step, line.clock)) }));
  const hidden = { raw: "train", smooth: "raw" }[shown];
  const lines = hasBoth(group) ? all.filter(({ role }) => role !== hidden) : all;
  const heights = (some) => some.flatMap((line) => line.value.filter(isDrawn).map(into));
  // An abandoned branch may have exploded; the current curve keeps at least a third of the height.
  const standing = heights(lines.filter((line) => line.role !== "left"));
  const values = standing.length ? standing : heights(lines);
  let lowest = Math.min(...values), highest = Math.max(...values);
  const span = highest - lowest, behind = heights(lines.filter((line) => line.role === "left"));
  if (behind.length) {
    const room = span > 0 ? span : Infinity; // for a single point
    lowest = Math.max(lowest - room, Math.min(lowest, ...behind));
    highest = Math.min(highest + room, Math.max(highest, ...behind));
  }
  const margin = 0.06 * (highest - lowest) || (scale === "log" ? 0.1 : 0.1 * Math.abs(highest) || 1);
  const low = scale !== "log" && lowest >= 0 ? Math.max(0, lowest - margin) : lowest - margin, high = highest + margin;
  const up = !values.length ? { ticks: [] }
    : scale === "log" ? logTicks(10 ** low, 10 ** high, 6) : niceTicks(low, high, 5);
  const upTexts = up.ticks.map((tick) => short(tick, up.gap));
  const left = 12 + LETTER * Math.max(2, ...upTexts.map((text) => text.length));
  const farthest = Math.max(0, ...lines.map((line) => line.along.at(-1) ?? 0));
  let end = Math.max(farthest, column ? 0 : series.iters) || 1;
  // The axis covers the whole run only once half of it is done, so that the start of a long run is not tiny.
  while (!column && end / 2 >= Math.max(farthest, 4)) end /= 2;
  const [unit, unitName] = axis === "time" ? timeUnit(end) : [1, ""];
  const across = niceTicks(0, end / unit, Math.max(2, Math.floor((width - left) / 90)), axis === "time" ? 0 : 1);
  const tenth = (pixels) => Math.round(pixels * 10) / 10;
  const x = (value) => tenth(left + ((width - RIGHT - left) * value) / end);
  const y = (value) => tenth(BOTTOM - ((BOTTOM - TOP) * (into(value) - low)) / (high - low));
  const looks = series.short && lines.some((line) => line.role === "raw") ? { ...LOOKS, ...SHORT_LOOKS } : LOOKS;
  for (const line of lines)
    line.places = line.along.map((at, index) => [x(at), isDrawn(line.value[index]) ? y(line.value[index]) : null]);
  return {
    width, left, lines, looks, upLabel: group.label, best: group.best,
    bestStep: series.best?.group === group.name ? series.best.step : null, steps: all[0].step,
    stepPlaces: all[0].along.map(x),
    upTicks: up.ticks.map((tick, index) => [y(tick), upTexts[index]]),
    acrossTicks: across.ticks.map((tick) => [x(tick * unit), short(tick, across.gap)]),
    acrossLabel: axis === "tokens" ? "tokens trained on" : axis === "time" ? `time in training (${unitName})`
      : series.iters ? `update, of ${whole(series.iters)}` : "update",
    note: values.length ? "" : lines.some((line) => line.step.length) ? "no value to draw" : "no update yet",
    xOf: (step) => x(along(step)),
    markers: series.markers.map((marker) => ({ ...marker, x: x(along(marker.step)) })),
  };
}

function keyed(parent, tag, role, text, looks) {
  const entry = add(parent, tag), picture = add(entry, "svg", { width: 24, height: 10, "aria-hidden": "true" });
  add(picture, "path", { ...looks[role], "stroke-width": Math.max(1.6, looks[role]["stroke-width"]), d: "M2 5H22" });
  if (isValid(role)) add(picture, "circle", { cx: 12, cy: 5, r: 3, fill: looks[role].stroke });
  entry.append(text);
  return entry;
}

// The zero-length segment shows a point with gaps on both sides.
const pathOf = (places) => places.map(([x, y], index) => y === null ? ""
  : (places[index - 1]?.[1] ?? null) === null ? `M${x} ${y}h0` : `L${x} ${y}`).join("");

function paint(chart, view) {
  const { width, left, lines } = view, right = width - RIGHT;
  chart.replaceChildren();
  chart.setAttribute("width", width);
  const write = (x, y, anchor, text, attributes) =>
    add(chart, "text", { x, y, fill: "currentColor", "text-anchor": anchor, ...attributes }, text);
  const rule = (parent, d, opacity, thickness = 1) =>
    add(parent, "path", { d, stroke: "currentColor", "stroke-opacity": opacity, "stroke-width": thickness });
  for (const [y, text] of view.upTicks) {
    write(left - 6, y + 4, "end", text);
    rule(chart, `M${left} ${y}H${right}`, 0.14);
  }
  rule(chart, `M${left} ${BOTTOM}H${right}`, 0.6);
  for (const [x, text] of view.acrossTicks) {
    write(Math.min(x, width - (LETTER * text.length) / 2), BOTTOM + 16, "middle", text);
    rule(chart, `M${x} ${BOTTOM}v4`, 0.6);
  }
  write(4, 13, "start", view.upLabel);
  write(right, BOTTOM + 34, "end", view.acrossLabel);
  if (view.note) write((left + right) / 2, (TOP + BOTTOM) / 2, "middle", view.note);
  for (const { x, kind, text } of view.markers) {
    const mark = add(chart, "g", { class: "mlx-nb-mark" });
    add(mark, "title", {}, text);
    rule(mark, `M${x} ${BOTTOM}v${kind === "save" ? -5 : -11}`, 0.75, 1.5);
  }
  // The inner SVG clips the plot, with room for half a point around it.
  const box = [left - 6, TOP - 6, right - left + 12, BOTTOM - TOP + 12];
  const inside = add(chart, "svg", { x: box[0], y: box[1], width: box[2], height: box[3], viewBox: box.join(" ") });
  for (const line of [...lines].sort((a, b) => (b.role === "left") - (a.role === "left"))) {
    add(inside, "path", { ...view.looks[line.role], d: pathOf(line.places), class: `mlx-nb-${line.role}`, fill: "none" });
    const shown = line.places.filter(([, y]) => y !== null);
    const dots = isTrend(line.role) ? shown.slice(-1) : isValid(line.role) && shown.length * 8 < width ? shown : [];
    for (const [cx, cy] of dots) add(inside, "circle", { cx, cy, r: 3.2, fill: LOOKS[line.role].stroke });
    if (line.role !== "valid" || !shown.length || !view.best) continue;
    const sign = view.best === "low" ? 1 : -1;
    const saved = line.places[line.step.lastIndexOf(view.bestStep)];
    const best = saved && saved[1] !== null ? saved
      : shown.reduce((found, place) => (sign * place[1] > sign * found[1] ? place : found));
    const text = `best ${Number(line.value[line.places.indexOf(best)].toPrecision(4))}`;
    add(inside, "circle", { cx: best[0], cy: best[1], r: 5.5, fill: "none", stroke: VALID, "stroke-width": 1.5 });
    // Above the plot, where it does not cover a curve.
    write(right, 13, "end", text, { class: "mlx-nb-best" });
  }
}

function renderCurves({ model, el }) {
  const root = add(el, "div", { class: "mlx-nb-curves" });
  add(root, "style", {}, CURVES_STYLE);
  const bar = add(root, "div", { class: "mlx-nb-bar" });
  const legend = add(root, "div", { class: "mlx-nb-legend" });
  const help = add(root, "div", { class: "mlx-nb-help" });
  const plot = add(root, "div", { class: "mlx-nb-plot" });
  const chart = add(plot, "svg", { class: "mlx-nb-chart", tabindex: 0, role: "slider", height: HEIGHT });
  const tip = add(plot, "div", { class: "mlx-nb-tip" });
  let view, pointer, pointed = null;
  const put = (name, value) => { model.set(name, value); model.save_changes(); };
  const first = add(bar, "span", { class: "mlx-nb-set", role: "group", "aria-label": "what says most" });
  const choice = add(bar, "select", { "aria-label": "curve" });
  choice.addEventListener("change", () => put("group", choice.value));
  const buttons = Object.entries(CHOICES).flatMap(([name, [label, options]]) => {
    const set = add(bar, "span", { class: "mlx-nb-set", role: "group", "aria-label": label });
    return Object.entries(options).map(([value, text]) => {
      const button = add(set, "button", { type: "button", value }, text);
      button.addEventListener("click", () => put(name, value));
      return { button, name, value };
    });
  });

  function draw() {
    const series = model.get("series"), names = series.groups.map(({ name }) => name);
    const group = series.groups[Math.max(0, names.indexOf(model.get("group")))];
    if (String(names) !== String([...choice.options].map(({ value }) => value)))
      choice.replaceChildren(...names.map((name) => new Option(name)));
    choice.value = group.name;
    drawFirst(series, group.name);
    help.textContent = group.help;
    help.style.display = group.help ? "block" : "none";
    for (const { button, name, value } of buttons) {
      button.setAttribute("aria-pressed", model.get(name) === value);
      if (name === "lines") button.parentElement.style.display = hasBoth(group) ? "inline-flex" : "none";
    }
    view = layout(series, group, model.get("scale"), model.get("axis"), Math.max(NARROWEST, plot.clientWidth), model.get("lines"));
    const entries = new Map(view.lines.filter(({ step }) => step.length).map(({ name, role }) => [name, role]));
    legend.replaceChildren();
    for (const [name, role] of entries.size > 1 ? entries : []) keyed(legend, "span", role, name, view.looks);
    paint(chart, view);
    pointer = add(chart, "g", { "pointer-events": "none", stroke: "currentColor" });
    const { step, value } = series.groups[0].lines[0];
    const latest = `latest loss ${value.at(-1) ?? "not finite"} at update ${step.at(-1)}`;
    chart.setAttribute("aria-label", `${group.name}: ${step.length ? latest : "no update yet"}`);
    point(pointed);
  }

  // One button for each important curve of the method; none if that is only the loss.
  function drawFirst({ shown }, chosen) {
    const names = shown.length > 1 ? shown : [];
    first.style.display = names.length ? "inline-flex" : "none";
    if (String(names) !== String([...first.children].map(({ value }) => value))) {
      first.replaceChildren();
      for (const name of names) {
        const button = add(first, "button", { type: "button", value: name }, name.replaceAll("_", " "));
        button.addEventListener("click", () => put("group", name));
      }
    }
    for (const button of first.children) button.setAttribute("aria-pressed", button.value === chosen);
  }

  function upright(step, dashes) {
    const x = view.xOf(step);
    add(pointer, "path", { d: `M${x} ${TOP - 4}V${BOTTOM}`, "stroke-dasharray": dashes, "stroke-opacity": 0.7 });
    for (const line of view.lines.filter(({ role }) => isTrend(role))) {
      const y = line.places[nearest(line.step, step)]?.[1] ?? null;
      const fill = LOOKS[line.role].stroke;
      if (y !== null) add(pointer, "circle", { cx: x, cy: y, r: 4, fill, "stroke-width": 1.5 });
    }
    return x;
  }

  // Shows the values at the update selected by the pointer or the arrow keys; null hides them.
  function point(step) {
    const last = view.steps.at(-1) ?? 0, selected = model.get("selected");
    pointed = step === null ? null : (view.steps[nearest(view.steps, step)] ?? null);
    pointer.replaceChildren();
    tip.replaceChildren();
    tip.style.display = pointed === null ? "none" : "block";
    if (selected !== null && view.steps.length && selected <= last) upright(selected, "none");
    if (pointed !== null) describe(upright(pointed, "3 3"));
    chart.setAttribute("aria-valuemax", last);
    chart.setAttribute("aria-valuenow", pointed ?? last);
    chart.setAttribute("aria-valuetext", [...tip.children].map(({ textContent }) => textContent).join(", "));
  }

  function describe(x) {
    const at = (name) => clockAt(model.get("series").clocks[0], pointed, name);
    const isNear = (place) => Math.abs(place - x) <= NEAR;
    const [unit, unitName] = timeUnit(at("seconds")), time = Number((at("seconds") / unit).toPrecision(3));
    add(tip, "strong", {}, `update ${whole(pointed)}`);
    add(tip, "div", {}, `${compact.format(at("tokens"))} tokens, ${time} ${unitName}`);
    for (const line of view.lines) {
      const index = nearest(line.step, pointed), there = line.step[index];
      if (index < 0 || (line.role === "left" && !isNear(line.places[index][0]))) continue;
      const name = there === pointed ? line.name : `${line.name} at ${whole(there)}`;
      add(keyed(tip, "div", line.role, name, view.looks), "b", {}, ` ${line.value[index] ?? "not finite"}`);
    }
    for (const { text } of view.markers.filter((marker) => isNear(marker.x)).slice(-3)) add(tip, "div", {}, text);
    tip.style.left = 0;
    const isBeside = x + 12 + tip.offsetWidth <= view.width;
    tip.style.left = `${Math.max(0, isBeside ? x + 12 : x - 12 - tip.offsetWidth)}px`;
  }

  function select() {
    // Selecting the same update again is reported again, because its rows may no longer be shown.
    if (pointed !== null && pointed === model.get("selected")) put("selected", null);
    if (pointed !== null) put("selected", pointed);
  }

  function pointAt(event) {
    const x = event.clientX - chart.getBoundingClientRect().left;
    point(view.steps[nearest(view.stepPlaces, x)] ?? null);
  }

  chart.addEventListener("pointermove", pointAt);
  chart.addEventListener("click", (event) => { pointAt(event); select(); });
  for (const leaving of ["pointerleave", "blur"]) chart.addEventListener(leaving, () => point(null));
  chart.addEventListener("keydown", (event) => {
    const { steps } = view, at = pointed === null ? steps.length : nearest(steps, pointed);
    const to = (index) => point(steps[Math.min(Math.max(index, 0), steps.length - 1)] ?? null);
    const [go, ...where] = {
      ArrowLeft: [to, at - 1], ArrowRight: [to, at + 1], Home: [to, 0], End: [to, Infinity],
      Escape: [point, null], Enter: [select], " ": [select],
    }[event.key] ?? [];
    if (go) event.preventDefault();
    go?.(...where);
  });
  root.addEventListener("keydown", (event) => {
    // A notebook has single-key commands: Enter would leave the chart, two letters delete the cell.
    if (!event.ctrlKey && !event.metaKey && !event.altKey && !event.shiftKey) event.stopPropagation();
  });
  const again = () => point(pointed), traits = ["series", "scale", "axis", "group", "lines", "selected"];
  for (const name of traits) model.on(`change:${name}`, name === "selected" ? again : draw);
  draw();
  const observer = new ResizeObserver(draw);
  observer.observe(plot);
  const lightOrDark = followTheme(root);
  return () => {
    observer.disconnect();
    lightOrDark();
    for (const name of traits) model.off(`change:${name}`, name === "selected" ? again : draw);
  };
}
