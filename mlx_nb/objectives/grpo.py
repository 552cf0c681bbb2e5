"""Group relative policy optimization (Shao et al. 2024) and its variants: rewards for the policy's own completions.

Of N completions o_i, with advantage A_i and ratio r = pi / pi_old of a token, the loss of a token

    l = -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta KL(pi || pi_ref)        (equation 3)

of DeepSeekMath is common to all; they differ in what it is averaged over. pi_old are the log-probabilities at which the
tokens were sampled, so that clipping has an effect from the second update on the same completions. All
log-probabilities are at the sampling temperature, before top_p and top_k.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_nb.model.logprobs import TargetInputs, TargetScorer, accurate_logsumexp, accurate_target_logprobs
from mlx_nb.objectives.base import (
    LossSum,
    Metrics,
    Objective,
    k3,
    require_shape,
    sum_by_row,
    with_metrics,
)

# GSPO, section 5.1: ratios of whole completions vary far less than those of tokens.
_SEQUENCE_EPSILON, _SEQUENCE_EPSILON_HIGH = 3e-4, 4e-4


class Completions(NamedTuple):
    """N completions as their S tokens.

    logprob_S    under the policy;  behavior_S  when they were sampled;  reference_S  under the reference (constants;
                 the policy's own where weight_S is 0)
    advantage_S  of the completion that each token is in
    weight_S     1 for a token that counts, 0 for padding and for completions that are masked
    row_S        which completion each token is in, and `length_S` how many counted tokens that one has, at least 1
    completions  N;  max_completion_length  the most tokens that one could have
    """

    logprob_S: mx.array
    behavior_S: mx.array
    reference_S: mx.array
    advantage_S: mx.array
    weight_S: mx.array
    row_S: mx.array
    length_S: mx.array
    completions: int
    max_completion_length: int


class TokenLosses(NamedTuple):
    """Loss of each token, its share in the sum, 1 where its ratio was clipped, and the divisor of the sum."""

    loss_S: mx.array
    share_S: mx.array
    units: mx.array
    clipped_S: mx.array


def completion_objective(
    loss: Callable[[Completions], Any], *, temperature: float, max_completion_length: int
) -> Objective:
    """A loss function gives TokenLosses, or a loss for each token (S,), averaged as in `grpo`."""

    def objective(scorer: TargetScorer, inputs: TargetInputs) -> LossSum:
        logprob_S, entropy_S = scorer.at_targets(inputs, partial(_logprob_and_entropy, temperature=temperature))
        row_S = inputs.line_S
        weight_S = inputs.weight_S * inputs.row_values["counts"][row_S]
        length_S = mx.maximum(sum_by_row(inputs, weight_S), 1.0)[row_S]
        # The target of padding is token 0, which at a low temperature can be e^-88 and less likely: against the
        # policy itself its log-ratios are 0, where exp(log-ratio) would overflow and inf * 0 be NaN.
        own_S = mx.stop_gradient(logprob_S)
        behavior_S, reference_S = (
            mx.where(weight_S > 0, inputs.token_values.get(name, own_S), own_S) for name in ("behavior", "reference")
        )
        completions = Completions(
            logprob_S,
            behavior_S,
            reference_S,
            inputs.row_values["advantage"][row_S],
            weight_S,
            row_S,
            length_S,
            inputs.lines,
            max_completion_length,
        )
        result = loss(completions)
        extra: dict[str, mx.array] = {}
        if isinstance(result, TokenLosses):
            for name in ("loss_S", "share_S", "clipped_S"):
                require_shape(getattr(result, name), logprob_S, f"TokenLosses.{name} must have a number for each token")
        else:
            loss_S, extra = with_metrics(result, logprob_S, "token")
            result = TokenLosses(loss_S, 1 / length_S, _count(completions), mx.zeros_like(loss_S))
        counted_S = result.loss_S * result.share_S * weight_S
        tokens = weight_S.sum()  # 0 if all completions are masked: then there is nothing to measure
        metrics: Metrics = {
            "entropy": ((entropy_S * weight_S).sum(), tokens),
            "clipped": ((result.clipped_S * weight_S).sum(), tokens),
            **{name: ((value_S * weight_S).sum(), tokens) for name, value_S in extra.items()},
        }
        if "reference" in inputs.token_values:
            metrics["kl"] = ((k3(reference_S, logprob_S) * weight_S).sum(), tokens)
        row_total_B = sum_by_row(inputs, mx.stop_gradient(result.loss_S) * weight_S / length_S)
        return LossSum(counted_S.sum(), result.units, metrics, row_total_B, mx.ones_like(row_total_B))

    return objective


def _logprob_and_entropy(logits_SV: mx.array, target_S: mx.array, *, temperature: float) -> tuple[mx.array, mx.array]:
    logits_SV = logits_SV.astype(mx.float32) / temperature
    return accurate_target_logprobs(logits_SV, target_S), _entropy(logits_SV)


def _entropy(logits_SV: mx.array) -> mx.array:
    logprobs_SV = logits_SV - accurate_logsumexp(logits_SV)[:, None]
    return -(mx.exp(logprobs_SV) * logprobs_SV).sum(axis=-1)


def _count(completions: Completions) -> mx.array:
    return mx.array(float(completions.completions))


def clipped(
    *, high: float | None = None
) -> Callable[[Callable[[Completions], tuple[mx.array, mx.array]]], Callable[..., TokenLosses]]:
    """Make a loss of equation 3 from a function that returns (share of each token, divisor of the sum).

    `high` is the default of `epsilon_high` for ratios of tokens; None = as epsilon.
    """

    def averaged(average: Callable[[Completions], tuple[mx.array, mx.array]]) -> Callable[..., TokenLosses]:
        def loss(
            completions: Completions,
            *,
            beta: float = 0.04,
            epsilon: float | None = None,
            epsilon_high: float | None = None,
            importance_sampling_level: str = "token",
        ) -> TokenLosses:
            bounds = _bounds(epsilon, epsilon_high, importance_sampling_level, high)
            loss_S, clipped_S = _token_losses(completions, beta, *bounds, importance_sampling_level)
            share_S, units = average(completions)
            return TokenLosses(loss_S, share_S, units, clipped_S)

        loss.__name__, loss.__doc__ = average.__name__, average.__doc__
        return loss

    return averaged


def _bounds(low: float | None, high: float | None, level: str, token_high: float | None) -> tuple[float, float]:
    """How far a ratio may go below and above 1."""
    if level == "sequence":
        default = _SEQUENCE_EPSILON_HIGH if low is None else low
        low = _SEQUENCE_EPSILON if low is None else low
    else:
        low = 0.2 if low is None else low
        default = low if token_high is None else token_high
    return low, default if high is None else high


def _token_losses(c: Completions, beta: float, low: float, high: float, level: str) -> tuple[mx.array, mx.array]:
    """(loss, clipped) of each token: equation 3 with the k3 estimate of the KL (equation 4)."""
    log_ratio_S = (c.logprob_S - c.behavior_S) * c.weight_S
    if level == "sequence":
        # One ratio for a completion, the geometric mean of those of its tokens (GSPO, Zheng et al. 2025, equation 7).
        sums_B = mx.zeros(c.completions).at[c.row_S].add(log_ratio_S)
        log_ratio_S = sums_B[c.row_S] / c.length_S
    ratio_S = mx.exp(log_ratio_S)
    clipped_ratio_S = mx.clip(ratio_S, 1 - low, 1 + high)
    surrogate_S = mx.minimum(ratio_S * c.advantage_S, clipped_ratio_S * c.advantage_S)
    too_low = (ratio_S < 1 - low) & (c.advantage_S < 0)
    too_high = (ratio_S > 1 + high) & (c.advantage_S > 0)
    loss_S = -surrogate_S
    if beta:
        loss_S = loss_S + beta * k3(c.reference_S, c.logprob_S)
    return loss_S, (too_low | too_high).astype(mx.float32)


@clipped()
def grpo(completions: Completions) -> tuple[mx.array, mx.array]:
    """mean_i mean_t l: every completion weighs the same, so a token of a long one weighs less (equation 3)."""
    return 1 / completions.length_S, _count(completions)


@clipped()
def bnpo(completions: Completions) -> tuple[mx.array, mx.array]:
    """sum_it l / number of tokens: every token weighs the same.

    The sum is over the whole update, so it does not depend on how that is cut into micro-batches; TRL's `bnpo`
    averages the averages of micro-batches, its `dapo` does as here.
    """
    return mx.ones_like(completions.weight_S), completions.weight_S.sum()


@clipped(high=0.28)
def dapo(completions: Completions) -> tuple[mx.array, mx.array]:
    """`bnpo` with the upper clip at 1.28, so that rare tokens may grow (DAPO, Yu et al. 2025, equations 10 and 12)."""
    return mx.ones_like(completions.weight_S), completions.weight_S.sum()


@clipped()
def dr_grpo(completions: Completions) -> tuple[mx.array, mx.array]:
    """sum_it l / (N max_completion_length): a constant, so that length is no advantage (Dr. GRPO, Liu et al. 2025).

    Its advantages are not divided by their deviation (`scale_rewards: none`, the default with this loss).
    """
    return mx.ones_like(completions.weight_S), _count(completions) * completions.max_completion_length
