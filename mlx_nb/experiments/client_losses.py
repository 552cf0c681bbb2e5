"""The losses of the low-level client: each a sum over target tokens, as tinker defines them, from log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_nb.errors import CommandError, did_you_mean
from mlx_nb.model.logprobs import TargetInputs, TargetScorer, target_logprobs
from mlx_nb.objectives.base import LossSum, Objective

WEIGHTS, LOGPROBS, ADVANTAGES = "weights", "logprobs", "advantages"
_LOW, _HIGH = "clip_low_threshold", "clip_high_threshold"


class Loss(NamedTuple):
    """A loss: what it needs of a datum, its options with defaults, and `(logprob_S, *needed, **options) -> loss_S`."""

    needs: tuple[str, ...]
    options: Mapping[str, float]
    function: Callable[..., mx.array]


def _cross_entropy(logprob_S: mx.array) -> mx.array:
    return -logprob_S


def _importance_sampling(logprob_S: mx.array, sampled_S: mx.array, advantage_S: mx.array) -> mx.array:
    return -mx.exp(logprob_S - sampled_S) * advantage_S


def _ppo(logprob_S: mx.array, sampled_S: mx.array, advantage_S: mx.array, **clip: float) -> mx.array:
    ratio_S = mx.exp(logprob_S - sampled_S)
    clipped_S = mx.clip(ratio_S, clip[_LOW], clip[_HIGH])
    return -mx.minimum(ratio_S * advantage_S, clipped_S * advantage_S)


def _cispo(logprob_S: mx.array, sampled_S: mx.array, advantage_S: mx.array, **clip: float) -> mx.array:
    clipped_S = mx.clip(mx.exp(logprob_S - sampled_S), clip[_LOW], clip[_HIGH])
    return -mx.stop_gradient(clipped_S) * advantage_S * logprob_S


def _dro(logprob_S: mx.array, sampled_S: mx.array, advantage_S: mx.array, *, beta: float) -> mx.array:
    return -(logprob_S * advantage_S - 0.5 * beta * mx.square(logprob_S - sampled_S))


def _linear(logprob_S: mx.array, slope_S: mx.array) -> mx.array:
    return slope_S * logprob_S


_CLIP = {_LOW: 0.8, _HIGH: 1.2}
_POLICY = (LOGPROBS, ADVANTAGES)
LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss((), {}, _cross_entropy),
    "importance_sampling": Loss(_POLICY, {}, _importance_sampling),
    "ppo": Loss(_POLICY, _CLIP, _ppo),
    "cispo": Loss(_POLICY, _CLIP, _cispo),
    "dro": Loss(_POLICY, {"beta": 0.05}, _dro),
}


LINEAR = Loss(("slopes",), {}, _linear)  # has the gradient of any loss whose slopes by log-probability are given


def loss_named(name: str, config: Mapping[str, Any] | None) -> tuple[Loss, dict[str, float]]:
    """A loss with its options. Raises CommandError for an unknown name or option."""
    if name not in LOSSES:
        raise CommandError(f"no loss {name!r}.{did_you_mean(str(name), LOSSES)} There are {', '.join(LOSSES)}.")
    loss = LOSSES[name]
    if unknown := [key for key in config or {} if key not in loss.options]:
        takes = ", ".join(loss.options) or "no options"
        raise CommandError(f"loss_fn_config: {name} has no option {unknown[0]!r}. It takes {takes}.")
    return loss, {**loss.options, **{key: float(value) for key, value in (config or {}).items()}}


def objective_of(loss: Loss, options: Mapping[str, float]) -> Objective:
    """The summed loss of a batch, weighted by its mask. As the rows' losses it gives each target's log-probability."""

    def objective(scorer: TargetScorer, inputs: TargetInputs) -> LossSum:
        def at_target(logits_SV: mx.array, target_S: mx.array, *values_S: mx.array) -> tuple[mx.array, ...]:
            logprob_S = target_logprobs(logits_SV, target_S)
            return loss.function(logprob_S, *values_S, **options), logprob_S

        loss_S, logprob_S = scorer.at_targets(inputs, at_target, *(inputs.token_values[name] for name in loss.needs))
        return _sums((loss_S * inputs.weight_S).sum(), logprob_S)

    return objective


def _sums(total: mx.array, logprob_S: mx.array) -> LossSum:
    return LossSum(total, mx.array(1.0), {}, mx.stop_gradient(logprob_S), mx.ones_like(logprob_S))
