"""Supervised fine-tuning: negative log-likelihood of the trained tokens.

    L = - sum_t w_t log p(y_t | y_<t)  /  sum_t w_t        over the target tokens of the WHOLE optimizer update

mlx-lm averages inside each micro-batch and averages the averages; with rows of different lengths that weights a
token by how few neighbors it has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_nb.model.logprobs import TargetInputs, TargetScorer, target_logprobs
from mlx_nb.objectives.base import LossSum, Objective, sum_by_row, with_metrics


class Targets(NamedTuple):
    """Targets of a batch: logits (S, V) float32, and log p(target) (S,) under policy and reference.

    A loss function receives large batches in parts. Reference values are constants, and 0 for a method without one.
    """

    logits_SV: mx.array
    logprob_S: mx.array
    reference_S: mx.array


def token_objective(loss: Callable[[Targets], Any]) -> Objective:
    """Wrap a loss function that returns one loss per target, from that target alone.

    Units are weighted target tokens.
    """

    def objective(scorer: TargetScorer, inputs: TargetInputs) -> LossSum:
        names: list[str] = []

        def losses(logits_SV: mx.array, target_S: mx.array, reference_S: mx.array) -> tuple[mx.array, ...]:
            logprob_S = target_logprobs(logits_SV, target_S)
            targets = Targets(logits_SV.astype(mx.float32), logprob_S, reference_S)
            loss_S, extra = with_metrics(loss(targets), logprob_S, "target")
            names[:] = extra
            return loss_S, *extra.values()

        reference_S = inputs.token_values.get("reference", mx.zeros(inputs.target_S.shape))
        loss_S, *values = scorer.at_targets(inputs, losses, reference_S)
        extra = dict(zip(names, values))
        weighted_S, units = loss_S * inputs.weight_S, inputs.weight_S.sum()
        return LossSum(
            weighted_S.sum(),
            units,
            {name: ((value_S * inputs.weight_S).sum(), units) for name, value_S in extra.items()},
            sum_by_row(inputs, mx.stop_gradient(weighted_S)),
            sum_by_row(inputs, inputs.weight_S),
        )

    return objective


def nll(targets: Targets, *, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Any:
    """-log p(y), in nats.

    `label_smoothing` epsilon spreads that share over the vocabulary: (1 - epsilon) NLL + epsilon mean_v(-log p(v))
    (Szegedy et al. 2016, section 7). `z_loss` adds weight * log(Z)^2 (PaLM, Chowdhery et al. 2022, section 5).
    With either of them the NLL itself is the metric `nll`.
    """
    nll_S = loss_S = -targets.logprob_S
    if label_smoothing:
        spread_S = mx.logsumexp(targets.logits_SV, axis=-1) - targets.logits_SV.mean(axis=-1)
        loss_S = (1 - label_smoothing) * loss_S + label_smoothing * spread_S
    if z_loss:
        loss_S = loss_S + _z_loss(targets, z_loss)
    return (loss_S, {"nll": nll_S}) if label_smoothing or z_loss else loss_S


def dft(targets: Targets, *, z_loss: float = 0.0) -> Any:
    """-sg(p(y)) log p(y): each token weighted by how likely it already is (DFT, Wu et al. 2025).

    `sg` passes no gradient. The rows' NLL is the metric `nll`.
    """
    loss_S = -mx.stop_gradient(mx.exp(targets.logprob_S)) * targets.logprob_S
    loss_S = loss_S + _z_loss(targets, z_loss) if z_loss else loss_S
    return loss_S, {"nll": -targets.logprob_S}


def _z_loss(targets: Targets, weight: float) -> mx.array:
    return weight * mx.square(mx.logsumexp(targets.logits_SV, axis=-1))
