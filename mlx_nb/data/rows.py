"""One row of data to one of the known shapes: a conversation, a prompt with its completion, or plain text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_nb.errors import DataError, did_you_mean

FORMATS = "messages | conversations | prompt + completion | instruction (+ input) + output | text"

# The right side is the word of the chat templates; the left side adds the words of ShareGPT files.
_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "function",
    "ipython": "ipython",
}
_PROMPT_WORDS = ("prompt", "question", "query", "instruction", "input", "problem")
_COMPLETION_WORDS = ("completion", "chosen", "answer", "response", "output", "reply", "solution", "target")


@dataclass(frozen=True)
class Columns:
    """Which columns hold what. None = found by their usual names.

    In the settings these are `chat_feature` (messages), `prompt_feature`, `completion_feature`,
    `text_feature` and `system_feature`. Naming a column also chooses the shape: with `prompt` set, a row is
    read as prompt + completion even when it has a `messages` column too.
    """

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    system: str | None = None
    tools: str | None = None


@dataclass(frozen=True)
class ChatRow:
    """A conversation. `messages` have `role` and `content`; `train: False` marks one never trained."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class PromptCompletionRow:
    """A prompt and the text that should follow it."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class TextRow:
    """Plain text, trained from its first to its last token."""

    text: str


Row = ChatRow | PromptCompletionRow | TextRow

_Builder = Callable[[Mapping[str, Any], Columns], Row]
_AUTOMATIC = Columns()


def recognise(
    record: Mapping[str, Any], columns: Columns = _AUTOMATIC, *, row: int | None = None, location: str = ""
) -> Row:
    """The shape of one row; the first of these whose columns are there and not null.

    messages                        ChatRow, also from a JSON string; `from`/`value` count as `role`/`content`
    conversations, conversation     the same (ShareGPT)
    prompt + completion             PromptCompletionRow; ChatRow if both are message lists (the prompt's with
                                    `train: False`) or if the row has a `system` or `tools` column
    instruction (+ input) + output  ChatRow of a user and an assistant message (Alpaca)
    text                            TextRow

    A `system` column becomes the first message, unless the conversation already starts with one. `record` is
    not changed. `row` and `location` name the row in errors. Raises DataError: one line, what is wrong.
    """
    try:
        return _builder(record, columns)(record, columns)
    except DataError as error:
        raise DataError(_place(row, location) + str(error)) from None


def _place(row: int | None, location: str) -> str:
    if row is None:
        return f"{location}: " if location else ""
    return f"row {row} ({location}): " if location else f"row {row}: "


def _builder(record: Mapping[str, Any], columns: Columns) -> _Builder:
    named: list[tuple[tuple[str, ...], _Builder]] = []
    if columns.messages:
        named.append(((columns.messages,), _chat_from(columns.messages)))
    if columns.prompt or columns.completion:
        named.append(((columns.prompt or "prompt", columns.completion or "completion"), _prompt_completion))
    if columns.text:
        named.append(((columns.text,), _text_row))
    for needed, build in named or _SHAPES:
        if all(record.get(column) is not None for column in needed):
            return build
    if named:
        raise DataError(_missing(record, named[0][0]))
    raise DataError(_unknown_shape(record))


def _chat_from(column: str) -> _Builder:
    def build(record: Mapping[str, Any], columns: Columns) -> Row:
        return _chat(_read_messages(record[column], column), record, columns)

    return build


def _prompt_completion(record: Mapping[str, Any], columns: Columns) -> Row:
    prompt_column, completion_column = columns.prompt or "prompt", columns.completion or "completion"
    prompt, completion = record[prompt_column], record[completion_column]
    if isinstance(prompt, (list, tuple)) and isinstance(completion, (list, tuple)):
        asked = [{**message, "train": False} for message in _read_messages(prompt, prompt_column)]
        return _chat(asked + _read_messages(completion, completion_column), record, columns)
    if isinstance(prompt, (list, tuple)) or isinstance(completion, (list, tuple)):
        raise DataError(
            f"`{prompt_column}` is {_kind(prompt)} and `{completion_column}` is {_kind(completion)}. "
            "Make both text, or both lists of messages."
        )
    prompt, completion = _text(prompt, f"`{prompt_column}`"), _text(completion, f"`{completion_column}`")
    if _system_text(record, columns) or _tools(record, columns):
        return _chat(_turn(prompt, completion), record, columns)
    return PromptCompletionRow(prompt, completion)


def _alpaca(record: Mapping[str, Any], columns: Columns) -> Row:
    asked = _text(record["instruction"], "`instruction`")
    if record.get("input"):
        asked = f"{asked}\n\n{_text(record['input'], '`input`')}"
    return _chat(_turn(asked, _text(record["output"], "`output`")), record, columns)


def _text_row(record: Mapping[str, Any], columns: Columns) -> Row:
    column = columns.text or "text"
    if columns.system:
        raise DataError(f"system_feature has no effect on rows of plain text (`{column}`). Remove it.")
    text = _text(record[column], f"`{column}`")
    if not text:
        raise DataError(f"`{column}` is empty. Drop the row.")
    return TextRow(text)


_SHAPES: tuple[tuple[tuple[str, ...], _Builder], ...] = (
    (("messages",), _chat_from("messages")),
    (("conversations",), _chat_from("conversations")),
    (("conversation",), _chat_from("conversation")),
    (("prompt", "completion"), _prompt_completion),
    (("instruction", "output"), _alpaca),
    (("text",), _text_row),
)


def _turn(asked: str, answered: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def _chat(messages: list[dict[str, Any]], record: Mapping[str, Any], columns: Columns) -> ChatRow:
    system = _system_text(record, columns)
    if system and messages[0]["role"] == "system":
        if columns.system and messages[0]["content"] != system:
            raise DataError(
                f"`{columns.system}` (system_feature) and the first message are two different system "
                "prompts. Remove one of them."
            )
    elif system:
        messages = [{"role": "system", "content": system}, *messages]
    return ChatRow(messages, _tools(record, columns))


def _system_text(record: Mapping[str, Any], columns: Columns) -> str | None:
    column = columns.system or "system"
    if columns.system and column not in record:
        raise DataError(f"{_missing(record, (column,))} A row without a system prompt needs null there.")
    value = record.get(column)
    return None if value is None else _text(value, f"`{column}`") or None


def _tools(record: Mapping[str, Any], columns: Columns) -> list[dict[str, Any]] | None:
    column = columns.tools or "tools"
    if columns.tools and column not in record:
        raise DataError(f"{_missing(record, (column,))} A row without tools needs null there.")
    value = _decoded(record.get(column), column)
    if value is None or value == "":
        return None
    if not isinstance(value, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in value):
        raise DataError(f"`{column}` must be a list of tool descriptions (objects), not {_kind(value)}.")
    return [dict(tool) for tool in value] or None


def _read_messages(value: Any, column: str) -> list[dict[str, Any]]:
    value = _decoded(value, column)
    if not isinstance(value, (list, tuple)):
        raise DataError(
            f"`{column}` must be a list of messages such as {{role: user, content: ...}}, not {_kind(value)}."
        )
    if not value:
        raise DataError(f"`{column}` has no messages. Drop the row.")
    return [_read_message(message, f"`{column}[{index}]`") for index, message in enumerate(value)]


def _read_message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(f"{where} must be an object with role and content, not {_kind(value)}.")
    fields = {key: item for key, item in value.items() if item is not None}
    role_key = "role" if "role" in fields else "from"
    content_key = "content" if "content" in value or "value" not in value else "value"
    role = _read_role(fields.pop(role_key, None), value, where)
    content = fields.pop(content_key, None)
    if "tool_calls" in fields:
        calls = _decoded(fields.pop("tool_calls"), f"{where.strip('`')}.tool_calls")
        if not isinstance(calls, (list, tuple)) or not all(isinstance(call, Mapping) for call in calls):
            raise DataError(f"tool_calls of {where} must be a list of objects, not {_kind(calls)}.")
        if calls:
            fields["tool_calls"] = [dict(call) for call in calls]
    if content is not None:
        content = _read_content(content, f"content of {where}")
    elif "tool_calls" not in fields:
        missing = "is null" if content_key in value else f"is missing (it has: {_listed(value)})"
        raise DataError(f"content of {where} {missing}. Give it text, or drop the row.")
    _check_training_marks(fields, where)
    return {"role": role, "content": content, **fields}


def _read_role(role: Any, message: Mapping[str, Any], where: str) -> str:
    known = ", ".join(dict.fromkeys(_ROLES.values()))
    if role is None:
        raise DataError(f"{where} has no role (it has: {_listed(message)}). Known roles: {known}.")
    if not isinstance(role, str):
        raise DataError(f"role of {where} must be text, not {_kind(role)}. Known roles: {known}.")
    if role not in _ROLES:
        near = did_you_mean(role.lower(), _ROLES)
        raise DataError(f"{where} has the unknown role {role!r}.{near} Known roles: {known}.")
    return _ROLES[role]


def _read_content(content: Any, where: str) -> str:
    if not isinstance(content, (list, tuple)):
        return _text(content, where)
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type", "text") != "text":
            shown = repr(part.get("type")) if isinstance(part, Mapping) else _kind(part)
            raise DataError(f"{where} has a part that is not text ({shown}). Only text can be trained.")
        texts.append(_text(part.get("text"), f"text part in {where}"))
    return "".join(texts)


def _check_training_marks(message: Mapping[str, Any], where: str) -> None:
    if not isinstance(message.get("train", True), bool):
        raise DataError(f"train of {where} must be true or false, not {message['train']!r}.")
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
        raise DataError(f"weight of {where} must be a number of at least 0, not {weight!r}.")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} must be text, not {_kind(value)}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        # A tokenizer fails on it later, far away from the row.
        raise DataError(
            f"{where} has half a surrogate pair ({value[error.start]!a} at character {error.start}), which "
            "is no valid text. Remove it."
        ) from None
    return value


def _decoded(value: Any, column: str) -> Any:
    """Parquet and CSV files often hold lists as JSON text."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"`{column}` is text, but not the JSON of a list ({error}).") from None


def _missing(record: Mapping[str, Any], needed: tuple[str, ...]) -> str:
    for column in needed:
        if column not in record:
            near = did_you_mean(column, map(str, record))
            return f"no column {column!r}. The row has: {_listed(record)}.{near}"
    empty = next(column for column in needed if record[column] is None)
    return f"`{empty}` is empty (null). Fill it or drop the row."


def _unknown_shape(record: Mapping[str, Any]) -> str:
    if not record:
        return f"the row has no columns. Known: {FORMATS}."
    for needed, _ in _SHAPES:
        if all(column in record for column in needed):
            return _missing(record, needed)
    return f"no known shape in the columns {_listed(record)}. Known: {FORMATS}. {_nearest_fix(record)}"


def _nearest_fix(record: Mapping[str, Any]) -> str:
    """The setting or the renaming that would most likely make this row readable."""
    for column, value in record.items():
        first = value[0] if isinstance(value, (list, tuple)) and value else None
        if isinstance(first, Mapping) and {"role", "from"} & set(first):
            return f"Set chat_feature: {column}."
    prompt = next((word for word in _PROMPT_WORDS if word in record), None)
    completion = next((word for word in _COMPLETION_WORDS if word in record), None)
    if prompt and completion:
        settings = [f"prompt_feature: {prompt}"] if prompt != "prompt" else []
        settings += [f"completion_feature: {completion}"] if completion != "completion" else []
        return f"Set {' and '.join(settings)}."
    standard = dict.fromkeys(column for needed, _ in _SHAPES for column in needed)
    for column in map(str, record):
        near = did_you_mean(column.lower(), standard)
        if near and column not in standard:
            return f"Column {column!r}:{near}"
    if len(record) == 1 and isinstance(next(iter(record.values())), str):
        return f"Set text_feature: {next(iter(record))}."
    return "Name your columns with chat_feature, or prompt_feature and completion_feature, or text_feature."


def _listed(names: Iterable[Any]) -> str:
    shown = [repr(str(name)) for name in names]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")


def _kind(value: Any) -> str:
    """What a value is, in the words of a data file."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return "text"
    if isinstance(value, (list, tuple)):
        return "a list"
    return "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}"
