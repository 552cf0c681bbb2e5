"""Finds the tokens that cover a span of text, and checks its edges: tokens across them, other tokens at inference.

A token is found by its characters in time that does not depend on the length of the text.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from mlx_nb.data.masks.control_tokens import written_out
from mlx_nb.data.masks.render import Encoded, encode_with_offsets
from mlx_nb.data.masks.tokenizer import Tokenizer

# An answer is mostly preceded by the same few characters of the template.
_SHORT, _REMEMBERED = 200, 1000
# Number of characters after which a text without control tokens is tokenized the same wherever reading began, and
# number of tokens that are compared.
_READ_IN, _COMPARED = 1000, 1000


@dataclass(frozen=True, eq=False)
class _PromptTokens:
    """The tokens of a prompt text, as in `Encoded`."""

    tokens: np.ndarray
    offsets: np.ndarray
    control_tokens: int


_PROMPT_TOKENS: WeakKeyDictionary[Any, dict[tuple[int, str], _PromptTokens]] = WeakKeyDictionary()


Touching = tuple[np.ndarray, np.ndarray]
"""(N,) which of some stretches of a text, and (N,) a token that touches it, in the order of the stretches."""


class TokenOffsets:
    """The characters that each token covers: `starts` and `ends`, (T,) int32."""

    def __init__(self, offsets: np.ndarray) -> None:
        self.starts, self.ends = np.ascontiguousarray(offsets[:, 0]), np.ascontiguousarray(offsets[:, 1])
        # Nearly all tokenizers process a text from its beginning to its end.
        self._in_order = all(bool((edges[1:] >= edges[:-1]).all()) for edges in (self.starts, self.ends))

    def touching(self, start: int, end: int) -> np.ndarray:
        """The tokens that cover a character of `[start, end)`, in order.

        A token without characters counts as being at its start.
        """
        first, last = 0, len(self.starts)
        if self._in_order:
            # Of the arrays' own type: otherwise the whole array is converted first.
            first = int(self.ends.searchsorted(np.int32(start), "left"))
            last = int(self.starts.searchsorted(np.int32(end), "left"))
        return first + np.flatnonzero(_touch(self.starts[first:last], self.ends[first:last], start, end))

    def touching_each(self, stretches: np.ndarray) -> Touching:
        """The tokens that cover a character of each of (S, 2) stretches `[start, end)`, as `touching` for each."""
        if not self._in_order:
            each = [self.touching(start, end) for start, end in stretches.tolist()]
            counts = np.array([len(tokens) for tokens in each], np.int64)
            return np.repeat(np.arange(len(each)), counts), np.concatenate([np.zeros(0, np.int64), *each])
        start, end = stretches.T
        first = self.ends.searchsorted(start, "left")
        counts = np.maximum(self.starts.searchsorted(end, "left") - first, 0)
        which = np.repeat(np.arange(len(stretches)), counts)
        tokens = np.arange(len(which)) + (first - np.cumsum(counts) + counts)[which]
        found = _touch(self.starts[tokens], self.ends[tokens], start[which], end[which])
        return which[found], tokens[found]


def _touch(starts: np.ndarray, ends: np.ndarray, start: int | np.ndarray, end: int | np.ndarray) -> np.ndarray:
    """(N,) bool: whether tokens cover a character of `[start, end)`."""
    result: np.ndarray = (starts < end) & ((ends > start) | ((starts == ends) & (starts >= start)))
    return result


class Edges:
    """The tokens of a text at the edges of its spans."""

    def __init__(self, text: str, encoded: Encoded, tokenizer: Tokenizer) -> None:
        self.text, self.tokens, self.tokenizer = text, encoded.tokens, tokenizer
        self.offsets = TokenOffsets(encoded.offsets)
        self._control = encoded.control
        self._control_ends = [one.end for one in encoded.control]

    def straddling(self, stretches: np.ndarray, touching: Touching) -> list[tuple[int, str]]:
        """Which of (S, 2) stretches `[start, end)` has a token that covers characters in it and outside, with its text.

        White space that a token includes after the end of a turn has no effect and does not count.
        """
        which, tokens = touching
        start, end = stretches[which].T
        starts, ends = self.offsets.starts[tokens], self.offsets.ends[tokens]
        found = []
        for at in np.flatnonzero((starts < start) | (ends > end)).tolist():
            if starts[at] < start[at] or self.text[end[at] : ends[at]].strip():
                found.append((int(which[at]), self.text[starts[at] : ends[at]]))
        return found

    def other_tokens_before(self, starts: Sequence[int]) -> list[str]:
        """A remark for each start where the text before it, given as a prompt, has other tokens than in the row.

        Empty for a start without a difference. Some tokenizers tokenize a line break differently if something follows
        it. Control tokens separate a text, so only what follows the last one before a start matters. A token across a
        start has its own remark and is not reported again.
        """
        begins = [self._begin(start) for start in starts]
        edges = np.array([(begins[k][1], start) for k, start in enumerate(starts)], np.int32).reshape(-1, 2)
        which, tokens = self.offsets.touching_each(edges + np.array([0, 1], np.int32))
        token_starts, token_ends = self.offsets.starts[tokens], self.offsets.ends[tokens]
        begin, end = edges[which].T
        across = set(which[(token_starts < end) & (token_ends > end)].tolist())
        within = (token_starts >= begin) & (token_ends <= end) & (token_ends > begin)
        limits = [0, *np.bincount(which[within], minlength=len(starts)).cumsum().tolist()]
        own = tokens[within]
        return [
            "" if start == 0 or k in across else self._other_tokens(start, *begins[k], own[limits[k] : limits[k + 1]])
            for k, start in enumerate(starts)
        ]

    def _begin(self, start: int) -> tuple[int, int, int]:
        """The start of the last control token before `start`, where to begin reading, and how many were skipped."""
        passed = bisect_right(self._control_ends, start)
        begin = self._control[passed - 1].start if passed else 0
        return begin, begin if start - begin <= _READ_IN + _COMPARED else start - _READ_IN - _COMPARED, passed

    def _other_tokens(self, start: int, begin: int, read_from: int, passed: int, own: np.ndarray) -> str:
        before = self.text[read_from:start]
        prompt = _prompt_tokens(before, self.tokenizer)
        if prompt.control_tokens > (min(passed, 1) if read_from == begin else 0):
            return ""  # control tokens that are ordinary characters in this row
        read_tokens = prompt.tokens
        if read_from > begin:
            compared = start - _COMPARED
            own = own[self.offsets.starts[own] >= compared]
            read_tokens = read_tokens[prompt.offsets[:, 0] >= compared - read_from]
        same = np.array_equal(self.tokens[own], read_tokens)
        return "" if same else f"{before[-8:]!r} before it has other tokens when the model is prompted."


def _prompt_tokens(before: str, tokenizer: Tokenizer) -> _PromptTokens:
    known = _PROMPT_TOKENS.setdefault(tokenizer, {})
    key = len(tokenizer), before
    if key in known:
        return known[key]
    tokens, covered = encode_with_offsets(tokenizer, before)
    something = covered[:, 1] > 0
    control_tokens = len(written_out(tokens, covered, before, tokenizer))
    prompt = _PromptTokens(tokens[something], covered[something], control_tokens)
    if len(before) <= _SHORT:
        if len(known) >= _REMEMBERED:
            known.clear()
        known[key] = prompt
    return prompt
