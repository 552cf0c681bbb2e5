"""The difference between two versions of the curve data, so that only new points are sent to the page. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Series = dict[str, Any]


def series_changes(old: Series, new: Series) -> Series | None:
    """The changes from `old` to `new`, both from `SeriesBuilder.series`; None if `new` must be sent completely.

    lines    [group, line, kept, steps, values]: the first `kept` points of the line stay, then these follow
    clocks   [clock, kept, step, tokens, seconds], in the same way
    iters, markers, best, short  the new values, if they differ
    """
    if _shape(old) != _shape(new):
        return None
    changes: Series = {"lines": [], "clocks": []}
    for at, (before, after) in enumerate(zip(old["groups"], new["groups"])):
        for number, (was, now) in enumerate(zip(before["lines"], after["lines"])):
            kept = _kept((was["step"], now["step"]), (was["value"], now["value"]))
            if kept < max(len(was["step"]), len(now["step"])):
                changes["lines"].append([at, number, kept, now["step"][kept:], now["value"][kept:]])
    for at, (was, now) in enumerate(zip(old["clocks"], new["clocks"])):
        columns = ("step", "tokens", "seconds")
        kept = _kept(*((was[name], now[name]) for name in columns))
        if kept < max(len(was["step"]), len(now["step"])):
            changes["clocks"].append([at, kept, *(now[name][kept:] for name in columns)])
    changes |= {name: new[name] for name in ("iters", "markers", "best", "short") if old[name] != new[name]}
    return changes


def _shape(series: Series) -> Any:
    """Everything except the points."""
    groups = [
        [*(group[name] for name in ("name", "label", "help", "best")), *_lines(group)] for group in series["groups"]
    ]
    return groups, len(series["clocks"]), series["shown"]


def _lines(group: Series) -> list[Any]:
    return [(line["name"], line["role"], line["clock"]) for line in group["lines"]]


def _kept(*pairs: tuple[Sequence[Any], Sequence[Any]]) -> int:
    """The length of the common prefix of every pair."""
    return min(_common(was, now) for was, now in pairs)


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        # Comparing slices avoids a Python loop.
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
