"""Columns of a run's numbers, and how curves are smoothed, thinned and rounded for a browser. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

SMOOTHING = 0.9
SHORT_RUN = 100  # updates; a shorter run is shown without smoothing, because the average lags too far behind
_INITIAL_CAPACITY = 256
_WINDOW = 100  # updates; older ones have a weight below 3e-5

Columns = dict[str, np.ndarray]


class Table:
    """Columns of numbers that grow at the end and are truncated by rewinds.

    The column `position` is the index of the row's event among the events in effect. A missing number is NaN. A number
    that is not finite becomes inf, so that it looks like a spike.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self._length = 0
        # With spare capacity at the end, doubled when needed.
        self._columns: Columns = {name: np.full(_INITIAL_CAPACITY, math.nan) for name in names}

    def append(self, row: Mapping[str, float | None]) -> None:
        """Add a row; missing columns of this row, or of earlier rows, are NaN."""
        capacity = len(self._columns["position"])
        for name in row.keys() - self._columns.keys():
            self._columns[name] = np.full(capacity, math.nan)
        if self._length == capacity:
            more = np.full(capacity, math.nan)
            self._columns = {name: np.concatenate([column, more]) for name, column in self._columns.items()}
        for name, value in row.items():
            known = math.nan if value is None else value if math.isfinite(value) else math.inf
            self._columns[name][self._length] = known
        self._length += 1

    def truncate(self, kept: int) -> Columns:
        """Remove and return the rows of all events after the first `kept`."""
        length = int(np.searchsorted(self._columns["position"][: self._length], kept))
        removed = {name: column[length : self._length].copy() for name, column in self._columns.items()}
        for column in self._columns.values():
            column[length : self._length] = math.nan
        self._length = length
        return removed

    def last(self, name: str) -> float:
        """The newest number of a column, or 0."""
        return float(self._columns[name][self._length - 1]) if self._length else 0.0

    def columns(self) -> Columns:
        """(rows,) float64 by name; views that are valid until the table changes."""
        return {name: column[: self._length] for name, column in self._columns.items()}


def kept_points(values: np.ndarray, limit: int) -> np.ndarray:
    """Sorted indices of the first, the last, and the minimum and maximum of each interval; never of a NaN.

    At most `limit` indices, if `limit` is 4 or more.
    """
    present = np.flatnonzero(~np.isnan(values))
    if len(present) <= limit:
        return present
    # A power of two, so that the points of a growing line do not move until the intervals double.
    size = 1 << ((len(present) - 1) // (max(limit, 4) // 2 - 1)).bit_length()
    known, whole = values[present], len(present) // size * size
    intervals, starts = known[:whole].reshape(-1, size), np.arange(0, whole, size)
    indices = [np.array([0, len(present) - 1]), starts + intervals.argmin(1), starts + intervals.argmax(1)]
    if whole < len(present):
        indices.append(whole + np.array([known[whole:].argmin(), known[whole:].argmax()]))
    result: np.ndarray = present[np.unique(np.concatenate(indices))]
    return result


def smoothed_at(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """`history.smoothed` of the values at the indices `kept`; values that are not finite are skipped and become NaN."""
    indices = kept[:, None] - np.arange(_WINDOW)
    seen = np.where(indices >= 0, values[np.maximum(indices, 0)], math.nan)
    known = np.isfinite(seen)
    weights = np.where(known, SMOOTHING ** np.arange(_WINDOW), 0.0)
    means = (np.where(known, seen, 0.0) * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), 1e-12)
    return np.where(np.isfinite(values[kept]), means, math.nan)


def line_json(name: str, role: str, steps: np.ndarray, values: np.ndarray, clock: int = 0) -> dict[str, Any]:
    """A line for JSON: five digits of each value, or None if it is not finite."""
    rounded = [_five_digits(value) for value in values.tolist()]
    return {"name": name, "role": role, "clock": clock, "step": steps.astype(int).tolist(), "value": rounded}


# Most points of a growing line were sent before.
@lru_cache(maxsize=1 << 14)
def _five_digits(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def clock_json(columns: Columns, limit: int) -> dict[str, list[Any]]:
    """Tokens and seconds of training at the end of at most `limit` updates (2 or more), with the first and the last."""
    count = len(columns["step"])
    # A power of two, so that the updates chosen for a growing run stay the same until there are too many.
    gap = 1 << (max(0, count - 1) // max(1, limit - 1)).bit_length()
    kept = [*range(0, max(0, count - 1), gap), *([count - 1] if count else [])]
    return {
        "step": [int(step) for step in columns["step"][kept]],
        "tokens": [int(tokens) for tokens in columns["tokens"][kept]],
        "seconds": [float(f"{seconds:.6g}") for seconds in columns["seconds"][kept]],
    }
