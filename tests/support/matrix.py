"""Selects the cases of a matrix that the quick tests run; the slow tests run all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def part(cases: Sequence[Mapping[str, object]], every: int | None) -> list[int]:
    """Numbers of some cases, each given as its value of each parameter.

    Each value of each parameter is in one of them; with `every`, it is every so-many-th case.
    """
    if every is not None:
        return list(range(0, len(cases), every))
    wanted = {pair for case in cases for pair in case.items()}
    chosen = []
    while wanted:
        best = max(range(len(cases)), key=lambda number: len(wanted & cases[number].items()))
        wanted -= cases[best].items()
        chosen.append(best)
    return sorted(chosen)
