"""The counters of a run, and the tokenized rows that it trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainerState:
    """The counters of a run. `step` is the number of finished updates, `seconds` the time spent in them.

    `learned_step` is the last update with a learning signal (0 = none).
    `best_loss` is the validation loss of `best_step`, the best one by the metric `best_by` (empty = by the loss), whose
    `best_score` is the metric, negated where higher is better. `scheduled_best` is a score too, or a loss.
    `recent_losses` has (length class, loss) of recent updates, `spikes` the number of consecutive spikes at the end.
    `batches` counts micro-batches of the run's batch size; at the end of an epoch it is a multiple of the batches per
    epoch.
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
    best_by: str = ""
    best_score: float | None = None
    recent_losses: list[tuple[int, float]] = field(default_factory=list)
    spikes: int = 0


@dataclass(frozen=True)
class TrainerExamples:
    """The tokenized examples of a run. `valid` and `test` may be empty."""

    train: Sequence[Any]
    valid: Sequence[Any] = ()
    test: Sequence[Any] = ()
