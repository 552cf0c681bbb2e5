"""Which tokens cover a stretch of a text, and what is worth knowing about those at its edges.

A token is found by its characters in the same time whatever the length of the text.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from mlx_nb.data.control_tokens import written_out
from mlx_nb.data.template_render import Encoded, encode_with_offsets

# What precedes an answer is mostly the same few characters of the template.
_SHORT, _REMEMBERED = 200, 1000
# Characters after which a text without control tokens is read the same wherever one began to read, and of those that
# are compared then.
_READ_IN, _COMPARED = 1000, 1000


@dataclass(frozen=True, eq=False)
class _Asked:
    """The tokens that cover something of a text that the model is asked with, as in `Encoded`."""

    tokens: np.ndarray
    offsets: np.ndarray
    control_tokens: int


_ASKED: WeakKeyDictionary[Any, dict[tuple[int, str], _Asked]] = WeakKeyDictionary()


class TokenOffsets:
    """The characters that each token covers: `starts` and `ends`, (T,) int32."""

    def __init__(self, offsets: np.ndarray) -> None:
        self.starts, self.ends = np.ascontiguousarray(offsets[:, 0]), np.ascontiguousarray(offsets[:, 1])
        # Nearly all tokenizers go through a text from its beginning to its end.
        self._in_order = bool((np.diff(self.starts) >= 0).all() and (np.diff(self.ends) >= 0).all())

    def touching(self, start: int, end: int) -> np.ndarray:
        """The tokens that cover a character of `[start, end)`, in order.

        One without characters lies where it starts.
        """
        first, last = 0, len(self.starts)
        if self._in_order:
            # Of the arrays' own type: for another one the whole array is converted first.
            first = int(self.ends.searchsorted(np.int32(start), "left"))
            last = int(self.starts.searchsorted(np.int32(end), "left"))
        starts, ends = self.starts[first:last], self.ends[first:last]
        found = (starts < end) & ((ends > start) | ((starts == ends) & (starts >= start)))
        return first + np.flatnonzero(found)


class Edges:
    """The tokens of a text at the edges of its spans."""

    def __init__(self, text: str, encoded: Encoded, tokenizer: Any) -> None:
        self.text, self.tokens, self.tokenizer = text, encoded.tokens, tokenizer
        self.offsets = TokenOffsets(encoded.offsets)
        self._control = encoded.control
        self._control_ends = [one.end for one in encoded.control]

    def straddling(self, start: int, end: int) -> list[str]:
        """The texts of the tokens that cover characters inside `[start, end)` and outside.

        White space that a token takes along behind the end of a turn changes nothing and does not count.
        """
        touching = self.offsets.touching(start, end)
        starts, ends = self.offsets.starts[touching], self.offsets.ends[touching]
        across = (starts < start) | (ends > end)
        pairs = zip(starts[across].tolist(), ends[across].tolist())
        return [self.text[a:b] for a, b in pairs if a < start or self.text[end:b].strip()]

    def other_tokens_before(self, start: int) -> str:
        """What to say where the model, asked with the text before `start`, reads other tokens than the row has there.

        Some tokenizers read a line break otherwise when something follows it. Control tokens part a text, so what
        comes after the last one before `start` tells. A token across `start` is another remark, and so is none here.
        """
        if start == 0:
            return ""
        at = self.offsets.touching(start - 1, start + 1)
        if ((self.offsets.starts[at] < start) & (self.offsets.ends[at] > start)).any():
            return ""
        passed = bisect_right(self._control_ends, start)
        begin = self._control[passed - 1].start if passed else 0
        read_from = begin if start - begin <= _READ_IN + _COMPARED else start - _READ_IN - _COMPARED
        before = self.text[read_from:start]
        asked = _asked(before, self.tokenizer)
        if asked.control_tokens > (min(passed, 1) if read_from == begin else 0):
            return ""  # control tokens that are ordinary characters in this row
        own = self.offsets.touching(read_from, start + 1)
        starts, ends = self.offsets.starts[own], self.offsets.ends[own]
        own = own[(starts >= read_from) & (ends <= start) & (ends > read_from)]
        tokens, asked_tokens = self.tokens[own], asked.tokens
        if read_from > begin:
            compared = start - _COMPARED
            tokens = tokens[self.offsets.starts[own] >= compared]
            asked_tokens = asked_tokens[asked.offsets[:, 0] >= compared - read_from]
        same = np.array_equal(tokens, asked_tokens)
        return "" if same else f"{before[-8:]!r} before it has other tokens when the model is asked."


def _asked(before: str, tokenizer: Any) -> _Asked:
    known = _ASKED.setdefault(tokenizer, {})
    key = len(tokenizer), before
    if key in known:
        return known[key]
    tokens, covered = encode_with_offsets(tokenizer, before)
    something = covered[:, 1] > 0
    control_tokens = len(written_out(tokens, covered, before, tokenizer))
    asked = _Asked(tokens[something], covered[something], control_tokens)
    if len(before) <= _SHORT:
        if len(known) >= _REMEMBERED:
            known.clear()
        known[key] = asked
    return asked
