"""Events to columns: what a plot, a table or a DataFrame needs. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mlx_nb.events import EvaluationCompleted, Event, Rewound, RunFinished, RunStarted, StepCompleted

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
    """All events of a run, with the two tables that people look at.

    `events` is everything that happened; `standing` leaves out what a rewind took back, and so do the tables.

    `history["loss"]` is a column of the steps; `history.steps()` and `history.evaluations()` are lists of dicts,
    which `pandas.DataFrame` takes as they are.
    """

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.events: list[Event] = []
        self.standing: list[Event] = []
        self._abandoned: list[list[Event]] = []
        for event in events:
            self.append(event)

    def append(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Rewound):
            self._abandoned.append(self.standing[event.kept :])
            del self.standing[event.kept :]
        self.standing.append(event)

    def abandoned(self) -> list[list[dict]]:
        """The steps of each branch that a rewind left behind, the oldest first; dicts as those of `steps()`."""
        branches = [
            [_step_row(event) for event in branch if isinstance(event, StepCompleted)] for branch in self._abandoned
        ]
        return [branch for branch in branches if branch]

    def __len__(self) -> int:
        return sum(1 for _ in self._of(StepCompleted))

    def __getitem__(self, column: str) -> list[float]:
        """One column of the steps, in order. Raises KeyError naming the columns."""
        if column not in STEP_COLUMNS:
            raise KeyError(f"no column {column!r}; there are {', '.join(STEP_COLUMNS)}")
        return [getattr(event, column) for event in self._of(StepCompleted)]

    def steps(self) -> list[dict]:
        """One dict per update."""
        return [_step_row(event) for event in self._of(StepCompleted)]

    def evaluations(self, split: str | None = None) -> list[dict]:
        """One dict per evaluation, of one split or of all."""
        return [
            {name: getattr(event, name) for name in EVALUATION_COLUMNS}
            for event in self._of(EvaluationCompleted)
            if split in (None, event.split)
        ]

    def row_losses(self, split: str = "train") -> dict[int, list[tuple[int, float]]]:
        """{row: [(step, loss), ...]} for every row of `split` that was trained on or evaluated, in order.

        Losses are means over the row's target tokens, in nats; in training, those before the update.
        """
        visits: dict[int, list[tuple[int, float]]] = {}
        for event in self.standing:
            match event:
                case StepCompleted() if split == "train":
                    step = event.step - 1
                case EvaluationCompleted() if event.split == split:
                    step = event.step
                case _:
                    continue
            for row, loss in event.row_losses:
                visits.setdefault(row, []).append((step, loss))
        return visits

    @property
    def started(self) -> RunStarted | None:
        return next(self._of(RunStarted), None)

    @property
    def last_step(self) -> StepCompleted | None:
        return next(self._of(StepCompleted, reverse=True), None)

    @property
    def finished(self) -> RunFinished | None:
        return next(self._of(RunFinished, reverse=True), None)

    def _of(self, kind: type, *, reverse: bool = False) -> Iterator:
        return (event for event in (reversed(self.standing) if reverse else self.standing) if isinstance(event, kind))

    def __repr__(self) -> str:
        return f"History({len(self)} updates, {len(self.evaluations())} evaluations)"


def _step_row(event: StepCompleted) -> dict:
    return {**{name: getattr(event, name) for name in STEP_COLUMNS}, **event.metrics}


def visits_text(visits: list[tuple[int, float]]) -> str:
    """The losses of one row at its last few visits, as a line; empty when there was none."""
    if not visits:
        return ""
    shown = ", ".join(f"{loss:.3f} after update {step}" for step, loss in visits[-6:])
    return f"loss when visited ({len(visits)}×): {'… ' if len(visits) > 6 else ''}{shown}"


def smoothed(values: list[float], factor: float = 0.9) -> list[float]:
    """Exponential moving average without the start's pull towards zero (Adam's bias correction)."""
    average, result = 0.0, []
    for count, value in enumerate(values, start=1):
        average = factor * average + (1 - factor) * value
        result.append(average / (1 - factor**count))
    return result


def decimated(count: int, limit: int) -> list[int]:
    """At most `limit` indices of a series of `count`, evenly spread, the last always among them."""
    if count <= limit:
        return list(range(count))
    return [round(index * (count - 1) / (limit - 1)) for index in range(limit)]
