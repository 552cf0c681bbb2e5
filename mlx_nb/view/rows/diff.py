"""Marks the differences between two answers, word by word."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from typing import NamedTuple

from mlx_nb.view.rows.cells import Cell

# difflib takes quadratic time on repetitive text, unless it may ignore frequent words.
_LONGEST_EXACT_DIFF = 2000
# Matches of so few words between two longer differences are considered accidental.
_MAX_ACCIDENTAL_MATCH = 2
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"\n+|[^\S\n]*(?:[{_CJK}]|[^\W{_CJK}]+|[^\w\s])|[^\S\n]+")


class _Word(NamedTuple):
    """A word to compare, and its cells `[first, stop)`."""

    text: tuple[str, str]
    first: int
    stop: int


def mark_differences(chosen: list[Cell], rejected: list[Cell]) -> tuple[list[Cell], list[Cell]]:
    """The cells of two answers, with those marked that differ from the other answer."""
    words = _words(chosen), _words(rejected)
    differing = differing_indices([word.text for word in words[0]], [word.text for word in words[1]])
    return _with_marks(chosen, words[0], differing[0]), _with_marks(rejected, words[1], differing[1])


def differing_indices(left: Sequence[object], right: Sequence[object]) -> tuple[set[int], set[int]]:
    """The indices in each of two sequences that differ from the other one."""
    shorter = min(len(left), len(right))
    first = next((k for k in range(shorter) if left[k] != right[k]), shorter)
    last = next((k for k in range(shorter - first) if left[-1 - k] != right[-1 - k]), shorter - first)
    inner = left[first : len(left) - last], right[first : len(right) - last]
    matcher = SequenceMatcher(None, *inner, autojunk=max(map(len, inner)) > _LONGEST_EXACT_DIFF)
    codes = matcher.get_opcodes()
    sizes = [max(i2 - i1, j2 - j1) for _, i1, i2, j1, j2 in codes]
    differing: tuple[set[int], set[int]] = (set(), set())
    for k, (kind, i1, i2, j1, j2) in enumerate(codes):
        between = 0 < k < len(codes) - 1 and sizes[k] <= _MAX_ACCIDENTAL_MATCH
        if kind != "equal" or (between and sizes[k] < min(sizes[k - 1], sizes[k + 1])):
            differing[0].update(range(first + i1, first + i2))
            differing[1].update(range(first + j1, first + j2))
    return differing


def _words(cells: list[Cell]) -> list[_Word]:
    """The text of the cells as words, each with its leading spaces; a special token is a word of its own."""
    words: list[_Word] = []
    at = 0
    while at < len(cells):
        stop = at
        while stop < len(cells) and cells[stop].kind == "text":
            stop += 1
        if stop == at:
            words.append(_Word((cells[at].text, cells[at].kind), at, at + 1))
            at += 1
            continue
        owners = [index for index in range(at, stop) for _ in cells[index].text]
        for found in _WORD.finditer("".join(cell.text for cell in cells[at:stop])):
            words.append(_Word((found[0], "text"), owners[found.start()], owners[found.end() - 1] + 1))
        at = stop
    return words


def _with_marks(cells: list[Cell], words: list[_Word], differing: set[int]) -> list[Cell]:
    indices = {cell for word in differing for cell in range(words[word].first, words[word].stop)}
    return [replace(cell, differs=True) if index in indices else cell for index, cell in enumerate(cells)]
