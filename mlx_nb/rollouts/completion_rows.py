"""The rows of a sampling batch: which start together, and where each completion ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.model.passes import SideBySide


@dataclass(frozen=True, eq=False)
class Completion:
    """A sampled completion of one prompt.

    tokens        (T,) int32, as drawn: with the end token, or with the tokens of the stop string
    logprobs      (T,) float32, log-probability of each under the sampling model, before top_k and top_p
    text          without the end token; up to the stop string
    finished      False if it was cut at max_tokens
    prompt_index  index of its prompt
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    text: str
    finished: bool
    prompt_index: int


@dataclass(eq=False)
class Row:
    """A completion in progress, up to `most` tokens. `launched` counts tokens requested from the device."""

    number: int
    prompt_index: int
    most: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    launched: int = 0
    ended: bool = False
    finished: bool = False
    text: str = ""

    def completion(self) -> Completion:
        """The Completion sampled so far."""
        return Completion(
            np.array(self.tokens, np.int32),
            np.array(self.logprobs, np.float32),
            self.text,
            self.finished,
            self.prompt_index,
        )


class Waiting:
    """Rows that have not started, in the order in which they will."""

    def __init__(self, rows: Sequence[Row], lengths: Sequence[int], together: SideBySide, rows_at_once: int) -> None:
        self._lengths = lengths
        self._together = together
        self._rows_at_once = 1 if together is SideBySide.ONE_BY_ONE else rows_at_once
        by_length = together is SideBySide.EQUAL_LENGTHS
        self.rows = deque(sorted(rows, key=lambda row: lengths[row.prompt_index]) if by_length else rows)

    def is_next(self, prompt_index: int) -> bool:
        """Whether the next row to start belongs to this prompt."""
        return bool(self.rows) and self.rows[0].prompt_index == prompt_index

    def next_rows(self, growing: int) -> list[Row]:
        """The rows that start now, next to those in progress.

        A few alone are not started while others are in progress: merging caches costs about one step.
        """
        room = min(len(self.rows), self._rows_at_once - growing)
        if self._together is SideBySide.ANY_LENGTHS:
            if room < min(len(self.rows), max(1, self._rows_at_once // 4)):
                return []
        elif growing:
            return []
        joining: list[Row] = []
        while len(joining) < room and self._fits(joining):
            joining.append(self.rows.popleft())
        return joining

    def _fits(self, joining: list[Row]) -> bool:
        if not joining or self._together is SideBySide.ANY_LENGTHS:
            return True
        return self._lengths[self.rows[0].prompt_index] == self._lengths[joining[0].prompt_index]


class Endings:
    """Detects the end of a completion: an end token of the tokenizer, or a stop string in the text."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        # Every token except special ones has at least a byte; the spare ones keep the window's edge off the stop
        # string.
        self._window = max((len(text.encode()) for text in stop), default=0) + 4

    def judge(self, row: Row) -> None:
        """After a new token: if the row has ended, mark it so and set its text."""
        if row.tokens[-1] in self._tokenizer.eos_token_ids:
            row.ended = row.finished = True
            row.text = self._tokenizer.decode(row.tokens[:-1])
        elif self._stop and self._first_stop(self._tokenizer.decode(row.tokens[-self._window :])) is not None:
            text = self._tokenizer.decode(row.tokens)
            end = self._first_stop(text)
            if end is not None:
                row.ended = row.finished = True
                row.text = text[:end]
        if not row.ended and len(row.tokens) == row.most:
            row.ended = True
            row.text = self._tokenizer.decode(row.tokens)

    def _first_stop(self, text: str) -> int | None:
        return min((start for stop in self._stop if (start := text.find(stop)) >= 0), default=None)
