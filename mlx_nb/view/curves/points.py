"""Columns of numbers that grow with a run, and the few of their points that a browser needs. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

SMOOTHING = 0.9
SHORT_RUN = 100  # updates; the average of fewer lags so far behind them that they themselves are the curve
_FIRST_ROOM = 256
_REMEMBERED = 100  # updates; older ones weigh less than 3e-5

Columns = dict[str, np.ndarray]


class Table:
    """Columns of numbers that grow at the end and are cut back by rewinds.

    The column `position` is the place of the row's event among those that stand. A number that is missing is NaN; any
    that is not finite is inf, so that it shows as a spike would.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self._length = 0
        # With room at the end, doubled when it is used up.
        self._columns: Columns = {name: np.full(_FIRST_ROOM, math.nan) for name in names}

    def append(self, row: Mapping[str, float | None]) -> None:
        """Add a row; a column that it lacks, or that earlier ones lacked, is NaN there."""
        room = len(self._columns["position"])
        for name in row.keys() - self._columns.keys():
            self._columns[name] = np.full(room, math.nan)
        if self._length == room:
            more = np.full(room, math.nan)
            self._columns = {name: np.concatenate([column, more]) for name, column in self._columns.items()}
        for name, value in row.items():
            known = math.nan if value is None else value if math.isfinite(value) else math.inf
            self._columns[name][self._length] = known
        self._length += 1

    def cut(self, kept: int) -> Columns:
        """Take away, and return, the rows of all events but the first `kept`."""
        length = int(np.searchsorted(self._columns["position"][: self._length], kept))
        left = {name: column[length : self._length].copy() for name, column in self._columns.items()}
        for column in self._columns.values():
            column[length : self._length] = math.nan
        self._length = length
        return left

    def last(self, name: str) -> float:
        """The newest number of a column, 0 when there is none."""
        return float(self._columns[name][self._length - 1]) if self._length else 0.0

    def columns(self) -> Columns:
        """(rows,) float64 by name, as they are until the table changes."""
        return {name: column[: self._length] for name, column in self._columns.items()}


def kept_points(values: np.ndarray, limit: int) -> np.ndarray:
    """Indices, in order, of the first, the last, and the lowest and highest value of each stretch; never of a NaN.

    At most `limit`, if that is 4 or more.
    """
    there = np.flatnonzero(~np.isnan(values))
    if len(there) <= limit:
        return there
    # A power of two, so that the points of a growing line stay where they are until the stretches double.
    size = 1 << ((len(there) - 1) // (max(limit, 4) // 2 - 1)).bit_length()
    told, whole = values[there], len(there) // size * size
    stretches, starts = told[:whole].reshape(-1, size), np.arange(0, whole, size)
    places = [np.array([0, len(there) - 1]), starts + stretches.argmin(1), starts + stretches.argmax(1)]
    if whole < len(there):
        places.append(whole + np.array([told[whole:].argmin(), told[whole:].argmax()]))
    result: np.ndarray = there[np.unique(np.concatenate(places))]
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
    told = [_told(value) for value in values.tolist()]
    return {"name": name, "role": role, "clock": clock, "step": steps.astype(int).tolist(), "value": told}


# Most points of a growing line were told before.
@lru_cache(maxsize=1 << 14)
def _told(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def clock(columns: Columns, knots: int) -> dict[str, list[Any]]:
    """Tokens and seconds of training until the end of some of the updates, the first and the last among them."""
    count = len(columns["step"])
    # A power of two, so that the knots of a growing run stay where they are until there are too many.
    gap = 1 << (max(0, count - 1) // max(1, knots - 1)).bit_length()
    kept = [*range(0, max(0, count - 1), gap), *([count - 1] if count else [])]
    return {
        "step": [int(step) for step in columns["step"][kept]],
        "tokens": [int(tokens) for tokens in columns["tokens"][kept]],
        "seconds": [float(f"{seconds:.6g}") for seconds in columns["seconds"][kept]],
    }
