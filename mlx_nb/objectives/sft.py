"""Supervised fine-tuning: negative log-likelihood of the trained tokens.

    L = - sum_t w_t log p(y_t | y_<t)  /  sum_t w_t        over the target tokens of the WHOLE optimizer update

mlx-lm averages inside each micro-batch and averages the averages; with rows of different lengths that weights a
token by how few neighbours it has.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_nb.model.logprobs import TargetInputs, TargetScorer
from mlx_nb.objectives.base import LossSum


def sft_loss(scorer: TargetScorer, inputs: TargetInputs) -> LossSum:
    """Sum of weighted negative log-likelihoods in nats; units are weighted target tokens."""
    loss_S = -scorer.logprobs(inputs) * inputs.weight_S
    row_S = inputs.position_S // inputs.tokens_BT.shape[1]
    zeros_B = mx.zeros(inputs.tokens_BT.shape[0])
    row_total_B = zeros_B.at[row_S].add(mx.stop_gradient(loss_S))
    return LossSum(loss_S.sum(), inputs.weight_S.sum(), {}, row_total_B, zeros_B.at[row_S].add(inputs.weight_S))
