"""Selects the most important metrics of a training method, and formats the metrics of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

# These first, if a run has them; then the others in their own order.
_FIRST = ("reward", "accuracy", "margin", "kl", "nll", "completion_tokens")
SECONDS = "seconds_"


def main_metrics(names: Iterable[str], count: int = 3) -> list[str]:
    """The `count` most informative metrics; times are never among them."""
    measured = [name for name in names if not name.startswith(SECONDS)]
    ordered = [name for name in _FIRST if name in measured]
    # The reward of a single function is less informative than the total.
    ordered += [name for name in measured if name not in _FIRST and not name.startswith("reward_")]
    return ordered[:count]


def reward_of(evaluation: Mapping[str, Any]) -> float | None:
    """The mean reward of an evaluation whose loss is minus that reward, else None. See `History.evaluations`."""
    reward = evaluation.get("reward")
    if reward is None or evaluation["perplexity"] is not None:
        return None
    return reward if math.isclose(reward, -evaluation["loss"], rel_tol=1e-5, abs_tol=1e-9) else None


def decimals(value: float) -> str:
    """Three decimals, or two digits of a small number, which would otherwise read as 0: `1.234`, `0.00046`."""
    return f"{value:.3f}" if abs(value) >= 0.01 or not value else f"{value:.2g}"


def headline(evaluation: Mapping[str, Any]) -> tuple[str, float]:
    """The main number of an evaluation, as (`loss` or `reward`, value)."""
    reward = reward_of(evaluation)
    return ("loss", evaluation["loss"]) if reward is None else ("reward", reward)


def deciding(evaluation: Mapping[str, Any]) -> tuple[str, float]:
    """The number that decides which evaluation is best, as (name, value): that of `best_by`, else the headline."""
    by = str(evaluation.get("best_by", ""))
    return (by, evaluation[by]) if by and by in evaluation else headline(evaluation)


def side_metrics(evaluation: Mapping[str, Any], metrics: Iterable[str]) -> str:
    """`perplexity 2.31`, or the main ones of the method's `metrics`, to show after the headline."""
    if evaluation["perplexity"] is not None:
        return f"perplexity {evaluation['perplexity']:.2f}"
    shown = headline(evaluation)[0]
    names = [name for name in main_metrics(metrics) if name != shown and name in evaluation]
    return metric_words({name: evaluation[name] for name in names[:2]})


def metric_words(metrics: Mapping[str, float]) -> str:
    """`accuracy 0.75, margin 0.12`."""
    return ", ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in metrics.items())


def number(value: float) -> str:
    """Three digits; rounding noise becomes 0."""
    return "0" if abs(value) < 1e-5 else f"{value:.3g}"
