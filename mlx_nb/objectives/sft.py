"""Supervised fine-tuning: negative log-likelihood of the trained tokens.

    L = - sum_t w_t log p(y_t | y_<t)  /  sum_t w_t        over the target tokens of the WHOLE optimizer update

mlx-lm averages inside each micro-batch and averages the averages; with rows of different lengths that weights a
token by how few neighbours it has.
"""

from __future__ import annotations

from mlx_nb.model.logprobs import TargetInputs, TargetScorer
from mlx_nb.objectives.base import LossSum


def sft_loss(scorer: TargetScorer, inputs: TargetInputs) -> LossSum:
    """Sum of weighted negative log-likelihoods in nats; units are weighted target tokens."""
    nll_S = -scorer.logprobs(inputs)
    return LossSum((nll_S * inputs.weight_S).sum(), inputs.weight_S.sum(), {})
