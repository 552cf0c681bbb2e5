"""What an objective is: a pure function from a model and a batch to a sum and the units it is a sum over."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import mlx.core as mx

from mlx_nb.model.logprobs import TargetInputs, TargetScorer


class LossSum(NamedTuple):
    """A loss before division, so that micro-batches of any size add up to one big batch.

    total    () float32, sum of the loss over the units
    units    () float32, how many units (for SFT: weighted target tokens)
    metrics  {name: () sum over the same units}
    row_total_B, row_units_B  (B,) float32, the same two sums row by row
    """

    total: mx.array
    units: mx.array
    metrics: dict[str, mx.array]
    row_total_B: mx.array
    row_units_B: mx.array


class Objective(Protocol):
    """`(scorer, inputs) -> LossSum`; pure, no state, no randomness but the model's own dropout."""

    def __call__(self, scorer: TargetScorer, inputs: TargetInputs) -> LossSum: ...
