"""Reads the values in a row's columns: texts, messages, system prompts, tools. Errors are one line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mlx_nb.config.checks import CALLING, MESSAGE_ROLES
from mlx_nb.data.rows.message_lists import to_messages
from mlx_nb.data.rows.roles import calls_in_text, joined_calls, known_role, normalized_call, normalized_tool
from mlx_nb.data.sources.plain_values import plain_value
from mlx_nb.data.sources.row_values import DEEPEST, MOST_DIGITS, is_known, refuse_odd_value
from mlx_nb.errors import DataError, and_more, did_you_mean, shown

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Columns:
    """Which columns hold what. None = found by their usual names.

    In the settings these are `chat_feature` (messages), `prompt_feature`, `completion_feature`, `text_feature`,
    `system_feature`, `chosen_feature`, `rejected_feature`, `label_feature`, `answer_feature` and
    `preference_score_feature`. Naming a column also chooses the shape: with `prompt` set, a row is read as prompt +
    completion even if it also has a `messages` column.

    roles  the user's own role words, and the roles they map to
    """

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    system: str | None = None
    tools: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    label: str | None = None
    answer: str | None = None
    preference_score: str | None = None
    roles: Mapping[str, str] = field(default_factory=dict)


AUTOMATIC = Columns()


@contextmanager
def errors_at(row: int | None, location: str) -> Iterator[None]:
    """A context that prefixes errors with the row and its location, keeping their type."""
    try:
        yield
    except DataError as error:
        raise type(error)(_place(row, location) + str(error)) from None


def _place(row: int | None, location: str) -> str:
    if row is None:
        return f"{location}: " if location else ""
    return f"row {row} ({location}): " if location else f"row {row}: "


def read_system(record: Mapping[str, Any], columns: Columns) -> str | None:
    """The system prompt in the row's own column; None without one."""
    column = columns.system or "system"
    if columns.system and column not in record:
        raise DataError(f"{missing_column(record, (column,))} A row without a system prompt needs null there.")
    value = record.get(column)
    return None if value is None else read_text(value, f"`{column}`") or None


def read_tools(record: Mapping[str, Any], columns: Columns) -> list[dict[str, Any]] | None:
    """The descriptions of the tools that the row offers; None without any."""
    # Before there were tools, exports of OpenAI had functions.
    usual = "functions" if record.get("tools") is None and record.get("functions") is not None else "tools"
    column = columns.tools or usual
    if columns.tools and column not in record:
        raise DataError(f"{missing_column(record, (column,))} A row without tools needs null there.")
    value = decoded(record.get(column), column)
    value = writable(value, f"`{column}`")
    if value is None or value == "":
        return None
    if isinstance(value, (list, tuple)):
        value = [decoded(tool, f"{column}[{index}]") for index, tool in enumerate(value)]
    if not isinstance(value, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in value):
        raise DataError(f"`{column}` must be a list of tool descriptions (objects), not {kind_of_value(value)}.")
    return [normalized_tool(tool) for tool in value] or None


def read_messages(value: Any, column: str, roles: Mapping[str, str] = AUTOMATIC.roles) -> Messages:
    """Read a list of messages, also from JSON text; at least one, each with the keys `role` and `content`.

    Messages that are tool calls become part of the assistant's turn before them. `roles` as in Columns.
    """
    value = decoded(value, column)
    value = to_messages(writable(value, f"`{column}`"))
    if not isinstance(value, (list, tuple)):
        raise DataError(
            f"`{column}` must be a list of messages such as {{role: user, content: ...}}, not {kind_of_value(value)}."
        )
    if not value:
        raise DataError(f"`{column}` has no messages. Drop the row.")
    return joined_calls([_read_message(message, f"`{column}[{index}]`", roles) for index, message in enumerate(value)])


def _read_message(value: Any, where: str, roles: Mapping[str, str]) -> tuple[dict[str, Any], bool]:
    """A message, and whether it is only a tool call."""
    if not isinstance(value, Mapping):
        raise DataError(f"{where} must be an object with role and content, not {kind_of_value(value)}.")
    fields = {key: item for key, item in value.items() if item is not None}
    role_key = "role" if "role" in fields else "from"
    content_key = "content" if "content" in value or "value" not in value else "value"
    given = fields.pop(role_key, None)
    role = _read_role(given, value, where, roles)
    content = fields.pop(content_key, None)
    if calls := _read_calls(fields, where):
        fields["tool_calls"] = calls
    only_calls = role == CALLING
    if only_calls:
        role = "assistant"
        if not calls:
            content, fields["tool_calls"] = None, calls_in_text(content, given, where)
    if content is not None:
        content = _read_content(content, f"content of {where}")
    elif "tool_calls" not in fields:
        missing = "is null" if content_key in value else f"is missing (it has: {listed(value)})"
        raise DataError(f"content of {where} {missing}. Give it text, or drop the row.")
    _check_training_marks(fields, where)
    return {"role": role, "content": content, **fields}, only_calls


def _read_calls(fields: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The tool calls of a message, removed from its fields; also an older export's function_call."""
    older = decoded(fields.pop("function_call", None), f"{where.strip('`')}.function_call")
    calls = decoded(fields.pop("tool_calls", None), f"{where.strip('`')}.tool_calls")
    if older is not None and not isinstance(older, Mapping):
        raise DataError(f"function_call of {where} must be an object, not {kind_of_value(older)}.")
    if older is not None and calls:
        raise DataError(f"{where} has both tool_calls and function_call. Remove one of them.")
    calls = [older] if older is not None else [] if calls is None else calls
    if isinstance(calls, (list, tuple)):
        calls = [decoded(call, f"{where.strip('`')}.tool_calls[{index}]") for index, call in enumerate(calls)]
    if not isinstance(calls, (list, tuple)) or not all(isinstance(call, Mapping) for call in calls):
        raise DataError(f"tool_calls of {where} must be a list of objects, not {kind_of_value(calls)}.")
    return [normalized_call(call) for call in calls]


def _read_role(role: Any, message: Mapping[str, Any], where: str, roles: Mapping[str, str]) -> str:
    known = ", ".join(MESSAGE_ROLES)
    if role is None:
        raise DataError(f"{where} has no role (it has: {listed(message)}). Known roles: {known}.")
    if not isinstance(role, str):
        raise DataError(f"role of {where} must be text, not {kind_of_value(role)}. Known roles: {known}.")
    return known_role(role, roles, where)


LARGEST_WEIGHT = 1_000_000

# The names of text parts in the APIs that messages come from.
_TEXT_PARTS = ("text", "input_text", "output_text")


def _read_content(content: Any, where: str) -> str:
    if not isinstance(content, (list, tuple)):
        return read_text(content, where)
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(read_text(part, f"text part in {where}"))
            continue
        if not isinstance(part, Mapping) or part.get("type", "text") not in _TEXT_PARTS:
            what = shown(part.get("type")) if isinstance(part, Mapping) else kind_of_value(part)
            raise DataError(f"{where} has a part that is not text ({what}). Only text can be trained.")
        texts.append(read_text(part.get("text"), f"text part in {where}"))
    return "".join(texts)


def _check_training_marks(message: Mapping[str, Any], where: str) -> None:
    if not isinstance(message.get("train", True), bool):
        raise DataError(f"train of {where} must be true or false, not {shown(message['train'])}.")
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= LARGEST_WEIGHT:
        raise DataError(
            f"weight of {where} must be a number of at least 0 and at most {LARGEST_WEIGHT:,}, not {shown(weight)}."
        )


def read_text(value: Any, where: str) -> str:
    """A text that can be tokenized."""
    if not isinstance(value, str):
        raise DataError(f"{where} must be text, not {kind_of_value(value)}.")
    _refuse_half_pair(value, where)
    return value if type(value) is str else str.__str__(value)


def _refuse_half_pair(text: str, where: str) -> None:
    """Refuse lone surrogates, on which a tokenizer would fail later, far away from the row."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} has half a surrogate pair ({text[error.start]!a} at character {error.start}), which "
            "is no valid text. Remove it."
        ) from None


def writable(value: Any, where: str) -> Any:
    """A value as JSON would hold it. Raises DataError if a text or key inside is invalid, or it nests endlessly.

    Templates may write every field of a message, so all of them count: reasoning, names, arguments, keys.
    """
    refuse_odd_value(value, where)
    value = plain_value(value)
    level: list[tuple[Any, str]] = [(value, where)]
    while level:
        below: list[tuple[Any, str]] = []
        for item, place in level:
            if isinstance(item, str):
                _refuse_half_pair(item, place)
            elif isinstance(item, dict):
                for key, inner in item.items():
                    if not isinstance(key, str):
                        raise DataError(f"{where} has the key {shown(key)}, and keys are text. Write it in quotes.")
                    below += [(key, f"a key of {place}"), (inner, f"{key!a} in {where}")]
            elif isinstance(item, list):
                below += [(inner, place) for inner in item]
            elif not is_known(item):
                raise DataError(
                    f"{place} is a {type(item).__name__}, which cannot be turned into text. Write it as text."
                )
        level = below
    return value


def decoded(value: Any, column: str) -> Any:
    """The list in a JSON text, as Parquet and CSV files often hold it; other values unchanged."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        found = json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(f"`{column}` is text, but not the JSON of a list ({error}).") from None
    except RecursionError:
        raise DataError(f"`{column}` is nested more than {DEEPEST} deep. Drop the row.") from None
    except ValueError:
        raise DataError(f"`{column}` has a whole number of more than {MOST_DIGITS:,} digits. Drop the row.") from None
    refuse_odd_value(found, f"`{column}`")
    return found


def missing_column(record: Mapping[str, Any], needed: tuple[str, ...]) -> str:
    """The error about needed columns, of which one must exist: which is missing, or is null."""
    for column in needed:
        if column not in record:
            near = did_you_mean(column, map(str, record))
            return f"no column {column!r}. The row has: {listed(record)}.{near}"
    empty = next(column for column in needed if record[column] is None)
    return f"`{empty}` is empty (null). Fill it or drop the row."


def by_example(record: Mapping[str, Any], texts: Sequence[str], others: Sequence[str] = ()) -> str:
    """Advice with the settings `texts` and `others` filled in with the row's own columns, in their order.

    Which is which the user has to decide; empty if the row has too few columns, or their names are not plain words.
    """
    named = {name: value for name, value in record.items() if isinstance(name, str) and name.isidentifier()}
    of_texts = [name for name, value in named.items() if isinstance(value, str)]
    of_others = [name for name, value in named.items() if isinstance(value, bool | int)]
    if len(of_texts) < len(texts) or len(of_others) < len(others):
        return ""
    lines = [f"`{setting}: {name}`" for setting, name in [*zip(texts, of_texts), *zip(others, of_others)]]
    together = f"{', '.join(lines[:-1])} and {lines[-1]}" if lines[1:] else lines[0]
    return f"Say in the settings which column is what, for example {together}."


def listed(names: Iterable[Any]) -> str:
    """The first eight names in quotes."""
    return and_more([shown(name if isinstance(name, str) else str(name)) for name in names], 8)


def kind_of_value(value: Any) -> str:
    """The type of a value, in the words of a data file."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return f"the number {value}" if isinstance(value, float) or abs(value) < 10**80 else "a huge number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, (list, tuple)):
        return "a list"
    return "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}"
