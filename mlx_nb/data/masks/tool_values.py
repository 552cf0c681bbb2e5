"""Values in tool calls and tool descriptions as written for the model: the same for every kind of file.

Tables (Arrow, parquet, pandas) give an object the keys of all others as nulls, turn 1 into 1.0, and texts into times.
Afterwards that cannot be distinguished from what the user wrote, so all objects are read by one rule: a null is left
out, and a whole number has no decimal point. A JSON text passes through tables unchanged, so nulls in it stay.
"""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import numpy as np

from mlx_nb.data.sources.plain_values import is_missing, plain_value
from mlx_nb.data.sources.row_values import OddRow, refuse_odd_value

_EXACT_WHOLE = 2.0**53
NULLS, WHOLE, TIMES, REPEATED, INEXACT = "nulls", "whole", "times", "repeated", "inexact"
# Remarks about values, and whether each is only a note: {where} is the first place.
_SENTENCES = {
    NULLS: (
        "null is left out, such as at {where} ({count} in all): in a table it says that the row has no such key. "
        "Arguments as JSON text keep it.",
        True,
    ),
    WHOLE: ("a whole number is written without its decimal point, such as at {where} ({count} in all).", True),
    TIMES: (
        "a time is written as text, such as at {where} ({count} in all): a table may have made it from another text. "
        "Keep it as text there.",
        False,
    ),
    REPEATED: ("a key occurs twice in one object, such as at {where} ({count} in all): the last is written.", False),
    INEXACT: (
        "a number is too large or too fine to be exact to its last digit, such as at {where} ({count} in all). Write "
        "it as text.",
        False,
    ),
}


class NotJson(ValueError):
    """A value that JSON cannot hold. The message says which and where, without a full stop."""


@dataclass
class ValueRemarks:
    """Remarks about the values passed to the model, by kind: how often, and where first."""

    found: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, kind: str, where: str) -> None:
        """Count a remark; `where` is stored for the first of its kind."""
        count, first = self.found.get(kind, (0, where))
        self.found[kind] = (count + 1, first)

    def sentences(self, *, notes: bool) -> Iterator[str]:
        """The remarks as sentences: either the notes or the problems."""
        for kind, (count, where) in self.found.items():
            sentence, only_a_note = _SENTENCES[kind]
            if only_a_note == notes:
                yield sentence.format(where=repr(where), count=count)


def written_value(value: Any, remarks: ValueRemarks, where: str, *, keep_nulls: bool = False) -> Any:
    """A value as JSON holds it, by the one rule for objects. Raises NotJson.

    where       the name of the value, for remarks: `city.zip` or `rows[2]`
    keep_nulls  nulls in objects stay; those in lists always do
    """
    if type(value) is str:
        return _text(value, where)
    if isinstance(value, Mapping):
        written = {}
        for key, item in value.items():
            inner = f"{where}.{key}" if where else str(key)
            if is_missing(item) and not keep_nulls:
                remarks.add(NULLS, inner)
            else:
                written[_text(str(key), inner)] = written_value(item, remarks, inner, keep_nulls=keep_nulls)
        return written
    if isinstance(value, (np.ndarray, np.generic)) or is_missing(value):
        value = plain_value(value)
    if isinstance(value, (list, tuple)):
        return [
            written_value(item, remarks, f"{where}[{index}]", keep_nulls=keep_nulls) for index, item in enumerate(value)
        ]
    if isinstance(value, float):
        return _number(value, remarks, where)
    if isinstance(value, (datetime.date, datetime.time)):
        remarks.add(TIMES, where)
        return _time(value)
    if isinstance(value, str):
        return _text(value, where)
    if value is None or isinstance(value, (bool, int)):
        return value
    raise NotJson(f"{where!r} is a {type(value).__name__}, which JSON cannot hold")


def read_arguments(text: str, remarks: ValueRemarks) -> dict[str, Any]:
    """The object in a JSON text; an empty text is an object without keys. Raises NotJson.

    Nulls in it stay. A repeated key and a number that cannot be stored exactly are among the remarks.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, times in Counter(key for key, _ in items).items():
            if times > 1:
                remarks.add(REPEATED, key)
        return dict(items)

    def number(digits: str) -> float:
        value = float(digits)
        if value in (float("inf"), float("-inf")):
            raise NotJson(f"{digits} is beyond what a number can hold")
        if Decimal(digits) != Decimal(repr(value)):
            remarks.add(INEXACT, digits)
        return value

    def no_number(name: str) -> Any:
        raise NotJson(f"{name} is not a JSON number")

    if not text.strip():
        return {}
    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_float=number, parse_constant=no_number)
        refuse_odd_value(value, "it")
    except NotJson:
        raise
    except OddRow as error:
        raise NotJson(str(error).rstrip(".")) from None
    except (ValueError, RecursionError) as error:
        raise NotJson(f"it is not valid JSON: {str(error).rstrip('.') or 'too deep'}") from None
    if not isinstance(value, dict):
        raise NotJson("it is JSON, but not an object")
    result: dict[str, Any] = written_value(value, remarks, "", keep_nulls=True)
    return result


def _number(value: float, remarks: ValueRemarks, where: str) -> float | int:
    if value in (float("inf"), float("-inf")):
        raise NotJson(f"{where!r} is infinite, or beyond what a number can hold")
    if abs(value) >= _EXACT_WHOLE:
        remarks.add(INEXACT, where)
    if not value.is_integer() or abs(value) >= _EXACT_WHOLE:
        return value
    remarks.add(WHOLE, where)
    return int(value)


def _time(value: datetime.date | datetime.time) -> str:
    """ISO 8601; only the date if a table turned a date into midnight."""
    midnight = isinstance(value, datetime.datetime) and value.tzinfo is None and value.time() == datetime.time()
    return value.isoformat()[:10] if midnight else value.isoformat()


def _text(value: str, where: str) -> str:
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise NotJson(f"{where!a} has half a surrogate pair, which is not valid text") from None
    return value
