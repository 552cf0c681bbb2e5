"""What a comparison of runs found: paired differences, row by row, and the answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlx_nb.data.examples.imitation import TokenizedExample
from mlx_nb.errors import CommandError
from mlx_nb.rollouts.intervals import Estimate
from mlx_nb.run.run import Run

LOSS = "loss"


@dataclass(frozen=True)
class RowChange:
    """A row with its loss in nats per target token before and after; NaN for a prompt, which has no target."""

    row: int
    before: float
    after: float

    @property
    def change(self) -> float:
        """How much higher the loss is after: positive is worse."""
        return self.after - self.before


@dataclass(frozen=True)
class Difference:
    """`after` minus `before`, two of the names of a comparison.

    estimates  of the loss (per token) and of each metric, with 95% intervals over the rows
    rows       the rows, those that became worse first, by loss or else by the first metric
    """

    before: str
    after: str
    estimates: dict[str, Estimate]
    rows: list[RowChange]

    @property
    def same(self) -> bool:
        """Whether no number of any row differs."""
        return all(not row.change or math.isnan(row.change) for row in self.rows) and not any(
            one.value for one in self.estimates.values()
        )

    @property
    def counts(self) -> tuple[int, int]:
        """How many rows have a higher loss, and how many a lower one."""
        changes = [row.change for row in self.rows]
        return sum(change > 0 for change in changes), sum(change < 0 for change in changes)


@dataclass(eq=False)
class Comparison:
    """What `compare` found.

    names        of the runs, after `base` if that takes part
    differences  of each pair of them, the earlier one as `before`
    answers      {name: {row: answer}} to the rows that were answered
    references   {row: the row's own answer}, prompts {row: what was asked}, of the same rows
    scores       {metric: {name: {row: value}}}
    notes        what to keep in mind
    groups       {row: its group}, of rows that are in groups; each has an estimate of its own
    """

    runs: list[Run]
    names: list[str]
    split: str  # or what the rows are
    examples: dict[int, TokenizedExample]
    token_losses: dict[str, dict[int, np.ndarray]]
    differences: list[Difference]
    answers: dict[str, dict[int, str]] = field(default_factory=dict)
    references: dict[int, Any] = field(default_factory=dict)
    prompts: dict[int, Any] = field(default_factory=dict)
    scores: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    groups: dict[int, str] = field(default_factory=dict)

    def difference(self, before: str, after: str) -> Difference:
        """The difference of two names. Raises CommandError for a pair that was not compared."""
        for one in self.differences:
            if (one.before, one.after) == (before, after):
                return one
        known = ", ".join(f"{one.before} and {one.after}" for one in self.differences)
        raise CommandError(f"{before} and {after} were not compared, in this order. There are {known}.")
