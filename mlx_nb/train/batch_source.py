"""Makes batches from rows for updates and evaluations, with the constants that the objective needs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from mlx_nb.config.methods import method_named
from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.examples.batches import TokenBatch, evaluation_batches
from mlx_nb.events import Event, Progress
from mlx_nb.model.lanes import lane_count, lanes_of
from mlx_nb.model.logprobs import TargetInputs, TargetScorer, target_values
from mlx_nb.objectives.kinds import LOSS_KINDS
from mlx_nb.train.packing import packed_as_set
from mlx_nb.train.reference_logprobs import ReferenceLogprobs
from mlx_nb.train.step import Evaluation, add_metrics, mean_metrics


class Measured(NamedTuple):
    """The result of an evaluation: mean loss, units, (row, loss) of each row, mean metrics, units of each row.

    The rows are in the order in which they were measured; a split text has one entry for each piece.
    """

    loss: float
    units: float
    row_losses: tuple[tuple[int, float], ...]
    metrics: dict[str, float]
    row_units: tuple[float, ...]


class BatchSource(Protocol):
    """A source of batches for updates and evaluations: rows, or sampled completions of prompts."""

    def batches(self, groups: Sequence[Sequence[Any]]) -> list[TokenBatch]:
        """The batches of an update, one per micro-batch."""

    def measure(
        self, step: int, split: str, examples: Sequence[Any], limit: int, loss_of: Callable[[TokenBatch], Evaluation]
    ) -> Generator[Event, None, Measured]:
        """Measure loss and metrics on a fixed set of `limit` batches (-1 = all) of `examples`, yielding Progress."""


class RowBatches:
    """Batches of rows: conversations, texts, preference pairs or labeled answers."""

    def __init__(
        self, config: RunConfig, *, scorer: TargetScorer, reference: ReferenceLogprobs | None, width_multiple: int
    ) -> None:
        self._config = config
        self._kind = LOSS_KINDS[method_named(config.method).row_kind]
        self._scorer = scorer
        self._reference = reference
        self._kl_reference = reference if self._kind.mismatched else None
        self._width_multiple = width_multiple

    def batches(self, groups: Sequence[Sequence[Any]]) -> list[TokenBatch]:
        """The padded batches of an update, with the constants that the objective needs."""
        return self._collate(groups, _kl_estimate(self._mismatched_sum(group) for group in groups))

    def measure(
        self, step: int, split: str, examples: Sequence[Any], limit: int, loss_of: Callable[[TokenBatch], Evaluation]
    ) -> Generator[Event, None, Measured]:
        """Measure loss and metrics on a fixed set of rows."""
        lengths = [example.length for example in examples]
        chosen = evaluation_batches(lengths, self._config.batch_size, limit, self._config.seed)
        groups = [[examples[position] for position in positions] for positions in chosen]
        sums = []
        if self._kl_reference is not None:
            # Estimated once over all rows. An estimate per batch, cut at 0, would depend on the batch size.
            for number, group in enumerate(groups):
                yield Progress(step, f"{split} kl", number, len(groups))
                sums.append(self._mismatched_sum(group))
        kl_estimate = _kl_estimate(sums)
        total = units = 0.0
        row_losses: list[tuple[int, float]] = []
        row_units: list[float] = []
        metrics: dict[str, tuple[float, float]] = {}
        for number, group in enumerate(groups):
            yield Progress(step, f"{split} loss", number, len(groups))
            (batch,) = self._collate([group], kl_estimate)
            measured = loss_of(batch)
            total, units = total + measured.total, units + measured.units
            add_metrics(metrics, measured.metrics)
            row_losses += zip(batch.rows, measured.row_losses)
            row_units += measured.row_units
        return Measured(total / units, units, tuple(row_losses), mean_metrics(metrics), tuple(row_units))

    def _collate(self, groups: Sequence[Sequence[Any]], kl_estimate: float) -> list[TokenBatch]:
        batches = [self._kind.collate(group, self._width_multiple) for group in groups]
        if self._reference is not None:
            batches = [self._reference.fill(batch) for batch in batches]
        batches = [self._packed(batch) for batch in batches]
        if self._kind.mismatched:
            batches = [_with_row_value(batch, "kl_estimate", kl_estimate) for batch in batches]
        return batches

    def _packed(self, batch: TokenBatch) -> TokenBatch:
        return packed_as_set(batch, self._config.packing, self._scorer)

    def _mismatched_sum(self, group: Sequence[Any]) -> tuple[float, int]:
        """Sum of log(pi / pi_ref) over the mismatched answers of labeled rows, and their number."""
        answers_of_others = self._kind.mismatched
        if self._kl_reference is None or answers_of_others is None:
            return 0.0, 0
        if (mismatched := answers_of_others(group, self._width_multiple)) is None:
            return 0.0, 0
        parts = lanes_of(self._packed(self._kl_reference.fill(mismatched)), lane_count())
        return float(sum(ratio_S.sum() for ratio_S in target_values(parts, self._log_ratio))), len(group)

    def _log_ratio(self, inputs: TargetInputs) -> mx.array:
        return (self._scorer.logprobs(inputs) - inputs.token_values["reference"]) * inputs.weight_S


def _kl_estimate(sums: Iterable[tuple[float, int]]) -> float:
    """z0 of KTO: the mean log(pi / pi_ref) of mismatched answers, at least 0, from (sum, count) pairs."""
    total = count = 0.0
    for ratios, answers in sums:
        total, count = total + ratios, count + answers
    return max(0.0, total / count) if count else 0.0


def _with_row_value(batch: TokenBatch, name: str, value: float) -> TokenBatch:
    values = np.full(len(batch.rows), value, np.float32)
    return batch._replace(row_values={**batch.row_values, name: values})
