"""Synthetic events."""

from __future__ import annotations

from mlx_nb.events import EvaluationCompleted, StepCompleted


def update(step, loss=1.0, **metrics):
    return StepCompleted(step, loss, 1e-4, 0.5, 12.0, 40, 0.1, 1000, 0.3, (4, 7), metrics, ((4, loss), (7, loss)))


def evaluation(step, loss):
    return EvaluationCompleted(step, "valid", loss, 2.0, 40.0, 4, 0.2)
