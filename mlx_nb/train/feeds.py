"""Where an update's batches come from: rows in the plan's order, with the constants that their objective needs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_nb.config import RunConfig
from mlx_nb.data.batches import BatchPlan, TokenBatch, evaluation_batches, pad, pad_labelled, pad_mismatched, pad_pairs
from mlx_nb.events import Event
from mlx_nb.methods import method_named
from mlx_nb.model.logprobs import TargetScorer, target_inputs
from mlx_nb.train.reference import ReferenceLogprobs

_COLLATE: dict[str, Callable[..., TokenBatch]] = {"tokens": pad, "pairs": pad_pairs, "labels": pad_labelled}


class Feed(Protocol):
    """What a trainer asks for batches. Positions count micro-batches from 0, across epochs."""

    batches_per_epoch: int
    updates_per_batch: int

    @property
    def ready(self) -> bool:
        """Whether `batches` can be asked for; if not, `prepare` comes first."""

    def prepare(self, step: int, first: int) -> Generator[Event, None, Event]:
        """Make the batches from `first` on. Closing it half-way leaves everything as before."""

    def batches(self, first: int) -> list[TokenBatch]:
        """The batches of the next update."""

    def used(self) -> int:
        """The update is done. How many micro-batches the run has moved on by."""

    def drop(self) -> int:
        """Leave out the next batches. How many the run has moved on by."""

    def metrics(self) -> dict[str, float]:
        """What was measured besides the loss, for the next update."""

    def snapshot(self) -> dict[str, Any]:
        """What `batches` depends on besides the position: {"arrays": {name: array}, "state": plain values}."""

    def restore(self, arrays: dict[str, mx.array], state: Any) -> None:
        """Go back to a snapshot."""


class RowFeed:
    """Batches of rows: conversations, texts, pairs of answers, labelled answers."""

    updates_per_batch = 1
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
        self._rows = method_named(config.method).rows
        self._scorer = scorer
        self._reference = reference
        self._width_multiple = width_multiple
        self._plan = BatchPlan([example.length for example in examples], config.batch_size, config.seed)
        self.batches_per_epoch = self._plan.batches_per_epoch

    def prepare(self, step: int, first: int) -> Generator[Event, None, Event]:
        raise AssertionError("rows are always ready")
        yield

    def batches(self, first: int) -> list[TokenBatch]:
        """The batches of the next update, one for each micro-batch."""
        count = self._config.grad_accumulation_steps
        chosen = [self._plan.batch(first + index) for index in range(count)]
        return self._collate([[self._examples[position] for position in positions] for positions in chosen])

    def used(self) -> int:
        """One update, one set of micro-batches."""
        return self._config.grad_accumulation_steps

    drop = used

    def metrics(self) -> dict[str, float]:
        """Nothing is measured but the loss."""
        return {}

    def evaluation(self, examples: Sequence[Any], limit: int) -> Iterator[TokenBatch]:
        """The same rows at every evaluation."""
        lengths = [example.length for example in examples]
        for positions in evaluation_batches(lengths, self._config.batch_size, limit, self._config.seed):
            yield from self._collate([[examples[position] for position in positions]])

    def _collate(self, groups: list[list[Any]]) -> list[TokenBatch]:
        batches = [_COLLATE[self._rows](group, self._width_multiple) for group in groups]
        if self._reference is not None:
            batches = [self._reference.fill(batch) for batch in batches]
        if self._rows == "labels":
            estimate = self._kl_estimate(groups)
            batches = [_with_row_value(batch, "kl_estimate", estimate) for batch in batches]
        return batches

    def _kl_estimate(self, groups: list[list[Any]]) -> float:
        """z0 of KTO: mean log(pi / pi_ref) of mismatched answers over the whole update, at least 0."""
        if self._reference is None:
            return 0.0
        total = count = 0.0
        for group in groups:
            mismatched = pad_mismatched(group, self._width_multiple)
            if mismatched is None:
                continue
            inputs = target_inputs(self._reference.fill(mismatched))
            ratio_S = (self._scorer.logprobs(inputs) - inputs.token_values["reference"]) * inputs.weight_S
            total += float(np.array(ratio_S.sum()))
            count += len(group)
        return max(0.0, total / count) if count else 0.0

    def snapshot(self) -> dict[str, Any]:
        """The position is all there is."""
        return {"arrays": {}, "state": None}

    def restore(self, arrays: dict[str, mx.array], state: Any) -> None:
        """Nothing to go back to."""


def _with_row_value(batch: TokenBatch, name: str, value: float) -> TokenBatch:
    values = np.full(len(batch.rows), value, np.float32)
    return batch._replace(row_values={**batch.row_values, name: values})
