"""Plans which rows each update uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_nb.config.methods import method_named
from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.examples.batches import BatchPlan, updates_until
from mlx_nb.objectives.kinds import LOSS_KINDS


class UpdatePlan:
    """The rows of each update. Positions count micro-batches from 0, across epochs.

    An update has `grad_accumulation_steps` micro-batches, or fewer at the end of an epoch: it never crosses epochs.
    """

    def __init__(self, config: RunConfig, examples: Sequence[Any]) -> None:
        spread = LOSS_KINDS[method_named(config.method).row_kind].spread
        labels = None if spread is None else [spread(example) for example in examples]
        self.batches = BatchPlan([example.length for example in examples], config.batch_size, config.seed, labels)
        self._accumulated = config.grad_accumulation_steps
        self._examples = examples

    @property
    def tokens_per_update(self) -> float:
        """The mean number of tokens of the updates of an epoch."""
        tokens: int = sum(example.length for example in self._examples)
        return tokens / self.updates_until(1.0, 0)

    def examples(self, first: int) -> list[list[Any]]:
        """The examples of each micro-batch of the update that begins at `first`."""
        chosen = self.batches.update(first, self._accumulated)
        return [[self._examples[position] for position in positions] for positions in chosen]

    def rows(self, first: int) -> tuple[int, ...]:
        """The row numbers of that update."""
        return tuple(example.row for examples in self.examples(first) for example in examples)

    def after(self, first: int) -> int:
        """The micro-batch at which the next update begins."""
        return first + len(self.batches.update(first, self._accumulated))

    def updates_until(self, epochs: float, first: int) -> int:
        """Number of updates from `first` until `epochs` passes over the rows are done."""
        return updates_until(epochs, self.batches.batches_per_epoch, self._accumulated, first)
