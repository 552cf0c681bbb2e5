"""RowSource: a sequence of rows that are read when accessed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from mlx_nb.data.sources.row_values import OddRow, refuse_odd
from mlx_nb.errors import DataError, MlxNbError, shortened


class RowSource:
    """A sequence of rows: `len(source)`, `source[i] -> dict`, iteration. Rows are read when accessed.

    `name` is for messages. `location(i)` says where row i comes from, such as `train.jsonl line 18`. `fingerprint()` is
    a sha256 over the content (of a file: over its bytes), the same in every process. It is computed once: for a file
    when it is opened, for data in memory on first use. `changed()` names the files whose content is no longer what was
    read. Reading a broken row raises DataError naming its location; OddRow if only a value in it is at fault.
    `of_sources` marks a source whose `read` returns rows of other sources, which have already checked them.
    """

    def __init__(
        self,
        name: str,
        length: int,
        read: Callable[[int], Any],
        locate: Callable[[int], str],
        digest: Callable[[], str],
        changed: Callable[[], list[str]] = list,
        *,
        of_sources: bool = False,
    ) -> None:
        self.name = name
        self._length = length
        self._read = read
        self._locate = locate
        self._digest = digest
        self.changed = changed
        self._of_sources = of_sources
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> dict[str, Any]:
        position = self._position(row)
        if self._of_sources:
            return dict(self._read(position))
        with _located(self._locate(position)):
            return as_record(self._read(position))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[row] for row in range(self._length))

    def __repr__(self) -> str:
        return f"RowSource({self.name!r}, {self._length} rows)"

    def location(self, row: int) -> str:
        """The origin of row `row`."""
        return self._locate(self._position(row))

    def named(self, row: int) -> str:
        """`row 6`, with its origin if it has another number there: `row 6 (train.jsonl line 8)`."""
        location = self.location(row)
        return f"row {row}" if location.endswith((f" row {row}", f"[{row}]")) else f"row {row} ({location})"

    def fingerprint(self) -> str:
        """sha256 over the content, computed once."""
        if self._fingerprint is None:
            self._fingerprint = self._digest()
        return self._fingerprint

    def _position(self, row: int) -> int:
        if not -self._length <= row < self._length:
            raise IndexError(f"row {row} of {self.name}, which has {self._length} rows")
        return int(row) % self._length


def is_of_messages(value: Any) -> bool:
    """Whether a value is a list of messages: objects with a role."""
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(item, Mapping) and not {"role", "from"}.isdisjoint(item) for item in value)
    )


def as_record(value: Any) -> dict[str, Any]:
    """A row as its columns; a list of messages becomes a row with only that.

    Raises DataError for anything else, OddRow for a column that no row can have.
    """
    if isinstance(value, Mapping):
        record = dict(value.items())
    elif is_of_messages(value):
        record = {"messages": list(value)}
    else:
        fix = ' Plain text is {"text": ...}.' if isinstance(value, str) else ""
        raise DataError(f"a row must be a dict of columns, not {type(value).__name__}.{fix}")
    refuse_odd(record)
    return record


@contextmanager
def _located(location: str) -> Iterator[None]:
    """A context that adds the location of the row to errors, including those raised by a row's own objects.

    Errors of disk or memory are not the row's fault, and are raised unchanged.
    """
    try:
        yield
    except DataError as error:
        text = str(error)
        raise type(error)(text if text.startswith(f"{location}: ") else f"{location}: {text}") from None
    except Exception as error:
        broken_machine = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None)
        if broken_machine or isinstance(error, MlxNbError):
            raise
        raise OddRow(f"{location}: it cannot be read ({_in_words(error)}). Correct it, or drop the row.") from None


def _in_words(error: Exception) -> str:
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = ""
    return f"{type(error).__name__}: {shortened(text)}" if text else type(error).__name__


def gathered(sources: Sequence[RowSource], source_ids: np.ndarray, row_ids: np.ndarray, name: str = "") -> RowSource:
    """Rows `row_ids[i]` of `sources[source_ids[i]]`, in this order. Without a name it combines those of its sources."""

    def at(row: int) -> tuple[RowSource, int]:
        return sources[source_ids[row]], int(row_ids[row])

    def read(row: int) -> dict[str, Any]:
        source, inner = at(row)
        return source[inner]

    def locate(row: int) -> str:
        source, inner = at(row)
        return source.location(inner)

    def digest() -> str:
        content = hashlib.sha256("".join(source.fingerprint() for source in sources).encode())
        content.update(source_ids.astype("<i4").tobytes())
        content.update(row_ids.astype("<i8").tobytes())
        return content.hexdigest()

    def changed() -> list[str]:
        return list(dict.fromkeys(name for source in sources for name in source.changed()))

    name = name or " + ".join(dict.fromkeys(source.name for source in sources))
    return RowSource(name, len(row_ids), read, locate, digest, changed, of_sources=True)


def joined(sources: Sequence[RowSource], name: str = "") -> RowSource | None:
    """The rows of all sources, one source after the other, under their names or this one; None without sources."""
    if len(sources) < 2:
        return sources[0] if sources else None
    lengths = [len(source) for source in sources]
    source_ids = np.repeat(np.arange(len(sources), dtype=np.int32), lengths)
    return gathered(sources, source_ids, np.concatenate([np.arange(length) for length in lengths]), name)
