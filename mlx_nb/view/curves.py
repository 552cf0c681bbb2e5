"""The live curves of a run: its events as small data for a browser, and the widget that draws them there."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from textwrap import shorten

import anywidget
import numpy as np
import traitlets

from mlx_nb import events
from mlx_nb.view.history import History, decimated
from mlx_nb.view.text_report import describe

# However long the run, at most so many numbers and words go to the browser: under 100 KB in all.
LINE_POINTS, ALL_POINTS = 400, 3200
LEFT_POINTS, LEFT_LINES = 600, 60
RUN_KNOTS, LEFT_KNOTS = 300, 16
MARKERS_OF_A_KIND, MARKER_LETTERS = 16, 90

SMOOTHING = 0.9
QUANTITIES = {
    "loss": "loss (nats per token)",
    "learning rate": "learning rate",
    "gradient norm": "gradient norm (L2, before clipping)",
    "tokens per second": "tokens per second",
    "memory (GB)": "peak memory (GB)",
}
MARKERS: dict[type[events.Event], str] = {
    events.CheckpointSaved: "save",
    events.Rewound: "rewind",
    events.SettingChanged: "setting",
    events.RunPaused: "pause",
    events.BatchSkipped: "skip",
}
UPDATE_COLUMNS = ("position", "step", "tokens", "seconds", "weight", "smoothed", *QUANTITIES)
Columns = dict[str, np.ndarray]


class _Table:
    """Columns of numbers that grow at the end and are cut back by rewinds.

    The column `position` is the place of the row's event among those that stand. A number that is missing is NaN; any
    that is not finite is inf, so that it shows as a spike would.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self._columns: dict[str, array[float]] = {name: array("d") for name in names}

    def append(self, row: dict[str, float]) -> None:
        for name in row.keys() - self._columns.keys():
            self._columns[name] = array("d", [math.nan]) * len(self._columns["position"])
        for name, column in self._columns.items():
            value = row.get(name)
            column.append(math.nan if value is None else value if math.isfinite(value) else math.inf)

    def cut(self, kept: int) -> Columns:
        """Take away, and return, the rows of all events but the first `kept`."""
        length = bisect_left(self._columns["position"], kept)
        left = {name: np.array(column[length:]) for name, column in self._columns.items()}
        for column in self._columns.values():
            del column[length:]
        return left

    def last(self, name: str) -> float:
        """The newest number of a column, 0 when there is none."""
        column = self._columns[name]
        return column[-1] if column else 0.0

    def columns(self) -> Columns:
        # Copies, because an array that lends its memory to numpy cannot grow.
        return {name: np.array(column) for name, column in self._columns.items()}


class SeriesBuilder:
    """The curves of one history, which may grow; only its new events are read each time."""

    def __init__(self, history: History) -> None:
        self.history = history
        self._read = 0
        self._standing = 0
        self._updates = _Table(UPDATE_COLUMNS)
        self._validations = _Table(("position", "step", "loss"))
        self._marked: dict[str, list[tuple[int, dict]]] = {kind: [] for kind in MARKERS.values()}
        self._left: list[Columns] = []
        self._labels = dict(QUANTITIES)

    def series(self, iters: int) -> dict:
        """Data for JSON, under 100 KB for any length of run and up to 30 metrics.

        iters    updates of the whole run
        clocks   `step` with the `tokens` and `seconds` of training until then, to interpolate between, 0 before; the
                 first is that of the run, the others those of the branches that rewinds left
        groups   `name`, `label` for the axis and `lines`: `name`, `role` (raw, train, valid or left), index of the
                 `clock`, `step` and `value` (five digits; None where not finite)
        markers  `step`, `kind` (save, rewind, setting, pause or skip) and `text`
        """
        for event in self.history.events[self._read :]:
            self._add(event)
        updates = self._updates.columns()
        updates["smoothed"] = np.where(np.isfinite(updates["loss"]), updates["smoothed"], math.nan)
        branches = self._left[-max(1, LEFT_LINES // len(self._labels)) :]
        points = min(LINE_POINTS, ALL_POINTS // (len(self._labels) + 2))
        left_points = LEFT_POINTS // (len(self._labels) * max(1, len(branches)))
        groups = []
        for group, label in self._labels.items():
            kept = kept_points(updates[group], points)
            lines = [_line(group, "train", updates, group, kept)]
            if group == "loss":
                valid = self._validations.columns()
                lines = [
                    _line("train, each update", "raw", updates, "loss", kept),
                    _line("train, smoothed", "train", updates, "smoothed", kept),
                    _line("validation", "valid", valid, "loss", kept_points(valid["loss"], points)),
                ]
            lines += [
                _line("rewound", "left", branch, group, kept_points(branch[group], left_points), clock)
                for clock, branch in enumerate(branches, start=1)
                if group in branch
            ]
            groups.append({"name": group, "label": label, "lines": lines})
        clocks = [_clock(updates, RUN_KNOTS), *(_clock(branch, LEFT_KNOTS) for branch in branches)]
        markers = [
            marked[index][1] for marked in self._marked.values() for index in decimated(len(marked), MARKERS_OF_A_KIND)
        ]
        return {"iters": iters, "clocks": clocks, "groups": groups, "markers": markers}

    def _add(self, event: events.Event) -> None:
        self._read += 1
        if isinstance(event, events.Rewound):
            left = self._updates.cut(event.kept)
            if len(left["step"]):
                self._left.append(left)
            self._validations.cut(event.kept)
            for marked in self._marked.values():
                del marked[bisect_left(marked, event.kept, key=itemgetter(0)) :]
            self._standing = min(self._standing, event.kept)
        match event:
            case events.StepCompleted():
                self._add_update(event)
            case events.EvaluationCompleted(split="valid"):
                self._validations.append({"position": self._standing, "step": event.step, "loss": event.loss})
            case _ if type(event) in MARKERS:
                # Cut first, because a text may name a thousand rows and `shorten` reads every word.
                kind, text = MARKERS[type(event)], describe(event)[: 2 * MARKER_LETTERS]
                text = shorten(text, MARKER_LETTERS, placeholder=" …")
                self._marked[kind].append((self._standing, {"step": event.step, "kind": kind, "text": text}))
        self._standing += 1

    def _add_update(self, event: events.StepCompleted) -> None:
        last = self._updates.last
        weight, smoothed = last("weight"), last("smoothed")
        if math.isfinite(event.loss):
            weight = SMOOTHING * weight + 1 - SMOOTHING
            smoothed += (1 - SMOOTHING) / weight * (event.loss - smoothed)
        metrics = {
            f"{name} (metric)" if name in UPDATE_COLUMNS else name: event.metrics[name] for name in event.metrics
        }
        self._labels.update((name, name) for name in metrics)
        self._updates.append(
            {
                "position": self._standing,
                "step": event.step,
                "tokens": last("tokens") + event.tokens,
                "seconds": last("seconds") + event.seconds,
                "loss": event.loss,
                "weight": weight,
                "smoothed": smoothed,
                "learning rate": event.learning_rate,
                "gradient norm": event.gradient_norm,
                "tokens per second": event.tokens / event.seconds if event.seconds > 0 else math.nan,
                "memory (GB)": event.peak_memory / 1e9,
                **metrics,
            }
        )


def series_of(history: History, iters: int) -> dict:
    """The curves of a history as data for JSON; see `SeriesBuilder.series`."""
    return SeriesBuilder(history).series(iters)


def kept_points(values: np.ndarray, limit: int) -> np.ndarray:
    """Indices, in order, of the first, the last, and the lowest and highest value of each stretch; never of a NaN.

    At most `limit`, if that is 4 or more.
    """
    there = np.flatnonzero(~np.isnan(values))
    if len(there) <= limit:
        return there
    # A power of two, so that the points of a growing line stay where they are until the stretches double.
    size = 1 << ((len(there) - 1) // (max(limit, 4) // 2 - 1)).bit_length()
    stretches = np.pad(values[there], (0, -len(there) % size), "edge").reshape(-1, size)
    starts = np.arange(0, len(there), size)
    ends = [0, len(there) - 1]
    return there[np.unique(np.concatenate([ends, starts + stretches.argmin(1), starts + stretches.argmax(1)]))]


def _line(name: str, role: str, columns: Columns, column: str, kept: np.ndarray, clock: int = 0) -> dict:
    steps = [int(step) for step in columns["step"][kept]]
    values = [float(f"{value:.5g}") if math.isfinite(value) else None for value in columns[column][kept]]
    return {"name": name, "role": role, "clock": clock, "step": steps, "value": values}


def _clock(columns: Columns, knots: int) -> dict[str, list]:
    """Tokens and seconds of training until the end of some of the updates, the first and the last among them."""
    kept = decimated(len(columns["step"]), knots)
    return {
        "step": [int(step) for step in columns["step"][kept]],
        "tokens": [int(tokens) for tokens in columns["tokens"][kept]],
        "seconds": [float(f"{seconds:.6g}") for seconds in columns["seconds"][kept]],
    }


class Curves(anywidget.AnyWidget):
    """The live curves of one run, under a cell; all drawing is in curves.js.

    series    what is drawn, as `SeriesBuilder.series` makes it
    scale     of the values: linear or log;  axis: update, tokens or time;  group: the name of the group on show
    selected  the update whose point was clicked, None before
    """

    _esm = Path(__file__).with_name("curves.js")

    series = traitlets.Dict().tag(sync=True)
    scale = traitlets.Enum(("linear", "log"), "linear").tag(sync=True)
    axis = traitlets.Enum(("update", "tokens", "time"), "update").tag(sync=True)
    group = traitlets.Unicode("loss").tag(sync=True)
    selected = traitlets.Int(None, allow_none=True).tag(sync=True)

    def __init__(self) -> None:
        self._builder = SeriesBuilder(History())
        super().__init__(series=self._builder.series(0))

    def refresh(self, history: History, iters: int) -> None:
        """Show a history as it is now, of a run of so many updates."""
        if self._builder.history is not history:
            self._builder = SeriesBuilder(history)
        self.series = self._builder.series(iters)

    def on_select(self, callback: Callable[[int], None]) -> None:
        """Call back with the update whenever a point is clicked."""
        self.observe(lambda change: None if change.new is None else callback(change.new), "selected")
