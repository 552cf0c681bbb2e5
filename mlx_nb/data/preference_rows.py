"""Rows that judge answers: a chosen and a rejected answer to one prompt, or one answer with a label."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_nb.data.row_values import (
    Columns,
    Messages,
    decoded,
    kind_of_value,
    missing_column,
    read_messages,
    read_system,
    read_text,
    read_tools,
)
from mlx_nb.data.rows import chat_row
from mlx_nb.errors import DataError

PAIR_FORMATS = "prompt + chosen + rejected, or chosen + rejected as whole conversations"
LABEL_FORMATS = "prompt + completion + label, or messages + label"

_LABELS: dict[str | float, bool] = {"true": True, "false": False, "1": True, "0": False, 1.0: True, 0.0: False}


@dataclass(frozen=True)
class PreferenceRow:
    """Two answers to one prompt, the first better. All three are texts, or all three are messages.

    weight  how much the pair counts (`preference_score`)
    margin  by how much the first is better
    """

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    tools: list[dict[str, Any]] | None = None
    weight: float = 1.0
    margin: float = 0.0


@dataclass(frozen=True)
class LabelledRow:
    """An answer to a prompt, and whether it is a good one. Both are texts, or both are messages."""

    prompt: str | Messages
    completion: str | Messages
    label: bool
    tools: list[dict[str, Any]] | None = None


class NothingToPrefer(DataError):
    """The chosen and the rejected answer of a row are the same, as they stand or as the tokens that are trained."""


def preference_row(record: Mapping[str, Any], columns: Columns) -> PreferenceRow:
    """The pair in a row: texts, answers as messages, or whole conversations (the part they share is the prompt).

    `{"messages": [...]}` counts as the list in it. Raises NothingToPrefer for two answers that are the same, and
    DataError for everything else that is no pair.
    """
    names = (columns.chosen or "chosen", columns.rejected or "rejected")
    _require(record, names, PAIR_FORMATS)
    chosen, rejected = (read_said(record[name], name) for name in names)
    if isinstance(chosen, str) != isinstance(rejected, str):
        kinds = [kind_of_value(answer) for answer in (chosen, rejected)]
        raise DataError(f"`{names[0]}` is {kinds[0]} and `{names[1]}` is {kinds[1]}. Make both of the same kind.")
    if chosen == rejected:
        raise NothingToPrefer(f"`{names[0]}` and `{names[1]}` are the same: there is nothing to prefer. Drop the row.")
    if _whole(chosen) or _whole(rejected):
        prompt, chosen, rejected = _parted(chosen, rejected, names)
        _check_asked(record, columns, prompt)
    else:
        prompt = _prompt(record, columns, PAIR_FORMATS)
    prompt, (chosen, rejected), tools = with_context(prompt, (chosen, rejected), record, columns)
    weight = _number(record, columns.preference_score, "preference_score", 1.0)
    if weight == 0:
        name = columns.preference_score or "preference_score"
        raise DataError(f"`{name}` is the weight of the pair and must be above 0. Drop the row.")
    return PreferenceRow(prompt, chosen, rejected, tools, weight, _number(record, None, "margin", 0.0))


def labelled_row(record: Mapping[str, Any], columns: Columns) -> LabelledRow:
    """The answer in a row and its label: prompt + completion, or messages (what follows the last user message).

    Raises DataError for everything that is neither.
    """
    name = columns.label or "label"
    _require(record, (name,), LABEL_FORMATS)
    label = _label(record[name], name)
    talk = columns.messages or "messages"
    if columns.messages or (record.get(talk) is not None and not (columns.prompt or columns.completion)):
        _require(record, (talk,), LABEL_FORMATS)
        prompt, completion = _last_answer(read_messages(record[talk], talk), talk)
    else:
        answer_name = columns.completion or "completion"
        prompt = _prompt(record, columns, LABEL_FORMATS)
        _require(record, (answer_name,), LABEL_FORMATS)
        completion = read_said(record[answer_name], answer_name)
        if _whole(completion):
            first = completion[0]["role"]
            raise DataError(f"`{answer_name}` begins with the {first}; it must begin with the assistant's answer.")
    prompt, (completion,), tools = with_context(prompt, (completion,), record, columns)
    return LabelledRow(prompt, completion, label, tools)


def read_said(value: Any, column: str) -> Any:
    """A text, or messages: a list of them, an object with `messages`, or either as JSON text."""
    if isinstance(value, str):
        value = _as_messages(value)
    if isinstance(value, Mapping) and "messages" in value:
        return read_messages(value["messages"], f"{column}.messages")
    if isinstance(value, (list, tuple)):
        return read_messages(value, column)
    if not isinstance(value, str):
        raise DataError(f"`{column}` must be text or a list of messages, not {kind_of_value(value)}.")
    return read_text(value, f"`{column}`")


def with_context(
    prompt: str | Messages, answers: Sequence[str | Messages], record: Mapping[str, Any], columns: Columns
) -> tuple[Any, tuple[Any, ...], list[dict[str, Any]] | None]:
    """Prompt and answers with the row's system prompt, and its tools: all texts, or all messages.

    Texts become messages beside messages, and where there is a system prompt or there are tools.
    """
    texts = all(isinstance(said, str) for said in (prompt, *answers))
    if texts and not read_system(record, columns) and not read_tools(record, columns):
        return prompt, tuple(answers), None
    asked = chat_row(said_by("user", prompt), record, columns)
    return asked.messages, tuple(said_by("assistant", answer) for answer in answers), asked.tools


def said_by(role: str, said: str | Messages) -> Messages:
    """The messages themselves, or a text as one message of this role."""
    return [{"role": role, "content": said}] if isinstance(said, str) else said


def _as_messages(text: str) -> Any:
    """The messages in a JSON text; the text itself where it is anything else, such as an answer in JSON."""
    try:
        value = decoded(text, "")
    except DataError:
        return text
    items = value.get("messages") if isinstance(value, Mapping) else value
    spoken = isinstance(items, list) and all(isinstance(item, Mapping) for item in items)
    return value if items and spoken and all({"role", "from"} & set(item) for item in items) else text


def _whole(said: str | Messages) -> bool:
    """Whether messages are a whole conversation, and not an answer alone."""
    return not isinstance(said, str) and said[0]["role"] != "assistant"


def _parted(chosen: Messages, rejected: Messages, names: tuple[str, str]) -> tuple[Messages, Messages, Messages]:
    """The messages that two conversations share, and what is left of each."""
    pairs = zip(chosen, rejected)
    shared = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
    for name, messages in zip(names, (chosen, rejected)):
        if len(messages) == shared:
            raise DataError(f"`{name}` is only the beginning of the other conversation: there is no answer to compare.")
    for name, messages in zip(names, (chosen, rejected)):
        if messages[shared]["role"] != "assistant":
            raise DataError(
                f"`{names[0]}` and `{names[1]}` part at message {shared}, which is from the "
                f"{messages[shared]['role']} in `{name}`: they answer different prompts. Let both begin alike."
            )
    if not shared:
        raise DataError(f"one of `{names[0]}` and `{names[1]}` is a whole conversation, the other an answer alone.")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _check_asked(record: Mapping[str, Any], columns: Columns, shared: Messages) -> None:
    """Raise DataError where the row's prompt is not what its two conversations share."""
    name = columns.prompt or "prompt"
    if columns.prompt:
        _require(record, (name,), PAIR_FORMATS)
    if record.get(name) is None:
        return
    asked = [_spoken(message) for message in said_by("user", read_said(record[name], name))]
    known = [_spoken(message) for message in shared]
    if not any(known[k : k + len(asked)] == asked for k in range(len(known))):
        raise DataError(
            f"`{name}` is not in what the two conversations begin with. Remove the column, or correct the row."
        )


def _spoken(message: Mapping[str, Any]) -> tuple[str, str]:
    return message["role"], (message.get("content") or "").strip()


def _prompt(record: Mapping[str, Any], columns: Columns, formats: str) -> Any:
    name = columns.prompt or "prompt"
    _require(record, (name,), formats)
    return read_said(record[name], name)


def _last_answer(messages: Messages, column: str) -> tuple[Messages, Messages]:
    """The messages up to the last one of the user, and those after it."""
    until = max((k + 1 for k, message in enumerate(messages) if message["role"] == "user"), default=0)
    if not until:
        raise DataError(f"`{column}` has no message from the user: there is no prompt. Drop the row.")
    if not any(message["role"] == "assistant" for message in messages[until:]):
        raise DataError(f"`{column}` has no answer after the last user message: there is nothing to label. Drop it.")
    return messages[:until], messages[until:]


def _require(record: Mapping[str, Any], names: tuple[str, ...], formats: str) -> None:
    if any(record.get(name) is None for name in names):
        raise DataError(f"{missing_column(record, names)} Known: {formats}.")


def _number(record: Mapping[str, Any], named: str | None, usual: str, default: float) -> float:
    """A number from 0, also as text (CSV files hold nothing else)."""
    name = named or usual
    if named and name not in record:
        raise DataError(missing_column(record, (name,)))
    value = record.get(name)
    if value is None:
        return default
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise DataError(f"`{name}` must be a number from 0, not {value!r}.")
    return number


def _label(value: Any, name: str) -> bool:
    """True or false, as a word, a bool or a number; also of numpy and pandas, whose kinds all become a float."""
    try:
        known = _LABELS.get(value.strip().lower() if isinstance(value, str) else float(value))
    except (TypeError, ValueError):
        known = None
    if known is None:
        raise DataError(f"`{name}` must be true or false (or 1 or 0), not {value!r}.")
    return known
