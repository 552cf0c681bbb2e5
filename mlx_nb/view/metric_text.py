"""Which numbers of a training method to show first, and what an evaluation measured in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

# As far as a run has them; then the others in their own order.
_FIRST = ("reward", "accuracy", "margin", "kl", "nll", "completion_tokens")
SECONDS = "seconds_"


def main_metrics(names: Iterable[str], count: int = 3) -> list[str]:
    """The `count` metrics that say most about how a run goes; times are never among them."""
    measured = [name for name in names if not name.startswith(SECONDS)]
    ordered = [name for name in _FIRST if name in measured]
    # The reward of a single function says less than all of them together.
    ordered += [name for name in measured if name not in _FIRST and not name.startswith("reward_")]
    return ordered[:count]


def reward_of(evaluation: Mapping[str, Any]) -> float | None:
    """The mean reward of an evaluation whose loss is minus that reward, else None. See `History.evaluations`."""
    reward = evaluation.get("reward")
    if reward is None or evaluation["perplexity"] is not None:
        return None
    return reward if math.isclose(reward, -evaluation["loss"], rel_tol=1e-5, abs_tol=1e-9) else None


def headline(evaluation: Mapping[str, Any]) -> tuple[str, float]:
    """The number of an evaluation that is looked at first, as (`loss` or `reward`, value)."""
    reward = reward_of(evaluation)
    return ("loss", evaluation["loss"]) if reward is None else ("reward", reward)


def side_metrics(evaluation: Mapping[str, Any], metrics: Iterable[str]) -> str:
    """`perplexity 2.31`, or the main ones of the method's `metrics`: what stands behind the headline."""
    if evaluation["perplexity"] is not None:
        return f"perplexity {evaluation['perplexity']:.2f}"
    told = headline(evaluation)[0]
    names = [name for name in main_metrics(metrics) if name != told and name in evaluation]
    return metric_words({name: evaluation[name] for name in names[:2]})


def metric_words(metrics: Mapping[str, float]) -> str:
    """`accuracy 0.75, margin 0.12`."""
    return ", ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in metrics.items())


def number(value: float) -> str:
    """Three digits; what is there by rounding alone is 0."""
    return "0" if abs(value) < 1e-5 else f"{value:.3g}"
