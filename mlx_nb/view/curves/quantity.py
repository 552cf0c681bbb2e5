"""The number that a run is about, loss or reward, and its validations."""

from __future__ import annotations

import math

from mlx_nb.events.history import History
from mlx_nb.view.curves.points import SHORT_RUN
from mlx_nb.view.metric_text import headline


def live_quantity(history: History) -> str:
    """What the small curve shows: `reward` of a method that learns from rewards, else `loss`."""
    return "reward" if history.last_step is not None and "reward" in history.last_step.metrics else "loss"


def live_words(history: History) -> str:
    """What the small curve shows, for its legend: `training loss, smoothed`."""
    return f"training {live_quantity(history)}" + ("" if len(history) < SHORT_RUN else ", smoothed")


def validations_of(history: History, name: str) -> list[tuple[int, float]]:
    """(update, value) of the validations whose first number is `name`: loss or reward."""
    checked = [(row["step"], headline(row)) for row in history.evaluations("valid")]
    return [(step, value) for step, (what, value) in checked if what == name and math.isfinite(value)]
