"""Where a run is, and the rows that it trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainerState:
    """Where a run is. `step` counts updates done, `seconds` the time in them.

    `learned_step` is the last update that had something to learn from, 0 = none.
    `recent_losses` are (length class, loss) of the last updates, `spikes` how many of the last were spikes in a row.
    `batches` counts micro-batches of the run's batch size; at the end of an epoch it is a multiple of those in one.
    """

    step: int = 0
    batches: int = 0
    tokens: int = 0
    target_tokens: float = 0.0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    validated_step: int | None = None
    learned_step: int = 0
    scheduled_best: float | None = None
    evaluations_without_best: int = 0
    recent_losses: list[tuple[int, float]] = field(default_factory=list)
    spikes: int = 0


@dataclass(frozen=True)
class TrainerExamples:
    """The rows of a run as the examples of its method, tokenized. `valid` and `test` may be empty."""

    train: Sequence[Any]
    valid: Sequence[Any] = ()
    test: Sequence[Any] = ()
