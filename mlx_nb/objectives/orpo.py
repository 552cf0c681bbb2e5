"""Odds ratio preference optimization (Hong et al. 2024): imitation and preference in one stage, without a reference."""

from __future__ import annotations

import mlx.core as mx

from mlx_nb.objectives.preference import PairLogprobs, log_one_minus_exp, log_sigmoid, per_token, reward_metrics


def orpo(pairs: PairLogprobs, *, beta: float = 0.1) -> tuple[mx.array, dict[str, mx.array]]:
    """NLL(y_w) - beta log sigmoid(log(odds(y_w) / odds(y_l))) (equations 6 and 7; `beta` is the paper's lambda).

    odds(y) = p / (1 - p), with log p the MEAN log-probability of the answer's tokens (equation 3). NLL is of the
    answer's tokens only, where the code of the authors and TRL train the prompt too. A row's margin is one of log odds.
    """
    chosen, rejected = per_token(pairs)
    log_odds = (chosen - rejected) - (log_one_minus_exp(chosen) - log_one_minus_exp(rejected))
    loss = -chosen - beta * log_sigmoid(log_odds - pairs.margin_P)
    return loss, {"nll": -chosen, "log_odds_ratio": log_odds, **reward_metrics(beta * chosen, beta * rejected)}
