"""Contrastive preference optimization (Xu et al. 2024) and SimPO (Meng et al. 2024): pairs without a reference.

CPO is a preference term PLUS the likelihood of the chosen answer; without the second it is not CPO.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_nb.objectives.preference import PairLogprobs, log_sigmoid, per_token, reward_metrics, smoothed_log_sigmoid

Result = tuple[mx.array, dict[str, mx.array]]


def sigmoid(pairs: PairLogprobs, *, beta: float = 0.1, cpo_alpha: float = 1.0, label_smoothing: float = 0.0) -> Result:
    """-log sigmoid(beta (log pi(y_w) - log pi(y_l))) + alpha NLL(y_w) (CPO).

    NLL is the mean over the tokens of the answer, where the paper has that of the whole answer, so that `cpo_alpha` has
    the same effect for answers of any length. The paper's alpha is 1.
    """
    scaled = beta * (pairs.chosen_P - pairs.rejected_P) - pairs.margin_P
    return _with_likelihood(smoothed_log_sigmoid(scaled, label_smoothing), pairs, cpo_alpha)


def hinge(pairs: PairLogprobs, *, beta: float = 0.1, cpo_alpha: float = 1.0) -> Result:
    """max(0, 1 - beta (log pi(y_w) - log pi(y_l))) + alpha NLL(y_w) (SLiC-HF, Zhao et al. 2023, section 2)."""
    scaled = beta * (pairs.chosen_P - pairs.rejected_P) - pairs.margin_P
    return _with_likelihood(mx.maximum(1 - scaled, 0.0), pairs, cpo_alpha)


def simpo(pairs: PairLogprobs, *, beta: float = 2.0, simpo_gamma: float = 0.5, cpo_alpha: float = 0.0) -> Result:
    """-log sigmoid(beta (mean log pi(y_w) - mean log pi(y_l)) - gamma) (SimPO, equation 6); alpha > 0 is CPO-SimPO."""
    chosen, rejected = per_token(pairs)
    loss = -log_sigmoid(beta * (chosen - rejected) - simpo_gamma - pairs.margin_P)
    loss, nll = _with_likelihood(loss, pairs, cpo_alpha)
    return loss, {**nll, **reward_metrics(beta * chosen, beta * rejected)}


def _with_likelihood(preference_P: mx.array, pairs: PairLogprobs, alpha: float) -> Result:
    nll_P = -pairs.chosen_P / pairs.chosen_length_P
    return preference_P + alpha * nll_P, {"nll": nll_P}
