"""Pairs of answers to one prompt, one chosen and one rejected: the common part of DPO, CPO and ORPO.

Log-probabilities are of whole answers, sum_t log p(y_t | x, y_<t) over the trained tokens, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_nb.model.logprobs import TargetInputs, TargetScorer
from mlx_nb.objectives.base import LossSum, Metrics, Objective, k2, sum_by_row, with_metrics


class PairLogprobs(NamedTuple):
    """P pairs, each field (P,): log-probabilities under policy and reference, trained tokens, and requested margin.

    Those of the reference are constants, and 0 for a method without one. `margin_P` is the row's `margin`, else 0.
    """

    chosen_P: mx.array
    rejected_P: mx.array
    reference_chosen_P: mx.array
    reference_rejected_P: mx.array
    chosen_length_P: mx.array
    rejected_length_P: mx.array
    margin_P: mx.array


def pair_objective(loss: Callable[[PairLogprobs], Any], beta: float) -> Objective:
    """Wrap a loss function that returns one loss per pair. Units are pairs, weighted by their `preference_score`.

    The batch holds the P chosen answers and then the P rejected ones. `beta` scales the displayed implicit rewards.
    """

    def objective(scorer: TargetScorer, inputs: TargetInputs) -> LossSum:
        logprob_S = scorer.logprobs(inputs)
        reference_S = inputs.token_values.get("reference")
        chosen_P, rejected_P = _halves(inputs, logprob_S)
        zeros_P = mx.zeros_like(chosen_P)
        reference = (zeros_P, zeros_P) if reference_S is None else _halves(inputs, reference_S)
        lengths = _halves(inputs, mx.ones_like(logprob_S))
        weight_P = inputs.row_values["weight"]
        pairs = PairLogprobs(chosen_P, rejected_P, *reference, *lengths, inputs.row_values["margin"])
        loss_P, extra = with_metrics(loss(pairs), chosen_P, "pair")
        values = {**_measured(pairs, beta), **extra}
        metrics: Metrics = {name: ((value_P * weight_P).sum(), weight_P.sum()) for name, value_P in values.items()}
        if reference_S is not None:
            metrics["kl"] = ((k2(reference_S, logprob_S) * inputs.weight_S).sum(), inputs.weight_S.sum())
        return LossSum(
            (loss_P * weight_P).sum(), weight_P.sum(), metrics, mx.stop_gradient(loss_P) * weight_P, weight_P
        )

    return objective


def _halves(inputs: TargetInputs, value_S: mx.array) -> tuple[mx.array, mx.array]:
    sum_B = sum_by_row(inputs, value_S * inputs.weight_S)
    pairs = sum_B.shape[0] // 2
    return sum_B[:pairs], sum_B[pairs:]


def _measured(pairs: PairLogprobs, beta: float) -> dict[str, mx.array]:
    """Metrics of implicit rewards: beta * log(policy / reference) is the reward that a policy implies (DPO, 4)."""
    chosen, rejected = log_ratios(pairs)
    logprob_chosen, logprob_rejected = per_token(pairs)
    return {
        **reward_metrics(beta * chosen, beta * rejected),
        "logprob_chosen": logprob_chosen,
        "logprob_rejected": logprob_rejected,
    }


def reward_metrics(chosen_P: mx.array, rejected_P: mx.array) -> dict[str, mx.array]:
    """The metrics of a loss's implicit rewards; a loss with other rewards returns its own."""
    return {
        "accuracy": (chosen_P > rejected_P).astype(mx.float32),
        "margin": chosen_P - rejected_P,
        "reward_chosen": chosen_P,
        "reward_rejected": rejected_P,
    }


def log_sigmoid(x: mx.array) -> mx.array:
    """log(1 / (1 + e^-x)) without overflow."""
    return -mx.logaddexp(mx.zeros_like(x), -x)


def smoothed_log_sigmoid(x: mx.array, label_smoothing: float) -> mx.array:
    """-(1 - epsilon) log sigmoid(x) - epsilon log sigmoid(-x): assumes that a share epsilon of labels is flipped."""
    return -(1 - label_smoothing) * log_sigmoid(x) - label_smoothing * log_sigmoid(-x)


def log_one_minus_exp(x: mx.array) -> mx.array:
    """log(1 - e^x) for x < 0, accurate near both ends (Maechler 2012, equation 7)."""
    near_zero = x > -0.6931472
    # Each branch receives only arguments at which it and its gradient are finite.
    small = mx.where(near_zero, x, -1.0)
    large = mx.where(near_zero, -1.0, x)
    return mx.where(near_zero, mx.log(-mx.expm1(small)), mx.log1p(-mx.exp(large)))


def per_token(pairs: PairLogprobs) -> tuple[mx.array, mx.array]:
    """(P,) each: mean log-probability of the tokens of the chosen and of the rejected answers."""
    return pairs.chosen_P / pairs.chosen_length_P, pairs.rejected_P / pairs.rejected_length_P


def log_ratios(pairs: PairLogprobs) -> tuple[mx.array, mx.array]:
    """(P,) each: log(policy / reference) of the chosen and of the rejected answers."""
    return pairs.chosen_P - pairs.reference_chosen_P, pairs.rejected_P - pairs.reference_rejected_P
