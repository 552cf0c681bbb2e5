"""The values that a row may hold, and their canonical text: different rows have different texts."""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import pickle
import re
import uuid
from collections.abc import Iterator, Mapping
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np

from mlx_nb.errors import DataError, shown
from mlx_nb.process.user_code import code_digest

DEEPEST = 64  # levels of lists and objects inside a column
MOST_DIGITS = 4300  # of an integer: Python's limit for writing one
_TOO_LARGE = 10**MOST_DIGITS

# Converters whose texts are equal only if the values are.
_WRITTEN_AS_TEXT = (
    datetime.date,
    datetime.time,
    datetime.timedelta,
    datetime.tzinfo,
    Decimal,
    uuid.UUID,
    PurePath,
    bytes,
    bytearray,
    complex,
    Enum,
    np.generic,
)
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class OddRow(DataError):
    """A well-formed row with a value that a run cannot process."""


def refuse_odd(record: Mapping[Any, Any]) -> None:
    """Raise OddRow for columns without a name, and for values that `refuse_odd_value` refuses."""
    for column, value in record.items():
        if not isinstance(column, str):
            raise OddRow(f"the column name {shown(column)} is not text. Give the column a name, or drop the row.")
        if not column.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in column):
            raise OddRow(f"the column name {column!a} is not valid text. Give the column another name.")
        refuse_odd_value(value, f"`{column}`")


def refuse_odd_value(value: Any, where: str) -> None:
    """Raise OddRow, naming `where`, for endless nesting, numbers that cannot be written, and iterators."""
    level = [value]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for item in level:
            kind = type(item)
            if kind is str or kind is float or kind is bool or item is None:
                continue
            if isinstance(item, int):
                if not -_TOO_LARGE < item < _TOO_LARGE:
                    raise OddRow(
                        f"{where} has a whole number of more than {MOST_DIGITS:,} digits. Write it as text, or drop "
                        "the row."
                    )
            elif hasattr(kind, "__next__"):
                raise OddRow(
                    f"{where} is, or holds, a {kind.__name__}, which can be read only once. Make a list of it."
                )
            else:
                below += _inner(item)
        if not below:
            return
        level = list({id(item): item for item in below}.values())
    raise OddRow(f"{where} is nested more than {DEEPEST} deep. Drop the row.")


def _inner(value: Any) -> Iterator[Any]:
    """The elements of a container; none for other values."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield item
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value
    elif isinstance(value, np.ndarray) and value.dtype == object:
        yield from value.ravel().tolist()


def is_known(value: Any) -> bool:
    """Whether a value is of a type whose text describes it, as opposed to an arbitrary object."""
    return value is None or isinstance(value, (str, int, float, set, frozenset, *_WRITTEN_AS_TEXT))


def value_text(value: Any) -> str:
    """A value as text, the same in every process: its JSON, or a digest if JSON cannot express it.

    Never raises. Keys that are not text, sets, arrays, bytes and objects count with their contents; an object that can
    be neither pickled nor written counts by its type and its `repr` without addresses.
    """
    try:
        if _has_text_keys(value):
            return json.dumps(value, sort_keys=True, default=_as_text)
    except MemoryError:
        raise
    except Exception:
        pass
    return exact_digest(value)


def _has_text_keys(value: Any) -> bool:
    """Whether all keys are text. JSON writes the key 1 like "1"."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) for key in value) and all(map(_has_text_keys, value.values()))
    return not isinstance(value, list | tuple) or all(map(_has_text_keys, value))


def _as_text(value: Any) -> str:
    if isinstance(value, _WRITTEN_AS_TEXT):
        return str(value)
    raise TypeError(type(value).__name__)


def exact_digest(value: Any) -> str:
    """SHA-256 of a value and all its contents, at any depth, as far as they can be determined."""
    digest = hashlib.sha256()
    work: list[Any] = [value]
    above: set[int] = set()
    while work:
        item = work.pop()
        if isinstance(item, _End):
            above.discard(id(item.of))
            digest.update(b")")
            continue
        try:
            token, inner = _token(item)
        except MemoryError:
            raise
        except Exception:
            token, inner = type(item).__qualname__.encode(), None
        digest.update(token + b"\0")
        if inner is None:
            continue
        if id(item) in above:
            digest.update(b"itself")
            continue
        above.add(id(item))
        work += [_End(item), *reversed(inner)]
    return digest.hexdigest()


class _End:
    """Marks the end of a container's contents."""

    def __init__(self, of: Any) -> None:
        self.of = of


def _token(value: Any) -> tuple[bytes, list[Any] | None]:
    """The distinguishing bytes of a value, and its contents in a canonical order; None if it has none."""
    kind = type(value).__qualname__
    if value is None or isinstance(value, bool | float):
        return f"{kind} {value!r}".encode(), None
    if isinstance(value, int):
        return f"int {int(value):x}".encode(), None
    if isinstance(value, str):
        return f"str {len(value)} ".encode() + str.__str__(value).encode("utf-8", "surrogatepass"), None
    if isinstance(value, Mapping):
        pairs = sorted(value.items(), key=lambda pair: exact_digest(pair[0]))
        return f"mapping {len(pairs)}".encode(), [one for pair in pairs for one in pair]
    if isinstance(value, list | tuple):
        return f"list {len(value)}".encode(), list(value)
    if isinstance(value, set | frozenset):
        return f"set {len(value)}".encode(), sorted(value, key=exact_digest)
    if isinstance(value, np.ndarray):
        shape = f"array {value.dtype.str} {value.shape}".encode()
        return (shape, value.ravel().tolist()) if value.dtype == object else (shape + value.tobytes(), None)
    if isinstance(value, _WRITTEN_AS_TEXT):
        return f"{kind} {value!s}".encode(), None
    if callable(value) and not isinstance(value, type):
        return f"{kind} {code_digest(value)}".encode(), None
    return _opaque(value), None


def _opaque(value: Any) -> bytes:
    """An arbitrary object: its pickle, independent of what was pickled before."""
    content = io.BytesIO()
    try:
        pickler = pickle.Pickler(content, protocol=5)
        pickler.fast = True
        pickler.dump(value)
    except MemoryError:
        raise
    except Exception:
        return _ADDRESS.sub("", f"{type(value).__qualname__} {value!r}").encode("utf-8", "surrogatepass")
    return content.getvalue()
