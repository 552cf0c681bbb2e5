"""Kahneman-Tversky optimization (Ethayarajh et al. 2024): answers labeled good or bad, without pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_nb.model.logprobs import TargetInputs, TargetScorer
from mlx_nb.objectives.base import LossSum, Metrics, Objective, k2, sum_by_row, with_metrics


class LabeledLogprobs(NamedTuple):
    """Of B answers: log-probability under policy and reference, and label 1 or 0, each (B,).

    Those of the reference are constants, and 0 for a method without one.

    `kl_estimate_B` is z0 in the loss: the mean log-ratio of mismatched answers over the whole update (of all rows in
    validation), at least 0, the same number for every answer, without gradient.
    """

    logprob_B: mx.array
    reference_B: mx.array
    label_B: mx.array
    kl_estimate_B: mx.array


def label_objective(loss: Callable[[LabeledLogprobs], Any], beta: float) -> Objective:
    """Wrap a loss function that returns one loss per answer. Units are answers."""

    def objective(scorer: TargetScorer, inputs: TargetInputs) -> LossSum:
        logprob_S = scorer.logprobs(inputs)
        reference_S = inputs.token_values.get("reference", mx.zeros_like(logprob_S))
        answers = LabeledLogprobs(
            sum_by_row(inputs, logprob_S * inputs.weight_S),
            sum_by_row(inputs, reference_S * inputs.weight_S),
            inputs.row_values["label"],
            inputs.row_values["kl_estimate"],
        )
        loss_B, extra = with_metrics(loss(answers), answers.logprob_B, "answer")
        ones_B = mx.ones_like(loss_B)
        good_B, ratio_B = answers.label_B, answers.logprob_B - answers.reference_B
        right_B = (ratio_B > answers.kl_estimate_B) == (good_B > 0)
        metrics: Metrics = {
            "reward_desirable": ((beta * ratio_B * good_B).sum(), good_B.sum()),
            "reward_undesirable": ((beta * ratio_B * (1 - good_B)).sum(), (1 - good_B).sum()),
            "kl_estimate": (answers.kl_estimate_B.sum(), ones_B.sum()),
            "accuracy": (right_B.astype(mx.float32).sum(), ones_B.sum()),
            **{name: (value_B.sum(), ones_B.sum()) for name, value_B in extra.items()},
        }
        if "reference" in inputs.token_values:
            metrics["kl"] = ((k2(reference_S, logprob_S) * inputs.weight_S).sum(), inputs.weight_S.sum())
        return LossSum(loss_B.sum(), ones_B.sum(), metrics, mx.stop_gradient(loss_B), ones_B)

    return objective


def kto(
    answers: LabeledLogprobs, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> mx.array:
    """lambda_y - v(x, y) of each answer (KTO):

    good  lambda_D (1 - sigmoid(beta (r - z0)))        bad  lambda_U (1 - sigmoid(beta (z0 - r)))

    r = log(pi / pi_ref)(y | x). Give the two weights the ratio that makes up for unequal numbers of labels
    (the paper advises between 1 and 4/3 for lambda_D n_D / lambda_U n_U).
    """
    ratio_B = answers.logprob_B - answers.reference_B
    sign_B = 2 * answers.label_B - 1
    weight_B = mx.where(answers.label_B > 0, desirable_weight, undesirable_weight)
    return weight_B * (1 - mx.sigmoid(sign_B * beta * (ratio_B - answers.kl_estimate_B)))
