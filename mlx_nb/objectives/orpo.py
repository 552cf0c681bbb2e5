"""Odds ratio preference optimization (Hong et al. 2024): imitation and preference in one stage, without a reference."""

from __future__ import annotations

import mlx.core as mx

from mlx_nb.objectives.preference import PairLogprobs, log_one_minus_exp, log_sigmoid, per_token, reward_metrics

# Odds are computed with a mean log-probability of at most this: at 0 (p = 1) they would be infinite.
_LARGEST_MEAN = -1e-6


def orpo(pairs: PairLogprobs, *, beta: float = 0.1) -> tuple[mx.array, dict[str, mx.array]]:
    """NLL(y_w) - beta log sigmoid(log(odds(y_w) / odds(y_l))) (equations 6 and 7; `beta` is the paper's lambda).

    odds(y) = p / (1 - p), with log p the MEAN log-probability of the answer's tokens (equation 3). NLL is of the
    answer's tokens only, where the code of the authors and TRL train the prompt too. A row's margin is one of log odds.
    """
    chosen, rejected = per_token(pairs)
    log_odds = _log_odds(chosen) - _log_odds(rejected)
    loss = -chosen - beta * log_sigmoid(log_odds - pairs.margin_P)
    return loss, {"nll": -chosen, "log_odds_ratio": log_odds, **reward_metrics(beta * chosen, beta * rejected)}


def _log_odds(mean_P: mx.array) -> mx.array:
    bounded_P = mx.minimum(mean_P, _LARGEST_MEAN)
    return bounded_P - log_one_minus_exp(bounded_P)
