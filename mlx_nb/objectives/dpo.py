"""Direct preference optimization (Rafailov et al. 2023) and its variants.

With d = log(pi / pi_ref)(y_w) - log(pi / pi_ref)(y_l), the log-ratio of the chosen answer above that of the rejected
one, each function gives the loss of every pair (P,). A row's `margin` m is what the reward of its chosen answer should
be ahead by (ODPO, Amini et al. 2024); 0 gives the papers' losses.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_nb.objectives.preference import PairLogprobs, log_ratios, log_sigmoid, reward_metrics, smoothed_log_sigmoid


def _scaled(pairs: PairLogprobs, beta: float) -> mx.array:
    """beta * d - m"""
    chosen, rejected = log_ratios(pairs)
    return beta * (chosen - rejected) - pairs.margin_P


def sigmoid(pairs: PairLogprobs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> mx.array:
    """-log sigmoid(beta d) (DPO, equation 7).

    With `label_smoothing` epsilon, conservative DPO: -(1 - epsilon) log sigmoid(beta d) - epsilon log sigmoid(-beta d)
    (Mitchell 2023, equation 3).
    """
    return smoothed_log_sigmoid(_scaled(pairs, beta), label_smoothing)


def hinge(pairs: PairLogprobs, *, beta: float = 0.1) -> mx.array:
    """max(0, 1 - beta d) (SLiC-HF, Zhao et al. 2023; in this form RSO, Liu et al. 2024, hinge-norm)."""
    return mx.maximum(1 - _scaled(pairs, beta), 0.0)


def ipo(pairs: PairLogprobs, *, beta: float = 0.1) -> tuple[mx.array, dict[str, mx.array]]:
    """(d - 1 / (2 beta))^2, d of log-probabilities PER TOKEN (IPO, Azar et al. 2023, equation 17).

    The paper does not mention per token; its authors use it in their experiments, and so does TRL.
    """
    chosen, rejected = _ratios_per_token(pairs)
    loss = mx.square(chosen - rejected - (0.5 + pairs.margin_P) / beta)
    return loss, reward_metrics(beta * chosen, beta * rejected)


def dpop(pairs: PairLogprobs, *, beta: float = 0.1, delta: float = 50.0) -> mx.array:
    """-log sigmoid(beta (d - delta max(0, log pi_ref(y_w) - log pi(y_w)))) (DPO-Positive: Smaug, Pal et al. 2024).

    The penalty, inside the sigmoid, keeps the chosen answer from becoming less likely. `delta` is the paper's lambda.
    """
    lost = mx.maximum(pairs.reference_chosen_P - pairs.chosen_P, 0.0)
    return -log_sigmoid(_scaled(pairs, beta) - beta * delta * lost)


def robust(pairs: PairLogprobs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> mx.array:
    """Unbiased when a share epsilon < 1/2 of the labels is flipped (robust DPO, Chowdhury et al. 2024, section 3.1).

    -((1 - epsilon) log sigmoid(beta d) - epsilon log sigmoid(-beta d)) / (1 - 2 epsilon)
    """
    scaled = _scaled(pairs, beta)
    kept, flipped = (1 - label_smoothing) * log_sigmoid(scaled), label_smoothing * log_sigmoid(-scaled)
    return -(kept - flipped) / (1 - 2 * label_smoothing)


def normalized(pairs: PairLogprobs, *, beta: float = 2.0) -> tuple[mx.array, dict[str, mx.array]]:
    """-log sigmoid(beta d), d of log-probabilities per token: length is no advantage (Tulu 3, Lambert et al. 2024)."""
    chosen, rejected = _ratios_per_token(pairs)
    loss = -log_sigmoid(beta * (chosen - rejected) - pairs.margin_P)
    return loss, reward_metrics(beta * chosen, beta * rejected)


def _ratios_per_token(pairs: PairLogprobs) -> tuple[mx.array, mx.array]:
    chosen, rejected = log_ratios(pairs)
    return chosen / pairs.chosen_length_P, rejected / pairs.rejected_length_P
