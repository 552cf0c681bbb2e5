"""Synthetic histories for tests of curves."""

from __future__ import annotations

import math
import random

from mlx_nb.config.methods import METHODS
from mlx_nb.events import (
    EvaluationCompleted,
    StepCompleted,
)
from mlx_nb.events.history import History


def update(step: int, loss: float = 1.0, metrics: dict[str, float] | None = None, **changed) -> StepCompleted:
    values = {
        "learning_rate": 1e-4,
        "gradient_norm": 1 + step % 7 / 10,
        "target_tokens": 50.0,
        "tokens": 100,
        "seconds": 0.5,
        "peak_memory": 2_000_000_000,
        "epoch": step / 10,
        "rows": (step,),
    }
    return StepCompleted(step, loss, **{**values, **changed}, metrics=metrics or {})


def validation(step: int, loss: float, split: str = "valid") -> EvaluationCompleted:
    return EvaluationCompleted(step, split, loss, math.exp(loss), 40.0, 4, 0.2)


def method_history(name: str, updates: int = 60) -> History:
    """A history of a method with all its metrics, and validations."""
    draw, history = random.Random(2), History()
    for step in range(updates + 1):
        metrics = {
            metric: math.sin(step / 9 + at) + draw.gauss(0, 0.1) for at, metric in enumerate(METHODS[name].metrics)
        }
        if step:
            history.append(update(step, 0.7, {**metrics, "seconds_sampling": 1.0}))
        if step % 20 == 0:
            loss = -metrics["reward"] if "reward" in metrics else 0.7 - step / 1000
            history.append(EvaluationCompleted(step, "valid", loss, None, 40.0, 4, 0.2, metrics=metrics))
    return history
