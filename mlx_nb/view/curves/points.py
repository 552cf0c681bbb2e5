"""Columns of numbers that grow with a run, and the few of their points that a browser needs. Pure."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlx_nb.history import decimated

SMOOTHING = 0.9
SHORT_RUN = 30  # updates; the average of fewer lags so far behind them that they themselves are the curve
_REMEMBERED = 100  # updates; older ones weigh less than 3e-5

Columns = dict[str, np.ndarray]


class Table:
    """Columns of numbers that grow at the end and are cut back by rewinds.

    The column `position` is the place of the row's event among those that stand. A number that is missing is NaN; any
    that is not finite is inf, so that it shows as a spike would.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self._columns: dict[str, array[float]] = {name: array("d") for name in names}

    def append(self, row: Mapping[str, float | None]) -> None:
        """Add a row; a column that it lacks, or that earlier ones lacked, is NaN there."""
        for name in row.keys() - self._columns.keys():
            self._columns[name] = array("d", [math.nan]) * len(self._columns["position"])
        for name, column in self._columns.items():
            value = row.get(name)
            column.append(math.nan if value is None else value if math.isfinite(value) else math.inf)

    def cut(self, kept: int) -> Columns:
        """Take away, and return, the rows of all events but the first `kept`."""
        length = bisect_left(self._columns["position"], kept)
        left = {name: np.array(column[length:]) for name, column in self._columns.items()}
        for column in self._columns.values():
            del column[length:]
        return left

    def last(self, name: str) -> float:
        """The newest number of a column, 0 when there is none."""
        column = self._columns[name]
        return column[-1] if column else 0.0

    def columns(self) -> Columns:
        """(rows,) float64 by name."""
        # Copies, because an array that lends its memory to numpy cannot grow.
        return {name: np.array(column) for name, column in self._columns.items()}


def kept_points(values: np.ndarray, limit: int) -> np.ndarray:
    """Indices, in order, of the first, the last, and the lowest and highest value of each stretch; never of a NaN.

    At most `limit`, if that is 4 or more.
    """
    there = np.flatnonzero(~np.isnan(values))
    if len(there) <= limit:
        return there
    # A power of two, so that the points of a growing line stay where they are until the stretches double.
    size = 1 << ((len(there) - 1) // (max(limit, 4) // 2 - 1)).bit_length()
    stretches = np.pad(values[there], (0, -len(there) % size), "edge").reshape(-1, size)
    starts = np.arange(0, len(there), size)
    ends = [0, len(there) - 1]
    result: np.ndarray = there[
        np.unique(np.concatenate([ends, starts + stretches.argmin(1), starts + stretches.argmax(1)]))
    ]
    return result


def smoothed_at(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """`history.smoothed` of the values at some of their indices; what is not finite is passed over, and NaN itself."""
    places = kept[:, None] - np.arange(_REMEMBERED)
    seen = np.where(places >= 0, values[np.maximum(places, 0)], math.nan)
    known = np.isfinite(seen)
    weights = np.where(known, SMOOTHING ** np.arange(_REMEMBERED), 0.0)
    means = (np.where(known, seen, 0.0) * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), 1e-12)
    return np.where(np.isfinite(values[kept]), means, math.nan)


def line(name: str, role: str, steps: np.ndarray, values: np.ndarray, clock: int = 0) -> dict[str, Any]:
    """A line for JSON: five digits of each value, None where it is not finite."""
    told = [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]
    return {"name": name, "role": role, "clock": clock, "step": [int(step) for step in steps], "value": told}


def clock(columns: Columns, knots: int) -> dict[str, list[Any]]:
    """Tokens and seconds of training until the end of some of the updates, the first and the last among them."""
    kept = decimated(len(columns["step"]), knots)
    return {
        "step": [int(step) for step in columns["step"][kept]],
        "tokens": [int(tokens) for tokens in columns["tokens"][kept]],
        "seconds": [float(f"{seconds:.6g}") for seconds in columns["seconds"][kept]],
    }
