"""Exact and near duplicates among rows.

Exact: equal digests of the whole recognized row. Near: the sets of three-word sequences of two rows have a Jaccard
similarity of `NEAR` or more. Candidates come from MinHash with banding (Broder 1997; Leskovec, Rajaraman and Ullman,
Mining of Massive Datasets, 3.4), in time and memory linear in the rows; every candidate pair is then compared in full,
so there are no false positives. With 16 bands of 4 a pair at `NEAR` is found with probability 0.988, one at 0.9 with
probability 1 - 2e-8.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np

from mlx_nb.data.rows.content import RowContent
from mlx_nb.data.sources.row_values import value_text

NEAR = 0.7
BANDS, ROWS_PER_BAND = 16, 4

_WORDS_IN_SEQUENCE = 3
# Scripts written without spaces: every character counts as a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
# In a bucket of a thousand similar rows each is compared with only a few, which is enough to connect them all.
_PREDECESSORS = 4
_FIRST_OF_BUCKET = 4
_BOILERPLATE_SHARE, _BOILERPLATE_ROWS = 0.5, 20
_SEQUENCES_AT_ONCE = 4096
_FOLDED_AT_ONCE = 1024
_REMEMBERED_WORDS = 1 << 20

_RANDOM = np.random.default_rng(20_240_229)
_FACTORS = _RANDOM.integers(0, 1 << 63, BANDS * ROWS_PER_BAND, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_OFFSETS = _RANDOM.integers(0, 1 << 63, BANDS * ROWS_PER_BAND, dtype=np.uint64)
_MIXERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(0x9E3779B97F4A7C15))


def row_digest(content: RowContent) -> bytes:
    """16 bytes that are equal for rows with the same messages, tools, weights and texts."""
    return _digest([type(content).__name__, vars(content)])


def prompt_digest(content: RowContent) -> bytes | None:
    """16 bytes that are equal for rows with the same prompt; None for rows that are compared as a whole."""
    question = content.question()
    return None if question is None else _digest(question)


def _digest(value: object) -> bytes:
    return hashlib.blake2b(value_text(value).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def distinctive_text(content: RowContent) -> str:
    """The texts specific to a row: all except system prompt and tools, which rows often share.

    For rows that differ in their answers, or have none, only the prompt.
    """
    content_part = content.distinctive()
    if isinstance(content_part, str):
        return content_part
    parts: list[str] = []
    for message in content_part:
        if message["role"] != "system":
            parts += [value_text(call) for call in message.get("tool_calls", ())]
            parts.append(message.get("content") or "")
    return "\n".join(parts)


def word_sequences(text: str) -> np.ndarray:
    """The distinct three-word sequences of a text, as sorted 64-bit hashes. Case and punctuation are ignored."""
    words = _WORD.findall(text.casefold() if text.isascii() else unicodedata.normalize("NFKC", text).casefold())
    if not words:
        return np.zeros(0, np.uint64)
    if len(_WORD_IDS) > _REMEMBERED_WORDS:
        _WORD_IDS.clear()
    ids = np.array([_WORD_IDS[word] for word in words], np.uint64)
    length = max(1, len(ids) - _WORDS_IN_SEQUENCE + 1)
    hashed = np.zeros(length, np.uint64)
    for k in range(min(_WORDS_IN_SEQUENCE, len(ids))):
        hashed += ids[k : k + length] * _MIXERS[k]
    return np.unique(_mixed(hashed))


class _WordIds(dict[str, int]):
    def __missing__(self, word: str) -> int:
        found = self[word] = zlib.crc32(word.encode("utf-8", "surrogatepass")) | len(word) << 32
        return found


_WORD_IDS = _WordIds()


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: every bit of the result depends on every bit of the value."""
    values = (values ^ (values >> np.uint64(30))) * _MIXERS[0]
    values = (values ^ (values >> np.uint64(27))) * _MIXERS[1]
    result: np.ndarray = values ^ (values >> np.uint64(31))
    return result


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|A ∩ B| / |A ∪ B| of two sorted arrays of distinct values; 0 when both are empty."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / max(1, len(a) + len(b) - shared)


def common_sequences(texts: Iterable[str]) -> np.ndarray:
    """The word sequences that occur in more than half of these texts, and in at least 20: boilerplate."""
    sets = [word_sequences(text) for text in texts]
    if len(sets) < _BOILERPLATE_ROWS:
        return np.zeros(0, np.uint64)
    values, counts = np.unique(np.concatenate(sets), return_counts=True)
    return values[counts >= max(_BOILERPLATE_ROWS, int(len(sets) * _BOILERPLATE_SHARE) + 1)]


class NearIndex:
    """An index that finds near-duplicates among numbered texts.

    count        how many texts may be added, 128 bytes each
    boilerplate  word sequences that are ignored, from `common_sequences`
    text_of      returns a text by its number, for the full comparison
    """

    def __init__(self, count: int, boilerplate: np.ndarray, text_of: Callable[[int], str]) -> None:
        self.boilerplate = boilerplate
        self._bands = np.zeros((count, BANDS), np.uint64)
        self._minima = np.zeros((_FOLDED_AT_ONCE, BANDS * ROWS_PER_BAND), np.uint64)
        self._numbers = np.zeros(count, np.int64)
        self._added = 0
        self._sequences = lru_cache(maxsize=8192)(lambda number: self.sequences(text_of(number)))

    def sequences(self, text: str) -> np.ndarray:
        """The word sequences of a text that are compared; all of them if it is nothing but boilerplate."""
        found = word_sequences(text)
        own = np.setdiff1d(found, self.boilerplate, assume_unique=True) if len(self.boilerplate) else found
        return own if len(own) else found

    def add(self, number: int, text: str) -> None:
        """Add a text; numbers must increase. A text without words is never near another."""
        sequences = self.sequences(text)
        if len(sequences):
            self._minima[self._added % _FOLDED_AT_ONCE] = _minima(sequences)
            self._numbers[self._added] = number
            self._added += 1
            if self._added % _FOLDED_AT_ONCE == 0:
                self._fold(_FOLDED_AT_ONCE)

    def _fold(self, count: int) -> None:
        """Convert the minima of the last `count` texts to band keys."""
        self._bands[self._added - count : self._added] = _band_keys(self._minima[:count])

    def candidates(self) -> list[tuple[int, int]]:
        """Pairs (earlier, later) that share a band, in order; for large bands only enough pairs to connect them."""
        self._fold(self._added % _FOLDED_AT_ONCE)
        bands, size = self._bands[: self._added], self._added
        codes = [np.zeros(0, np.int64)]
        for band in bands.T:
            order = np.argsort(band, kind="stable")
            keys = band[order]
            starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])) if size else np.zeros(0, np.int64)
            first = np.repeat(starts, np.diff(np.append(starts, size)))
            positions = np.arange(size)
            for shift in range(1, _PREDECESSORS + 1):
                codes.append(_codes(order, positions - shift, positions, positions - shift >= first, size))
            for shift in range(_FIRST_OF_BUCKET):
                earlier = first + shift
                codes.append(_codes(order, earlier, positions, earlier < positions - _PREDECESSORS, size))
        found = np.unique(np.concatenate(codes))
        pairs = zip(self._numbers[found % max(1, size)].tolist(), self._numbers[found // max(1, size)].tolist())
        return sorted(pairs, key=lambda pair: (pair[1], pair[0]))

    def similarity(self, a: int, b: int) -> float:
        """Similarity of two texts from 0 to 1, compared in full."""
        return jaccard(self._sequences(a), self._sequences(b))


def _codes(order: np.ndarray, earlier: np.ndarray, later: np.ndarray, wanted: np.ndarray, size: int) -> np.ndarray:
    """Encode pairs of positions in `order` as single numbers, later * size + earlier."""
    result: np.ndarray = order[later[wanted]] * np.int64(size) + order[earlier[wanted]]
    return result


def _minima(sequences: np.ndarray) -> np.ndarray:
    """(64,) uint64: the smallest value of the sequences under each of the permutations."""
    minima = np.full(len(_FACTORS), np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(sequences), _SEQUENCES_AT_ONCE):
        part = sequences[start : start + _SEQUENCES_AT_ONCE, None]
        minima = np.minimum(minima, (part * _FACTORS + _OFFSETS).min(axis=0))
    return minima


def _band_keys(minima: np.ndarray) -> np.ndarray:
    """(N, 64) minima to (N, BANDS) keys: equal where all four minima of a band are."""
    keys = np.zeros((len(minima), BANDS), np.uint64)
    for k in range(ROWS_PER_BAND):
        keys = _mixed(keys * _MIXERS[2] + minima[:, k::ROWS_PER_BAND])
    return keys


class Groups:
    """Groups of numbers that are joined pair by pair (union-find)."""

    def __init__(self) -> None:
        self._parent: dict[int, int] = {}

    def leader(self, number: int) -> int:
        """The smallest number of its group."""
        while (parent := self._parent.get(number, number)) != number:
            self._parent[number] = self._parent.get(parent, parent)
            number = parent
        return number

    def join(self, a: int, b: int) -> None:
        """Merge the groups of `a` and `b`; the lower leader leads."""
        first, second = sorted((self.leader(a), self.leader(b)))
        self._parent[second] = first

    def all(self) -> list[list[int]]:
        """Every group of two or more, each in order."""
        groups: dict[int, list[int]] = {}
        for number in self._parent:
            groups.setdefault(self.leader(number), []).append(number)
        return sorted(sorted({leader, *members}) for leader, members in groups.items())
