"""Where an update's batches come from: rows in the plan's order, with the constants that their objective needs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from mlx_nb.config.methods import method_named
from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.examples.batches import (
    BatchPlan,
    TokenBatch,
    evaluation_batches,
    updates_until,
)
from mlx_nb.events import Event, Progress
from mlx_nb.model.lanes import lane_count, lanes_of
from mlx_nb.model.logprobs import TargetInputs, TargetScorer, target_values
from mlx_nb.objectives.kinds import LOSS_KINDS
from mlx_nb.process.interruptible import Interruptible
from mlx_nb.train.reference_logprobs import ReferenceLogprobs
from mlx_nb.train.step import Evaluation, add_metrics, mean_metrics


class Measured(NamedTuple):
    """An evaluation: mean loss, the units it is over, (row, loss) of each row, mean metrics."""

    loss: float
    units: float
    row_losses: tuple[tuple[int, float], ...]
    metrics: dict[str, float]


class Feed(Protocol):
    """What a trainer asks for batches. Positions count micro-batches from 0, across epochs.

    An update has `grad_accumulation_steps` of them, or what is left of the epoch: it never reaches into the next.
    `own_code` is entered while a function of the person's own is running: an interrupt may strike right there.
    """

    plan: BatchPlan
    batches_per_epoch: int
    own_code: Interruptible

    @property
    def ready(self) -> bool:
        """Whether `batches` can be asked for; if not, `prepare` comes first."""

    def prepare(self, step: int, first: int) -> Generator[Event, None, Event]:
        """Make the batches from `first` on. Closing it half-way leaves everything as before."""

    def rows(self, first: int) -> tuple[int, ...]:
        """The rows of the next update, ready or not, without making its batches."""

    def batches(self, first: int) -> list[TokenBatch]:
        """The batches of the next update."""

    def used(self, first: int) -> int:
        """The update from `first` on is done. Where the next one begins."""

    def drop(self, first: int) -> int:
        """Leave out the next batches, from `first` on. Where the next update begins."""

    def updates_until(self, first: int, epochs: float) -> int:
        """Updates from `first` until `epochs` passes over the rows are done, 0 where they are."""

    def metrics(self) -> dict[str, float]:
        """What was measured besides the loss, for the next update."""

    def measure(
        self, step: int, split: str, examples: Sequence[Any], limit: int, loss_of: Callable[[TokenBatch], Evaluation]
    ) -> Generator[Event, None, Measured]:
        """Loss and metrics of the same `limit` batches (-1 = all) of `examples` each time, with Progress on the way."""

    def log_ratios(self) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(row, tokens, log(policy now / policy that sampled)) of each completion of the last rollout, used or not."""

    def snapshot(self) -> dict[str, Any]:
        """What `batches` depends on besides the position: {"arrays": {name: array}, "state": plain values}."""

    def restore(self, arrays: dict[str, mx.array], state: Any, first: int) -> None:
        """Go back to a snapshot, as far as it is of the batches from `first` on."""


class RowFeed:
    """Batches of rows: conversations, texts, pairs of answers, labeled answers."""

    own_code = Interruptible()  # which is never entered
    ready = True

    def __init__(
        self,
        config: RunConfig,
        examples: Sequence[Any],
        *,
        scorer: TargetScorer,
        reference: ReferenceLogprobs | None,
        width_multiple: int,
    ) -> None:
        self._config = config
        self._examples = examples
        self._kind = LOSS_KINDS[method_named(config.method).rows]
        self._scorer = scorer
        self._reference = reference
        self._kl_reference = reference if self._kind.mismatched else None
        self._width_multiple = width_multiple
        spread = self._kind.spread
        labels = None if spread is None else [spread(example) for example in examples]
        self.plan = BatchPlan([example.length for example in examples], config.batch_size, config.seed, labels)
        self.batches_per_epoch = self.plan.batches_per_epoch

    def prepare(self, step: int, first: int) -> Generator[Event, None, Event]:
        """Never called."""
        raise AssertionError("rows are always ready")
        yield

    def rows(self, first: int) -> tuple[int, ...]:
        """The rows of the next update, without making its batches."""
        return tuple(example.row for group in self._next(first) for example in group)

    def batches(self, first: int) -> list[TokenBatch]:
        """The batches of the next update, one for each micro-batch."""
        groups = self._next(first)
        return self._collate(groups, _kl_estimate(self._mismatched_sum(group) for group in groups))

    def _next(self, first: int) -> list[list[Any]]:
        chosen = self.plan.update(first, self._config.grad_accumulation_steps)
        return [[self._examples[position] for position in positions] for positions in chosen]

    def used(self, first: int) -> int:
        """One update, one set of micro-batches."""
        return first + len(self.plan.update(first, self._config.grad_accumulation_steps))

    drop = used

    def updates_until(self, first: int, epochs: float) -> int:
        """Updates from `first` until `epochs` passes over the rows are done, 0 where they are."""
        return updates_until(epochs, self.batches_per_epoch, self._config.grad_accumulation_steps, first)

    def metrics(self) -> dict[str, float]:
        """Nothing is measured but the loss."""
        return {}

    def measure(
        self, step: int, split: str, examples: Sequence[Any], limit: int, loss_of: Callable[[TokenBatch], Evaluation]
    ) -> Generator[Event, None, Measured]:
        """Loss and metrics of a fixed set of rows."""
        lengths = [example.length for example in examples]
        chosen = evaluation_batches(lengths, self._config.batch_size, limit, self._config.seed)
        groups = [[examples[position] for position in positions] for positions in chosen]
        sums = []
        if self._kl_reference is not None:
            # Once over all rows: estimated and cut at 0 batch by batch, it would depend on their size.
            for number, group in enumerate(groups):
                yield Progress(step, f"{split} kl", number, len(groups))
                sums.append(self._mismatched_sum(group))
        kl_estimate = _kl_estimate(sums)
        total = units = 0.0
        row_losses: list[tuple[int, float]] = []
        metrics: dict[str, tuple[float, float]] = {}
        for number, group in enumerate(groups):
            yield Progress(step, f"{split} loss", number, len(groups))
            (batch,) = self._collate([group], kl_estimate)
            measured = loss_of(batch)
            total, units = total + measured.total, units + measured.units
            add_metrics(metrics, measured.metrics)
            row_losses += zip(batch.rows, measured.row_losses)
        return Measured(total / units, units, tuple(row_losses), mean_metrics(metrics))

    def log_ratios(self) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """Nothing is sampled."""
        return []

    def _collate(self, groups: list[list[Any]], kl_estimate: float) -> list[TokenBatch]:
        batches = [self._kind.collate(group, self._width_multiple) for group in groups]
        if self._reference is not None:
            batches = [self._reference.fill(batch) for batch in batches]
        if self._kind.mismatched:
            batches = [_with_row_value(batch, "kl_estimate", kl_estimate) for batch in batches]
        return batches

    def _mismatched_sum(self, group: list[Any]) -> tuple[float, int]:
        """Sum of log(pi / pi_ref) over the mismatched answers of labeled rows, and their number; (0, 0) of others."""
        answers_of_others = self._kind.mismatched
        if self._kl_reference is None or answers_of_others is None:
            return 0.0, 0
        if (mismatched := answers_of_others(group, self._width_multiple)) is None:
            return 0.0, 0
        parts = lanes_of(self._kl_reference.fill(mismatched), lane_count())
        return float(sum(ratio_S.sum() for ratio_S in target_values(parts, self._log_ratio))), len(group)

    def _log_ratio(self, inputs: TargetInputs) -> mx.array:
        return (self._scorer.logprobs(inputs) - inputs.token_values["reference"]) * inputs.weight_S

    def snapshot(self) -> dict[str, Any]:
        """The position is all there is."""
        return {"arrays": {}, "state": None}

    def restore(self, arrays: dict[str, mx.array], state: Any, first: int) -> None:
        """Nothing to go back to."""


def _kl_estimate(sums: Iterable[tuple[float, int]]) -> float:
    """z0 of KTO: mean log(pi / pi_ref) of the mismatched answers, at least 0; from their sums and numbers."""
    total = count = 0.0
    for ratios, answers in sums:
        total, count = total + ratios, count + answers
    return max(0.0, total / count) if count else 0.0


def _with_row_value(batch: TokenBatch, name: str, value: float) -> TokenBatch:
    values = np.full(len(batch.rows), value, np.float32)
    return batch._replace(row_values={**batch.row_values, name: values})
