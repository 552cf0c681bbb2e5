"""Recognizes rows to imitate: a conversation, a prompt with its completion, or plain text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_nb.data.rows.columns import (
    Columns,
    Messages,
    by_example,
    kind_of_value,
    listed,
    missing_column,
    read_messages,
    read_system,
    read_text,
    read_tools,
)
from mlx_nb.data.rows.content import TextOrMessages
from mlx_nb.data.rows.forms import (
    ANSWERING_COLUMNS,
    ASKING_COLUMNS,
    CONVERSATION_COLUMNS,
    asking_columns,
    chosen_column,
    dialog,
    looks_like,
    question,
    read_text_or_messages,
    rejected_column,
)
from mlx_nb.errors import DataError, did_you_mean

FORMATS = "messages | conversations | prompt + completion | instruction (+ input) + output | text"

_PROMPT_WORDS = ("prompt", "question", "query", "instruction", "input", "problem")
_COMPLETION_WORDS = ("completion", "chosen", "answer", "response", "output", "reply", "solution", "target")


class _Imitated:
    """Common base of rows to imitate, whose answers are neither judged nor rewarded."""

    def question(self) -> None:
        """None: these rows are compared as a whole, not by their prompts."""

    def ratings(self) -> dict[str, Any]:
        """Empty: there are no ratings."""
        return {}

    def reward_columns(self) -> dict[str, Any]:
        """Empty: there are no rewards."""
        return {}


@dataclass(frozen=True)
class ChatRow(_Imitated):
    """A conversation. `messages` have `role` and `content`; `train: False` marks one that is never trained.

    `from_texts`: the row has a prompt and a completion as strings, perhaps with a system prompt or tools.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    from_texts: bool = field(default=False, compare=False)

    shape = "chat"

    def parts(self) -> dict[str, TextOrMessages]:
        """The messages."""
        return {"": self.messages}

    def distinctive(self) -> TextOrMessages:
        """The messages."""
        return self.messages


@dataclass(frozen=True)
class PromptCompletionRow(_Imitated):
    """A prompt and its completion, as strings."""

    prompt: str
    completion: str

    from_texts = False
    shape = "prompt + completion"

    def parts(self) -> dict[str, TextOrMessages]:
        """Both texts."""
        return {"prompt": self.prompt, "completion": self.completion}

    def distinctive(self) -> TextOrMessages:
        """Both texts."""
        return f"{self.prompt}\n{self.completion}"


@dataclass(frozen=True)
class TextRow(_Imitated):
    """Plain text, trained from its first to its last token."""

    text: str

    from_texts = False
    shape = "text"

    def parts(self) -> dict[str, TextOrMessages]:
        """Empty: a plain text has no turns."""
        return {}

    def distinctive(self) -> TextOrMessages:
        """The text."""
        return self.text


Row = ChatRow | PromptCompletionRow | TextRow

_Builder = Callable[[Mapping[str, Any], Columns], Row]


def token_row(record: Mapping[str, Any], columns: Columns) -> Row:
    """The content of one row; the first of these shapes whose columns exist and are not null.

    messages                        ChatRow, also from a JSON string; `from`/`value` count as `role`/`content`
    conversations, conversation     the same (ShareGPT)
    prompt + completion             PromptCompletionRow; ChatRow if both are messages (the prompt's with
                                    `train: False`) or if the row has a `system` or `tools` column
    instruction (+ input) + output  ChatRow of a user and an assistant message (Alpaca), after those of a `history`;
                                    also query, context and response (Dolly, ms-swift)
    text                            TextRow; ChatRow if the text is a dialog of `Human:` and `Assistant:` (HH-RLHF)

    A `system` column becomes the first message, unless the conversation already starts with one. `record` is not
    changed. Raises DataError in one line.
    """
    return _builder(record, columns)(record, columns)


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
        raise DataError(missing_column(record, named[0][0]))
    raise DataError(_unknown_shape(record))


def _chat_from(column: str) -> _Builder:
    def build(record: Mapping[str, Any], columns: Columns) -> Row:
        return chat_row(read_messages(record[column], column, columns.roles), record, columns)

    return build


def _prompt_completion(record: Mapping[str, Any], columns: Columns) -> Row:
    prompt_column, completion_column = columns.prompt or "prompt", columns.completion or "completion"
    prompt, completion = (
        _text_or_messages(record[column], column, columns.roles) for column in (prompt_column, completion_column)
    )
    if isinstance(completion, str) and isinstance(record[prompt_column], str) and dialog(record[prompt_column]):
        completion = as_messages("assistant", completion.strip())
    if isinstance(completion, list):
        prompt = as_messages("user", prompt)
        untrained_prompt = [{**message, "train": False} for message in prompt]
        return chat_row(untrained_prompt + completion, record, columns)
    if isinstance(prompt, list):
        raise DataError(
            f"`{prompt_column}` is {kind_of_value(prompt)} and `{completion_column}` is {kind_of_value(completion)}. "
            "Make both text, or both lists of messages."
        )
    if read_system(record, columns) or read_tools(record, columns):
        return chat_row(_turn(prompt, completion), record, columns, from_texts=True)
    return PromptCompletionRow(prompt, completion)


def _text_or_messages(value: Any, column: str, roles: Mapping[str, str]) -> Any:
    if isinstance(value, (list, tuple, Mapping)):
        return read_text_or_messages(value, column, roles)
    return read_text_or_messages(read_text(value, f"`{column}`"), column, roles)


def _alpaca(record: Mapping[str, Any], columns: Columns) -> Row:
    asking, answering = asking_columns(record) or ("instruction", "output")
    prompt = question(record, asking, columns.roles)
    answer = _text_or_messages(record[answering], answering, columns.roles)
    if isinstance(prompt, str) and isinstance(answer, str):
        return chat_row(_turn(prompt, answer), record, columns, from_texts=True)
    return chat_row([*as_messages("user", prompt), *as_messages("assistant", answer)], record, columns)


def _text_row(record: Mapping[str, Any], columns: Columns) -> Row:
    column = columns.text or "text"
    if columns.system:
        raise DataError(f"system_feature has no effect on rows of plain text (`{column}`). Remove it.")
    text = read_text(record[column], f"`{column}`")
    if not text:
        raise DataError(f"`{column}` is empty. Drop the row.")
    if columns.text:
        return TextRow(text)
    if {"role", "parent_id"} <= set(record):
        raise DataError(looks_like(record))
    content = read_text_or_messages(text, column, columns.roles)
    return TextRow(content) if isinstance(content, str) else chat_row(content, record, columns)


_SHAPES: tuple[tuple[tuple[str, ...], _Builder], ...] = (
    *(((column,), _chat_from(column)) for column in CONVERSATION_COLUMNS),
    (("prompt", "completion"), _prompt_completion),
    *(((asking, answering), _alpaca) for asking in ASKING_COLUMNS for answering in ANSWERING_COLUMNS),
    (("text",), _text_row),
)


def _turn(prompt: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def as_messages(role: str, content: str | Messages) -> Messages:
    """The messages themselves, or a text as one message of this role."""
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def chat_row(messages: Messages, record: Mapping[str, Any], columns: Columns, *, from_texts: bool = False) -> ChatRow:
    """The messages with the row's system prompt first, unless they start with one, and with its tools."""
    system = read_system(record, columns)
    if system and messages[0]["role"] == "system":
        if columns.system and messages[0]["content"] != system:
            raise DataError(
                f"`{columns.system}` (system_feature) and the first message are two different system "
                "prompts. Remove one of them."
            )
    elif system:
        messages = [{"role": "system", "content": system}, *messages]
    return ChatRow(messages, read_tools(record, columns), from_texts)


def raw_strings(row: ChatRow) -> PromptCompletionRow:
    """The prompt and the completion of a row `from_texts`. Raises DataError for one with a system prompt or tools."""
    refuse_context(row.messages, row.tools)
    prompt, answer = row.messages
    return PromptCompletionRow(prompt["content"], answer["content"])


def refuse_context(messages: Messages, tools: list[dict[str, Any]] | None) -> None:
    """Raise DataError for a system prompt or tools in a row whose strings are used as raw text."""
    what = "its system prompt" if messages[0]["role"] == "system" else "its tools" if tools else ""
    if what:
        raise DataError(
            f"the row's strings are raw text, in which {what} cannot be told apart. Put it into the prompt, remove it, "
            "or use a chat template with `prompt_format: chat`."
        )


def _unknown_shape(record: Mapping[str, Any]) -> str:
    if not record:
        return f"the row has no columns. Known: {FORMATS}."
    for needed, _ in _SHAPES:
        if all(column in record for column in needed):
            return missing_column(record, needed)
    return f"no known shape in the columns {listed(record)}. Known: {FORMATS}. {_nearest_fix(record)}"


def _nearest_fix(record: Mapping[str, Any]) -> str:
    """The setting or renaming that would most likely make this row readable."""
    if chosen_column(record) and rejected_column(record):
        return looks_like(record)
    for column, value in record.items():
        first = value[0] if isinstance(value, (list, tuple)) and value else None
        if isinstance(first, Mapping) and {"role", "from"} & set(first):
            return f"Set chat_feature: {column}."
    prompt = next((word for word in _PROMPT_WORDS if word in record), None)
    completion = next((word for word in _COMPLETION_WORDS if word in record), None)
    if prompt and completion:
        settings = [f"prompt_feature: {prompt}"] if prompt != "prompt" else []
        settings += [f"completion_feature: {completion}"] if completion != "completion" else []
        kto = " With `label` it is a row for `method: kto`." if "label" in record else ""
        return f"Set {' and '.join(settings)}.{kto}"
    known = looks_like(record)
    if known:
        return known
    standard = dict.fromkeys(column for needed, _ in _SHAPES for column in needed)
    for column in map(str, record):
        near = did_you_mean(column.lower(), standard)
        if near and column not in standard:
            return f"Column {column!r}:{near}"
    if len(record) == 1 and isinstance(next(iter(record.values())), str):
        return f"Set text_feature: {next(iter(record))}."
    return (
        by_example(record, ("prompt_feature", "completion_feature"))
        or "Name your columns with chat_feature, or prompt_feature and completion_feature, or text_feature."
    )
