"""The result of the learning-rate finder: how the loss changed at each rate, what it suggests, and its picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mlx_nb.view.curves.shown_figure import ShownFigure

_WINDOW = 3.0  # updates; standard deviation of the weights that smooth the changes
_TENTH = 10.0  # the suggestion is this far below the rate of the lowest loss, where the loss still falls steadily
_LEAST_FALL = 2.0  # of the noise, or the loss did not fall


@dataclass(frozen=True)
class RateRange:
    """Learning rates, rising, with the loss before each update minus that of the same rows before the first.

    `diverged` says whether the loss rose so far that the highest rates were not tried.
    """

    learning_rates: list[float]
    changes: list[float]
    diverged: bool

    @property
    def smoothed(self) -> list[float]:
        """The changes, smoothed over a few neighbors on both sides, so that no point is shifted."""
        values = np.array(self.changes)
        places = np.flatnonzero(np.isfinite(values))
        if not len(places):
            return [math.nan] * len(values)
        weight_NN = np.exp(-0.5 * ((np.arange(len(values))[:, None] - places[None]) / _WINDOW) ** 2)
        smoothed: list[float] = (weight_NN @ values[places] / weight_NN.sum(axis=1)).tolist()
        return smoothed

    @property
    def best(self) -> int | None:
        """The place of the lowest smoothed change; None if the loss did not fall below its noise."""
        values = np.array(self.smoothed)
        if not np.isfinite(values).any():
            return None
        lowest = int(np.nanargmin(values))
        residual = np.array(self.changes[: lowest + 1]) - values[: lowest + 1]
        noise = float(np.nanstd(residual)) / math.sqrt(2 * _WINDOW)
        return lowest if values[lowest] < -_LEAST_FALL * noise else None

    @property
    def suggestion(self) -> float | None:
        """A tenth of the rate at which the smoothed loss is lowest, to two digits; None if the loss did not fall."""
        best = self.best
        return None if best is None else float(f"{self.learning_rates[best] / _TENTH:.1e}")

    @property
    def words(self) -> str:
        """The result in a sentence or two."""
        rates = self.learning_rates
        tried = f"{rates[0]:.1e} to {rates[-1]:.1e}" if rates else "nothing"
        end = ", where the loss diverged" if self.diverged else ""
        best = self.best
        if best is None:
            return f"tried {tried}{end}. The loss did not fall, so nothing is suggested. Try more updates."
        return (
            f"learning_rate: {self.suggestion:g} is suggested, a tenth of {rates[best]:.1e}, where the loss was "
            f"lowest ({self.smoothed[best]:+.3f}). Tried {tried}{end}. The run is unchanged."
        )

    def figure(self) -> ShownFigure:
        """The changes by learning rate with the suggestion, as a matplotlib Figure that displays itself."""
        from mlx_nb.view.curves.figure import LEFT_COLOR, TRAIN_COLOR, VALID_COLOR
        from mlx_nb.view.curves.shown_figure import ShownFigure

        figure = ShownFigure(self.words, (7.5, 3.4))
        axes = figure.add_subplot()
        powers = [math.log10(rate) for rate in self.learning_rates]
        axes.plot(powers, self.changes, ".", color=LEFT_COLOR, label="each update")
        axes.plot(powers, self.smoothed, color=TRAIN_COLOR, linewidth=1.8, label="smoothed")
        shown = [value for value in self.smoothed if math.isfinite(value)]
        if shown:
            low, high = min(shown), max(0.0, shown[0])
            axes.set_ylim(low - 0.3 * (high - low) - 0.02, high + 0.6 * (high - low) + 0.05)
        if self.suggestion is not None:
            axes.axvline(math.log10(self.suggestion), color=VALID_COLOR, linestyle="--", linewidth=1.4)
            axes.set_title(f"suggested: {self.suggestion:g}", loc="right", fontsize=9)
        axes.set_xlabel("learning rate")
        axes.set_ylabel("change of the loss")
        axes.legend(frameon=False, fontsize=8)
        figure.finish()
        axes.xaxis.set_major_formatter(lambda power, _: f"{10**power:.0e}".replace("e-0", "e-"))
        return figure

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return {"text/plain": self.words, "image/png": self.figure()._repr_png_()}

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(self.words)
