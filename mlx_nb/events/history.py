"""The history of a run: its events as columns for plots, tables and DataFrames. Pure: no files, no mlx."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from operator import attrgetter
from typing import Any

from mlx_nb.errors import CommandError
from mlx_nb.events import (
    EvaluationCompleted,
    Event,
    Rewound,
    RolloutCompleted,
    RunFinished,
    RunStarted,
    SampleGenerated,
    SettingChanged,
    StepCompleted,
)

STEP_COLUMNS = (
    "step",
    "loss",
    "learning_rate",
    "gradient_norm",
    "target_tokens",
    "tokens",
    "seconds",
    "peak_memory",
    "epoch",
)
EVALUATION_COLUMNS = ("step", "split", "loss", "perplexity", "target_tokens", "rows", "seconds", "best")


class History:
    """All events of a run, with the tables of its updates and its evaluations.

    `events` is everything that happened; `in_effect` leaves out what a rewind undid, and so do the tables.

    `history["loss"]` is a column of the steps, `history.tail(5)` the last of them, `history.to_pandas()` all as a
    DataFrame; `history.steps()` and `history.evaluations()` are lists of dicts.
    """

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.events: list[Event] = []
        self.in_effect: list[Event] = []
        self.folder: str | None = None  # where the run's folder is now, if it was moved
        self._abandoned: list[list[Event]] = []
        # Events of the kinds that are looked up often, with their indices in `in_effect`.
        kinds = (StepCompleted, EvaluationCompleted, RolloutCompleted, RunStarted, SettingChanged)
        self._kept: dict[type, list[tuple[int, Any]]] = {kind: [] for kind in kinds}
        self._begun: float | None = None  # on this process's clock; everything before that took `_before` seconds
        self._before = self._latest = 0.0
        self._spent = {"training": 0.0, "validation": 0.0, "sampling": 0.0}
        for event in events:
            self.append(event)
        self._begun = None

    def append(self, event: Event) -> None:
        """Add an event; a Rewound removes what it undid from `in_effect`."""
        self._latest = time.monotonic()
        if self._begun is None:
            self._before, self._begun = sum(self._spent.values()), self._latest
            self._before += getattr(event, "seconds", 0.0)
        self.events.append(event)
        match event:
            case StepCompleted():
                self._spent["training"] += event.seconds
            case EvaluationCompleted():
                self._spent["validation"] += event.seconds
            case RolloutCompleted() | SampleGenerated():
                self._spent["sampling"] += event.seconds
        if isinstance(event, Rewound):
            self._abandoned.append(self.in_effect[event.kept :])
            del self.in_effect[event.kept :]
            for kept in self._kept.values():
                while kept and kept[-1][0] >= event.kept:
                    kept.pop()
        if type(event) in self._kept:
            self._kept[type(event)].append((len(self.in_effect), event))
        self.in_effect.append(event)

    def spent(self) -> dict[str, float]:
        """Seconds of computing by activity: `training`, `validation` and `sampling`, including what was rewound."""
        return dict(self._spent)

    @property
    def elapsed(self) -> float:
        """Wall-clock seconds from the first event to the newest; for an earlier process, its computing time alone."""
        live = 0.0 if self._begun is None else self._latest - self._begun
        return max(self._before + live, sum(self._spent.values()))

    def abandoned(self) -> list[list[dict[str, Any]]]:
        """The steps of each branch that a rewind abandoned, oldest first, as dicts like those of `steps()`."""
        branches = [
            [_step_row(event) for event in branch if isinstance(event, StepCompleted)] for branch in self._abandoned
        ]
        return [branch for branch in branches if branch]

    def __len__(self) -> int:
        return len(self._kept[StepCompleted])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The updates as dicts, so that `pd.DataFrame(history)` is a table of them."""
        return iter(self.steps())

    def __getitem__(self, column: str) -> list[float]:
        """One column of the steps, in order; NaN where a metric was not measured.

        Raises KeyError, listing the columns.
        """
        if column in STEP_COLUMNS:
            return [getattr(event, column) for event in self._of(StepCompleted)]
        if column not in self.columns:
            raise KeyError(f"no column {column!r}; there are {', '.join(self.columns)}")
        return [event.metrics.get(column, math.nan) for event in self._of(StepCompleted)]

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns, the method's own metrics last."""
        return (*STEP_COLUMNS, *sorted(self.step_metrics))

    def last_steps(self, count: int) -> list[StepCompleted]:
        """The last `count` updates, oldest first."""
        return [event for _, event in self._kept[StepCompleted][-count:]]

    def tail(self, count: int = 5) -> HistoryTable:
        """The last `count` updates as a table that displays itself."""
        return HistoryTable([_step_row(event) for event in self.last_steps(count)], len(self))

    def to_pandas(self) -> Any:
        """All updates as a pandas DataFrame, indexed by step, the method's own metrics among the columns."""
        try:
            import pandas
        except ImportError:
            raise CommandError("pandas is missing. Run: pip install pandas, or use history.steps().") from None
        return pandas.DataFrame(self.steps()).set_index("step") if len(self) else pandas.DataFrame()

    def _repr_html_(self) -> str:
        return self.tail()._repr_html_()

    def steps(self) -> list[dict[str, Any]]:
        """One dict per update."""
        return [_step_row(event) for event in self._of(StepCompleted)]

    def evaluations(self, split: str | None = None) -> list[dict[str, Any]]:
        """One dict per evaluation of one split (None: of all), the method's own metrics last."""
        return [evaluation_row(event) for event in self._of(EvaluationCompleted) if split in (None, event.split)]

    @property
    def best_validation(self) -> dict[str, Any] | None:
        """The validation whose adapter is in `best/`; in a run that marked none, the one with the lowest loss."""
        newest_first = (event for event in self._of(EvaluationCompleted, reverse=True) if event.split == "valid")
        best = next((event for event in newest_first if event.best), None)
        if best is None:
            valid = (event for event in self._of(EvaluationCompleted) if event.split == "valid")
            best = min((event for event in valid if math.isfinite(event.loss)), key=attrgetter("loss"), default=None)
        return None if best is None else evaluation_row(best)

    @property
    def evaluation_metrics(self) -> list[str]:
        """The names of the metrics of evaluations."""
        return list(dict.fromkeys(name for event in self._of(EvaluationCompleted) for name in event.metrics))

    @property
    def answer_metrics(self) -> list[str]:
        """The names of the metrics that judge answers in evaluations."""
        return list(dict.fromkeys(name for event in self._of(EvaluationCompleted) for name in event.answer_metrics))

    @property
    def step_metrics(self) -> list[str]:
        """The names of the metrics of updates, as the method orders them."""
        return list(dict.fromkeys(name for event in self._of(StepCompleted) for name in event.metrics))

    @property
    def rollout_count(self) -> int:
        """Number of rollouts, that is of sets of sampled completions."""
        return len(self._kept[RolloutCompleted])

    def last_rollouts(self, count: int) -> list[RolloutCompleted]:
        """The last `count` rollouts, oldest first."""
        return [event for _, event in self._kept[RolloutCompleted][-count:]]

    def row_losses(self, split: str = "train") -> dict[int, list[tuple[int, float]]]:
        """{row: [(step, loss), ...]} for every row of `split` that was trained on or evaluated, in order.

        Losses are the method's own (for `sft` means over the row's target tokens, in nats); training losses are those
        before the update. With `grpo` the loss of an evaluated row is minus its reward.
        """
        visits: dict[int, list[tuple[int, float]]] = {}
        for event in self.in_effect:
            match event:
                case StepCompleted() if split == "train":
                    step = event.step - 1
                case EvaluationCompleted() if event.split == split:
                    step = event.step
                case _:
                    continue
            for row, loss in losses_by_row(event):
                visits.setdefault(row, []).append((step, loss))
        return visits

    @property
    def started(self) -> RunStarted | None:
        """The RunStarted event, or None before the run has started."""
        return next(self._of(RunStarted), None)

    @property
    def iters(self) -> int | None:
        """Updates in the whole run, as last reported."""
        for event in self._of(SettingChanged, reverse=True):
            if event.name not in ("iters", "epochs"):
                continue
            if length := event.iters or (
                event.new if event.name == "iters" else None
            ):  # older versions did not report the length
                return int(length)
        return self.started.iters if self.started else None

    def first_value(self, setting: str, now: Any) -> Any:
        """The value of a setting before its first change; `now` if it was not changed."""
        return next((event.old for event in self._of(SettingChanged) if event.name == setting), now)

    @property
    def last_step(self) -> StepCompleted | None:
        """The last update that was not rewound."""
        return next(self._of(StepCompleted, reverse=True), None)

    @property
    def finished(self) -> RunFinished | None:
        """The RunFinished event, or None before the run has ended."""
        return next(self._of(RunFinished, reverse=True), None)

    def _of(self, kind: type, *, reverse: bool = False) -> Iterator[Any]:
        if kind in self._kept:
            kept = self._kept[kind]
            return (event for _, event in (reversed(kept) if reverse else kept))
        return (event for event in (reversed(self.in_effect) if reverse else self.in_effect) if isinstance(event, kind))

    def __repr__(self) -> str:
        return f"History({len(self)} updates, {len(self.evaluations())} evaluations)"


class HistoryTable:
    """Rows of a history as a table: HTML that survives in a saved notebook, and plain text."""

    def __init__(self, rows: list[dict[str, Any]], total: int) -> None:
        self.rows = rows
        self._title = f"the last {len(rows)} of {total} updates"

    def _cells(self) -> list[list[str]]:
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        return [names, *([_number(row.get(name)) for name in names] for row in self.rows)]

    def _repr_html_(self) -> str:
        style = "text-align:right;padding:2px 10px 2px 0;white-space:nowrap"
        lines = [
            "".join(f'<t{kind} style="{style}">{escape(text)}</t{kind}>' for text in row)
            for kind, row in zip(["h", *"d" * len(self.rows)], self._cells())
        ]
        rows = "".join(f"<tr>{line}</tr>" for line in lines)
        return f'<div>{self._title}</div><table style="border:none;font-size:.9em">{rows}</table>'

    def __repr__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths)) for row in cells]
        return "\n".join([self._title, *lines])


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _step_row(event: StepCompleted) -> dict[str, Any]:
    return {**{name: getattr(event, name) for name in STEP_COLUMNS}, **event.metrics}


def losses_by_row(event: StepCompleted | EvaluationCompleted) -> list[tuple[int, float]]:
    """One loss for each row of an event; for a prompt, the mean over its completions."""
    rows: dict[int, list[float]] = {}
    for row, loss in event.row_losses:
        rows.setdefault(row, []).append(loss)
    return [(row, sum(several) / len(several)) for row, several in rows.items()]


def evaluation_row(event: EvaluationCompleted) -> dict[str, Any]:
    """An evaluation as a dict, the method's own metrics last."""
    row = {name: getattr(event, name) for name in EVALUATION_COLUMNS}
    row |= {name: value for name in ("bits_per_byte", "best_by") if (value := getattr(event, name))}
    return {**row, **{name: value for name, value in event.metrics.items() if name not in row}}


def smoothed(values: Sequence[float], factor: float = 0.9) -> list[float]:
    """Exponential moving average with Adam's bias correction, so that its start is not pulled toward zero.

    Values that are not finite are skipped; their own entries are NaN.
    """
    average, weight, result = 0.0, 0.0, []
    for value in values:
        known = math.isfinite(value)
        if known:
            average, weight = factor * average + (1 - factor) * value, factor * weight + 1 - factor
        result.append(average / weight if known else math.nan)
    return result


def decimated(count: int, limit: int) -> list[int]:
    """At most `limit` indices into a series of `count`, evenly spread, always including the last."""
    if count <= limit:
        return list(range(count))
    return [round(index * (count - 1) / (limit - 1)) for index in range(limit)]
