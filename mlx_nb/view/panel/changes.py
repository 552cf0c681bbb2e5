"""What has changed in the data of the curves, so that a page is sent new points and not all of them again. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Series = dict[str, Any]


def series_changes(old: Series, new: Series) -> Series | None:
    """What turns `old` into `new`, both made by `SeriesBuilder.series`; None where only all of `new` would.

    lines    [group, line, kept, steps, values]: of the line's points the first `kept` stay, then these follow
    clocks   [clock, kept, step, tokens, seconds] alike
    iters, markers, best, short  as they are now, where they differ
    """
    if _shape(old) != _shape(new):
        return None
    told: Series = {"lines": [], "clocks": []}
    for at, (before, after) in enumerate(zip(old["groups"], new["groups"])):
        for number, (was, now) in enumerate(zip(before["lines"], after["lines"])):
            kept = _kept((was["step"], now["step"]), (was["value"], now["value"]))
            if kept < max(len(was["step"]), len(now["step"])):
                told["lines"].append([at, number, kept, now["step"][kept:], now["value"][kept:]])
    for at, (was, now) in enumerate(zip(old["clocks"], new["clocks"])):
        columns = ("step", "tokens", "seconds")
        kept = _kept(*((was[name], now[name]) for name in columns))
        if kept < max(len(was["step"]), len(now["step"])):
            told["clocks"].append([at, kept, *(now[name][kept:] for name in columns)])
    told |= {name: new[name] for name in ("iters", "markers", "best", "short") if old[name] != new[name]}
    return told


def _shape(series: Series) -> Any:
    """Everything but the points."""
    groups = [
        [*(group[name] for name in ("name", "label", "help", "best")), *_lines(group)] for group in series["groups"]
    ]
    return groups, len(series["clocks"]), series["shown"]


def _lines(group: Series) -> list[Any]:
    return [(line["name"], line["role"], line["clock"]) for line in group["lines"]]


def _kept(*pairs: tuple[Sequence[Any], Sequence[Any]]) -> int:
    """How many of the first entries are the same in both of every pair."""
    return min(_common(was, now) for was, now in pairs)


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        # Slices compare without a loop of Python's own.
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
