"""The main quantity of a run, loss or reward, and its validation values."""

from __future__ import annotations

import math

from mlx_nb.events.history import History
from mlx_nb.view.curves.points import SHORT_RUN
from mlx_nb.view.metric_text import headline


def live_quantity(history: History) -> str:
    """The quantity of the main curve: `reward` for a method with rewards, else `loss`."""
    return "reward" if history.last_step is not None and "reward" in history.last_step.metrics else "loss"


def curve_legend(history: History) -> str:
    """The legend of the main curve, such as `training loss, smoothed`."""
    return f"training {live_quantity(history)}" + ("" if len(history) < SHORT_RUN else ", smoothed")


def validations_of(history: History, name: str) -> list[tuple[int, float]]:
    """(update, value) of the validations whose main number is `name`: loss or reward."""
    checked = [(row["step"], headline(row)) for row in history.evaluations("valid")]
    return [(step, value) for step, (what, value) in checked if what == name and math.isfinite(value)]
