"""The live curves of a run as compact data, which the browser draws (`panel/page/curves.js`)."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from operator import itemgetter
from textwrap import shorten
from types import MappingProxyType
from typing import Any

import numpy as np

from mlx_nb.config.methods import Metric
from mlx_nb.events import (
    AdapterSaved,
    BatchSkipped,
    EvaluationCompleted,
    Event,
    Rewound,
    RunPaused,
    SettingChanged,
    StepCompleted,
)
from mlx_nb.events.history import History, decimated, evaluation_row
from mlx_nb.view.curves.groups import LOSS, QUANTITIES, Group, first_groups, groups_of
from mlx_nb.view.curves.points import (
    SHORT_RUN,
    SMOOTHING,
    Columns,
    Table,
    clock_json,
    kept_points,
    line_json,
    smoothed_at,
)
from mlx_nb.view.event_text import describe
from mlx_nb.view.metric_text import deciding, reward_of

# Limits for runs of any length, so that the browser gets less than 100 KB in total.
LINE_POINTS, ALL_POINTS = 400, 3200
LEFT_POINTS, LEFT_LINES = 600, 60
RUN_KNOTS, LEFT_KNOTS = 300, 16
MARKERS_OF_A_KIND, MARKER_LETTERS = 16, 90

MARKERS: dict[type[Event], str] = {
    AdapterSaved: "save",
    Rewound: "rewind",
    SettingChanged: "setting",
    RunPaused: "pause",
    BatchSkipped: "skip",
}
UPDATE_COLUMNS = ("position", "step", "tokens", "seconds", "weight", "smoothed", LOSS, *QUANTITIES)
Metrics = Mapping[str, Metric]
NO_METRICS: Metrics = MappingProxyType({})


class SeriesBuilder:
    """The curves of one growing history; each call reads only its new events.

    `metrics` are those that the method declares; they come first, with their help.
    """

    def __init__(self, history: History, metrics: Metrics = NO_METRICS) -> None:
        self.history = history
        self.metrics = metrics
        self._read = 0
        self._standing = 0
        self._updates = Table(UPDATE_COLUMNS)
        self._validations = Table(("position", "step", "loss"))
        self._marked: dict[str, list[tuple[int, dict[str, Any]]]] = {kind: [] for kind in MARKERS.values()}
        self._left: list[Columns] = []
        self._measured: dict[str, None] = {}
        self._judged: dict[str, None] = {}
        self._in_nats = True
        self._best: dict[str, Any] | None = None
        self._best_is_old = True

    def series(self, iters: int) -> dict[str, Any]:
        """Data for JSON, under 100 KB for any length of run and up to 30 metrics.

        iters    updates of the whole run
        clocks   `step` with the `tokens` and `seconds` of training until then, to interpolate between, starting at 0;
                 the first is that of the run, the others are those of abandoned branches
        groups   `name`, `label` for the axis, `help`, `best` (which validation is best: low, high or empty)
                 and `lines`: `name`, `role` (raw, train, valid or left; second, valid-first and valid-second if two
                 metrics share a chart), index of the `clock`, `step` and `value` (five digits; None if not finite)
        shown    names of the most informative groups
        best     `group` and `step` of the validation whose adapter is in best/, or None
        short    whether to emphasize the single updates and not the smoothed line
        markers  `step`, `kind` (save, rewind, setting, pause or skip) and `text`
        """
        for event in self.history.events[self._read :]:
            self._add(event)
        updates, valid = self._updates.columns(), self._validations.columns()
        updates["smoothed"] = np.where(np.isfinite(updates[LOSS]), updates["smoothed"], math.nan)
        in_nats = self._in_nats and not self.metrics
        groups = groups_of(list(self._measured), valid.keys(), self.metrics, in_nats=in_nats, judged=list(self._judged))
        branches = self._left[-max(1, LEFT_LINES // len(groups)) :]
        points = min(LINE_POINTS, ALL_POINTS // sum(len(group.lines) for group in groups))
        left_points = LEFT_POINTS // (sum(len(group.columns) for group in groups) * max(1, len(branches)))
        charts = [
            {
                "name": group.name,
                "label": group.label,
                "help": group.help,
                "best": group.best,
                "lines": [
                    *_lines(group, updates, valid, points),
                    *_left_lines(group, branches, left_points),
                ],
            }
            for group in groups
        ]
        clocks = [clock_json(updates, RUN_KNOTS), *(clock_json(branch, LEFT_KNOTS) for branch in branches)]
        markers = [
            marked[index][1] for marked in self._marked.values() for index in decimated(len(marked), MARKERS_OF_A_KIND)
        ]
        shown = first_groups(groups, self.metrics)
        if self._best_is_old:
            self._best, self._best_is_old = self.history.best_validation, False
        best = self._best
        return {
            "iters": iters,
            "clocks": clocks,
            "groups": charts,
            "shown": shown,
            "markers": markers,
            "best": best and {"group": deciding(best)[0], "step": best["step"]},
            "short": len(updates["step"]) < SHORT_RUN,
        }

    def _add(self, event: Event) -> None:
        self._read += 1
        self._best_is_old |= isinstance(event, EvaluationCompleted | Rewound)
        if isinstance(event, Rewound):
            left = self._updates.truncate(event.kept)
            if len(left["step"]):
                self._left.append(left)
            self._validations.truncate(event.kept)
            for marked in self._marked.values():
                del marked[bisect_left(marked, event.kept, key=itemgetter(0)) :]
            self._standing = min(self._standing, event.kept)
        match event:
            case StepCompleted():
                self._add_update(event)
            case EvaluationCompleted(split="valid"):
                self._add_validation(event)
            case _ if type(event) in MARKERS:
                # Truncate first, because a text may list a thousand rows and `shorten` reads every word.
                kind, text = MARKERS[type(event)], describe(event)[: 2 * MARKER_LETTERS]
                text = shorten(text, MARKER_LETTERS, placeholder=" …")
                self._marked[kind].append((self._standing, {"step": event.step, "kind": kind, "text": text}))
        self._standing += 1

    def _add_validation(self, event: EvaluationCompleted) -> None:
        is_reward = reward_of(evaluation_row(event)) is not None
        self._in_nats = event.perplexity is not None
        self._judged.update(dict.fromkeys(map(_column, event.answer_metrics)))
        self._validations.append(
            {
                "position": self._standing,
                "step": event.step,
                # Minus a reward is not a point on the loss curve; the reward has its own curve.
                LOSS: None if is_reward else event.loss,
                **{_column(name): value for name, value in event.metrics.items()},
            }
        )

    def _add_update(self, event: StepCompleted) -> None:
        last = self._updates.last
        weight, smoothed = last("weight"), last("smoothed")
        if math.isfinite(event.loss):
            weight = SMOOTHING * weight + 1 - SMOOTHING
            smoothed += (1 - SMOOTHING) / weight * (event.loss - smoothed)
        metrics = {_column(name): value for name, value in event.metrics.items()}
        self._measured.update(dict.fromkeys(metrics))
        self._updates.append(
            {
                "position": self._standing,
                "step": event.step,
                "tokens": last("tokens") + event.tokens,
                "seconds": last("seconds") + event.seconds,
                LOSS: event.loss,
                "weight": weight,
                "smoothed": smoothed,
                "learning rate": event.learning_rate,
                "gradient norm": event.gradient_norm,
                "tokens per second": event.tokens / event.seconds if event.seconds > 0 else math.nan,
                "memory (GB)": event.peak_memory / 1e9,
                **metrics,
            }
        )


def _column(metric: str) -> str:
    """The column for a metric, renamed if the name is already a column."""
    return f"{metric} (metric)" if metric in UPDATE_COLUMNS else metric


def _lines(group: Group, updates: Columns, valid: Columns, points: int) -> list[dict[str, Any]]:
    """The lines of a group; a smoothed line uses the same points as the raw one."""
    lines = []
    for one in group.lines:
        columns = valid if one.of_validation else updates
        values = columns.get(one.column, np.full(len(columns["step"]), math.nan))
        shape = updates[LOSS] if one.column == "smoothed" else values
        kept = kept_points(shape, points)
        lines.append(
            line_json(one.name, one.role, columns["step"][kept], (smoothed_at if one.smooth else np.take)(values, kept))
        )
    return lines


def _left_lines(group: Group, branches: list[Columns], points: int) -> list[dict[str, Any]]:
    """The lines of abandoned branches."""
    columns = [LOSS if column == "smoothed" else column for column in group.columns]
    lines = []
    for number, branch in enumerate(branches, start=1):
        for column in columns:
            if column in branch:
                kept = kept_points(branch[column], points)
                lines.append(line_json("rewound", "left", branch["step"][kept], branch[column][kept], number))
    return lines
