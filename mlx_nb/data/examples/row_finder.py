"""Finds rows that are longest, cut, left out or contain some words, a few at a time."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mlx_nb.data.examples.examples import Examples
from mlx_nb.errors import CommandError, DataError, did_you_mean

ALL, HIGHEST_LOSS = "all rows", "highest loss"


class RowFacts(NamedTuple):
    """Facts about one row: its tokens (both answers' of a pair), trained tokens, truncated tokens, whether left out."""

    tokens: int
    trained: int
    dropped: int
    left_out: bool


# The filters: which rows match, and their sort key (None: file order).
_FILTERS: dict[str, tuple[Callable[[RowFacts], bool], Callable[[RowFacts], int] | None]] = {
    "longest": (lambda facts: facts.tokens > 0, lambda facts: -facts.tokens - facts.dropped),
    "shortest": (lambda facts: facts.tokens > 0, lambda facts: facts.tokens + facts.dropped),
    "most trained": (lambda facts: facts.trained > 0, lambda facts: -facts.trained),
    "truncated": (lambda facts: facts.dropped > 0, None),
    "left out": (lambda facts: facts.left_out, None),
}
FILTERS = (ALL, *_FILTERS, HIGHEST_LOSS)


class RowFinder:
    """Searches the rows of one split. Each row is tokenized at most once, and only for a filter that needs it.

    `losses()` returns {row: loss}, for the filter `highest loss`.
    """

    def __init__(self, examples: Examples, losses: Callable[[], Mapping[int, float]]) -> None:
        self._examples = examples
        self._losses = losses
        self._facts: dict[int, RowFacts] = {}

    def search(self, filter: str = ALL, text: str = "", *, regex: bool = False) -> Search:
        """Start a search. Raises CommandError for an unknown filter or an invalid regular expression."""
        if filter not in FILTERS:
            raise CommandError(f"no filter {filter!r}.{did_you_mean(filter, FILTERS)} Filters: {', '.join(FILTERS)}.")
        says = _pattern(text, regex) if text else None
        if filter == ALL and says is None:
            return Search(range(len(self)))
        if filter in (ALL, HIGHEST_LOSS):
            losses = self._losses() if filter == HIGHEST_LOSS else None
            rows = range(len(self)) if losses is None else sorted(losses, key=lambda row: -losses[row])
            return Search(rows, key=lambda row: 0 if self._says(row, says) else None)
        belongs, order = _FILTERS[filter]

        def key(row: int) -> int | None:
            facts = self.facts(row) if self._says(row, says) else None
            if facts is None or not belongs(facts):
                return None
            return order(facts) if order else 0

        return Search(range(len(self)), key=key)

    def __len__(self) -> int:
        return len(self._examples)

    def facts(self, row: int) -> RowFacts:
        """The facts about row `row`; tokenizes it the first time."""
        if row not in self._facts:
            view = self._examples.view(row)
            tokens = sum(len(conversation.tokens) for conversation in view.conversations)
            trained = (
                0
                if view.error
                else sum(int((conversation.loss_mask != 0).sum()) for conversation in view.conversations)
            )
            self._facts[row] = RowFacts(tokens, trained, view.dropped_tokens, view.error is not None)
        return self._facts[row]

    def _says(self, row: int, pattern: re.Pattern[str] | None) -> bool:
        if pattern is None:
            return True
        try:
            return any(pattern.search(text) for text in _strings(self._examples.source[row]))
        except DataError:  # a row that cannot be read contains no text
            return False


class Search:
    """A search that can be continued as long as there is time.

    `found` are the matching row numbers so far, in order; `read` of `total` rows were examined.
    """

    def __init__(self, rows: Sequence[int], key: Callable[[int], int | None] | None = None) -> None:
        self._rows = rows
        self._key = key
        self._keyed: list[tuple[int, int, int]] = []
        self._found: Sequence[int] | None = None if key else rows
        self.total = len(rows)
        self.read = 0 if key else self.total

    @property
    def done(self) -> bool:
        """Whether all rows were examined."""
        return self.read == self.total

    @property
    def found(self) -> Sequence[int]:
        """The matching row numbers among those examined so far, in order."""
        if self._found is None:
            self._keyed.sort()
            self._found = [row for _, _, row in self._keyed]
        return self._found

    def examine(self, seconds: float) -> bool:
        """Examine more rows for about this many seconds, at least one row. Returns whether all were examined."""
        until = time.monotonic() + seconds
        while self._key is not None and not self.done:
            row = self._rows[self.read]
            key = self._key(row)
            if key is not None:
                self._keyed.append((key, self.read, row))
                self._found = None
            self.read += 1
            if time.monotonic() >= until:
                break
        return self.done


def _pattern(text: str, regex: bool) -> re.Pattern[str]:
    try:
        return re.compile(text if regex else re.escape(text), re.IGNORECASE)
    except re.error as error:
        raise CommandError(f"{text!r} is not a regular expression: {error}.") from None


def _strings(value: Any) -> Iterable[str]:
    """Every text in a row, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)
