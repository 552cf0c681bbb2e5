"""What an objective is: a pure function from a model and a batch to a sum and the units it is a sum over.

A method is written as a loss function over what its kind of rows gives, and `objectives.binding` makes an objective of
it, with the sums, the units and the metrics of that kind:

    tokens    Targets           -> (S,) loss of each target                (objectives/sft.py)
    pairs     PairLogprobs      -> (P,) loss of each pair                  (objectives/preference.py)
    labels    LabeledLogprobs  -> (B,) loss of each answer                (objectives/kto.py)
    prompts   Completions       -> (S,) loss of each token of a completion (objectives/grpo.py)

Those of tokens, pairs and labels may also return `(losses, {name: values})`: metrics of their own, one value for each
loss. That of prompts may return `TokenLosses`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

from mlx_nb.errors import ConfigError
from mlx_nb.events import EvaluationCompleted, StepCompleted
from mlx_nb.model.logprobs import TargetInputs, TargetScorer

Metrics = dict[str, tuple[mx.array, mx.array]]

# A metric with such a name would replace a column in the history of a run.
_COLUMNS = frozenset(one.name for event in (StepCompleted, EvaluationCompleted) for one in fields(event))


class LossSum(NamedTuple):
    """A loss before division, so that micro-batches of any size add up to one big batch.

    total    () float32, sum of the loss over the units
    units    () float32, number of units (for SFT: weighted target tokens)
    metrics  {name: (sum, divisor)}, each () float32
    row_total_R, row_units_R  (R,) float32, the same two sums for each row of the data in the batch
    """

    total: mx.array
    units: mx.array
    metrics: Metrics
    row_total_R: mx.array
    row_units_R: mx.array


def joined(parts: Sequence[LossSum]) -> LossSum:
    """The sums of one batch from those of its parts, in the order of its rows."""
    if len(parts) == 1:
        return parts[0]
    metrics: Metrics = {}
    for part in parts:
        for name, (total, divisor) in part.metrics.items():
            before = metrics.get(name)
            metrics[name] = (total, divisor) if before is None else (before[0] + total, before[1] + divisor)
    return LossSum(
        mx.stack([part.total for part in parts]).sum(),
        mx.stack([part.units for part in parts]).sum(),
        metrics,
        mx.concatenate([part.row_total_R for part in parts]),
        mx.concatenate([part.row_units_R for part in parts]),
    )


class Objective(Protocol):
    """`(scorer, inputs) -> LossSum`; pure, no state, no randomness but the model's own dropout."""

    def __call__(self, scorer: TargetScorer, inputs: TargetInputs) -> LossSum:
        """The summed loss of a batch, with its units and metrics."""


def sum_by_row(inputs: TargetInputs, value_S: mx.array) -> mx.array:
    """(B,) the sum of the values of each row's targets. Differentiable."""
    return mx.zeros(inputs.lines).at[inputs.line_S].add(value_S)


def with_metrics(result: Any, like: mx.array, each: str) -> tuple[mx.array, dict[str, mx.array]]:
    """Validate the return value of a loss function: losses, one for `each` and shaped like `like`, and its own metrics.

    Raises ConfigError for anything else, also for a metric named like a column of the history.
    """
    losses, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    losses = require_shape(losses, like, f"the loss function must return one loss for each {each}")
    if not isinstance(metrics, dict):
        raise ConfigError(f"beside its losses the loss function may return {{name: values}}, not {_found(metrics)}.")
    for name, values in metrics.items():
        if name in _COLUMNS:
            raise ConfigError(f"the metric {name!r} has the name of a column of the history. Give it another name.")
        require_shape(values, like, f"the metric {name!r} must have one value for each {each}")
    return losses, metrics


def require_shape(value: Any, like: mx.array, promise: str) -> mx.array:
    """The value, checked to be an array shaped like `like`. Raises ConfigError with the promise and what was found."""
    if isinstance(value, mx.array) and value.shape == like.shape:
        return value
    raise ConfigError(f"{promise}: an array of shape {like.shape}, not {_found(value)}.")


def _found(value: Any) -> str:
    if isinstance(value, mx.array):
        return f"one of shape {value.shape}"
    return "None" if value is None else f"a value of type {type(value).__name__}"


def k3(reference: mx.array, policy: mx.array) -> mx.array:
    """Estimate of KL(policy || reference) from log-probabilities of the policy's own samples (Schulman 2020, k3).

    exp(r - p) - (r - p) - 1, never negative and unbiased on the policy's own samples.
    """
    difference = reference - policy
    return mx.exp(difference) - difference - 1


def k2(reference: mx.array, policy: mx.array) -> mx.array:
    """(log(policy / reference))^2 / 2: to second order the KL in either direction (Schulman 2020, k2).

    For tokens that the policy did not sample, for which the exponential in `k3` is uninformative and can be huge.
    """
    return mx.square(policy - reference) / 2
