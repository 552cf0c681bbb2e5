"""Recognizes rows that judge answers: a chosen and a rejected answer to one prompt, or one answer with a label."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_nb.data.rows.columns import (
    Columns,
    Messages,
    by_example,
    kind_of_value,
    missing_column,
    read_messages,
    read_system,
    read_tools,
)
from mlx_nb.data.rows.content import TextOrMessages, is_of_messages
from mlx_nb.data.rows.forms import (
    CONVERSATION_COLUMNS,
    answer_column,
    chosen_column,
    conversation_column,
    dialog,
    from_json,
    label_column,
    looks_like,
    question,
    question_column,
    read_text_or_messages,
    rejected_column,
)
from mlx_nb.data.rows.imitation import as_messages, chat_row
from mlx_nb.errors import DataError, shown

PAIR_FORMATS = "prompt + chosen + rejected, or chosen + rejected as whole conversations"
LABEL_FORMATS = "prompt + completion + label, or messages + label"

_LABELS: dict[str | float, bool] = {"true": True, "false": False, "1": True, "0": False, 1.0: True, 0.0: False}


@dataclass(frozen=True)
class PreferenceRow:
    """Two answers to one prompt, the first better. All three are texts, or all three are messages.

    weight      weight of the pair in the loss (`preference_score`)
    margin      by how much the first is better
    from_texts  the messages were made from texts with the row's system prompt or tools
    """

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    tools: list[dict[str, Any]] | None = None
    weight: float = 1.0
    margin: float = 0.0
    from_texts: bool = field(default=False, compare=False)

    @property
    def shape(self) -> str:
        """`pair of conversations` or `pair of texts`."""
        return "pair of conversations" if is_of_messages(self) else "pair of texts"

    def parts(self) -> dict[str, TextOrMessages]:
        """The prompt and both answers."""
        return {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}

    def distinctive(self) -> TextOrMessages:
        """The prompt alone."""
        return self.prompt

    def question(self) -> list[Any]:
        """The prompt and the tools."""
        return [self.prompt, self.tools]

    def ratings(self) -> dict[str, Any]:
        """Weight and margin, if they are not the defaults."""
        return {
            name: value
            for name, value, usual in (("weight", self.weight, 1.0), ("margin", self.margin, 0.0))
            if value != usual
        }

    def reward_columns(self) -> dict[str, Any]:
        """Empty: there are no rewards."""
        return {}


@dataclass(frozen=True)
class LabeledRow:
    """An answer to a prompt, and whether it is a good one. Both are texts, or both are messages.

    `from_texts`: the messages were made from texts with the row's system prompt or tools.
    """

    prompt: str | Messages
    completion: str | Messages
    label: bool
    tools: list[dict[str, Any]] | None = None
    from_texts: bool = field(default=False, compare=False)

    @property
    def shape(self) -> str:
        """`labeled conversation` or `labeled text`."""
        return "labeled conversation" if is_of_messages(self) else "labeled text"

    def parts(self) -> dict[str, TextOrMessages]:
        """The prompt and the answer."""
        return {"prompt": self.prompt, "completion": self.completion}

    def distinctive(self) -> TextOrMessages:
        """The prompt alone."""
        return self.prompt

    def question(self) -> list[Any]:
        """The prompt and the tools."""
        return [self.prompt, self.tools]

    def ratings(self) -> dict[str, Any]:
        """Whether the answer is good."""
        return {"label": self.label}

    def reward_columns(self) -> dict[str, Any]:
        """Empty: there are no rewards."""
        return {}


class NothingToPrefer(DataError):
    """The chosen and the rejected answer of a row are the same, as given or as trained tokens."""


def preference_row(record: Mapping[str, Any], columns: Columns) -> PreferenceRow:
    """The pair in a row: texts, answers as messages, or whole conversations (their common beginning is the prompt).

    `{"messages": [...]}` counts as the list in it, and a whole conversation in `messages` next to a rejected answer as
    the chosen one. Raises NothingToPrefer for two equal answers, and DataError for everything else that is not a pair.
    """
    record = _with_input_columns(record)
    chosen_name = columns.chosen or chosen_column(record) or "chosen"
    names = (chosen_name, columns.rejected or rejected_column(record) or "rejected")
    _require(record, names, PAIR_FORMATS, _advice_on_pair)
    chosen, rejected = (read_text_or_messages(record[name], name, columns.roles) for name in names)
    own_prompt: Messages | None = None
    if names[0] in CONVERSATION_COLUMNS and not _is_conversation(rejected):
        own_prompt, chosen = _last_answer(chosen, names[0])
        rejected = as_messages("assistant", rejected)
    if isinstance(chosen, str) != isinstance(rejected, str):
        kinds = [kind_of_value(answer) for answer in (chosen, rejected)]
        raise DataError(f"`{names[0]}` is {kinds[0]} and `{names[1]}` is {kinds[1]}. Make both of the same kind.")
    if chosen == rejected:
        raise NothingToPrefer(f"`{names[0]}` and `{names[1]}` are the same: there is nothing to prefer. Drop the row.")
    if _is_conversation(chosen) or _is_conversation(rejected):
        prompt, chosen, rejected = _split_at_difference(chosen, rejected, names)
        if not all(_is_object(record[name]) for name in names):
            _check_prompt(record, columns, prompt)
    else:
        prompt = own_prompt or _prompt(record, columns, PAIR_FORMATS)
        chosen, rejected = (_after(record, columns, answer) for answer in (chosen, rejected))
    from_texts = all_texts(prompt, chosen, rejected)
    prompt, (chosen, rejected), tools = with_context(prompt, (chosen, rejected), record, columns)
    weight = _number(record, columns.preference_score, "preference_score", 1.0)
    if weight == 0:
        name = columns.preference_score or "preference_score"
        raise DataError(f"`{name}` is the weight of the pair and must be above 0. Drop the row.")
    margin = _number(record, None, "margin", 0.0)
    return PreferenceRow(prompt, chosen, rejected, tools, weight, margin, from_texts)


def labeled_row(record: Mapping[str, Any], columns: Columns) -> LabeledRow:
    """The answer in a row and its label: prompt + completion, or messages (those after the last user message).

    Raises DataError for anything else.
    """
    name = columns.label or label_column(record) or "label"
    _require(record, (name,), LABEL_FORMATS, _advice_on_labeled)
    label = _label(record[name], name)
    talk = columns.messages or conversation_column(record) or "messages"
    has_completion_columns = (
        columns.prompt or columns.completion or (talk != "messages" and record.get("completion") is not None)
    )
    completion: str | Messages
    if columns.messages or (record.get(talk) is not None and not has_completion_columns):
        _require(record, (talk,), LABEL_FORMATS)
        prompt, completion = _last_answer(read_messages(record[talk], talk, columns.roles), talk)
    else:
        answer_name = columns.completion or answer_column(record) or "completion"
        prompt = _prompt(record, columns, LABEL_FORMATS)
        _require(record, (answer_name,), LABEL_FORMATS)
        completion = read_text_or_messages(record[answer_name], answer_name, columns.roles)
        if not isinstance(completion, str) and completion[0]["role"] != "assistant":
            first = completion[0]["role"]
            raise DataError(f"`{answer_name}` begins with the {first}; it must begin with the assistant's answer.")
        completion = _after(record, columns, completion)
    from_texts = all_texts(prompt, completion)
    prompt, (completion,), tools = with_context(prompt, (completion,), record, columns)
    return LabeledRow(prompt, completion, label, tools, from_texts)


def with_context(
    prompt: str | Messages, answers: Sequence[str | Messages], record: Mapping[str, Any], columns: Columns
) -> tuple[Any, tuple[Any, ...], list[dict[str, Any]] | None]:
    """Prompt and answers with the row's system prompt, and its tools: all texts, or all messages.

    Texts become messages if others are messages, or if there is a system prompt or tools.
    """
    if all_texts(prompt, *answers) and not read_system(record, columns) and not read_tools(record, columns):
        return prompt, tuple(answers), None
    context = chat_row(as_messages("user", prompt), record, columns)
    return context.messages, tuple(as_messages("assistant", answer) for answer in answers), context.tools


def all_texts(*parts: str | Messages) -> bool:
    """Whether none of them is messages."""
    return all(isinstance(part, str) for part in parts)


def _is_conversation(text: str | Messages) -> bool:
    """Whether messages are a whole conversation, as opposed to an answer alone."""
    return not isinstance(text, str) and text[0]["role"] != "assistant"


def _split_at_difference(
    chosen: Messages, rejected: Messages, names: tuple[str, str]
) -> tuple[Messages, Messages, Messages]:
    """The messages that two conversations share, and the rest of each."""
    pairs = zip(chosen, rejected)
    shared = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
    for name, messages in zip(names, (chosen, rejected)):
        if len(messages) == shared:
            raise DataError(f"`{name}` is only the beginning of the other conversation: there is no answer to compare.")
    for name, messages in zip(names, (chosen, rejected)):
        if messages[shared]["role"] != "assistant":
            raise DataError(
                f"`{names[0]}` and `{names[1]}` part at message {shared}, which is from the "
                f"{messages[shared]['role']} in `{name}`: they answer different prompts. Make both begin the same way."
            )
    if not shared:
        raise DataError(f"one of `{names[0]}` and `{names[1]}` is a whole conversation, the other an answer alone.")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _check_prompt(record: Mapping[str, Any], columns: Columns, shared: Messages) -> None:
    """Raise DataError if the row's prompt is not part of what its two conversations share."""
    name = columns.prompt or "prompt"
    if columns.prompt:
        _require(record, (name,), PAIR_FORMATS)
    if record.get(name) is None:
        return
    stated = [
        _spoken(message) for message in as_messages("user", read_text_or_messages(record[name], name, columns.roles))
    ]
    known = [_spoken(message) for message in shared]
    if not any(known[k : k + len(stated)] == stated for k in range(len(known))):
        raise DataError(
            f"`{name}` is not in what the two conversations begin with. Remove the column, or correct the row."
        )


def _spoken(message: Mapping[str, Any]) -> tuple[str, str]:
    return message["role"], (message.get("content") or "").strip()


def _prompt(record: Mapping[str, Any], columns: Columns, formats: str) -> Any:
    name = columns.prompt or "prompt"
    other = question_column(record) if record.get(name) is None and not columns.prompt else None
    if other in CONVERSATION_COLUMNS:
        prompt = read_messages(record[other], other, columns.roles)
        if prompt[-1]["role"] == "assistant":
            raise DataError(
                f"`{other}` ends with the assistant: there is nothing to answer. It must end with the user's message."
            )
        return prompt
    if other:
        return question(record, other, columns.roles)
    _require(record, (name,), formats)
    return read_text_or_messages(record[name], name, columns.roles)


def _after(record: Mapping[str, Any], columns: Columns, answer: str | Messages) -> str | Messages:
    """An answer; without surrounding white space if it continues a dialog that is one text."""
    prompt = record.get(columns.prompt or "prompt")
    return answer.strip() if isinstance(answer, str) and isinstance(prompt, str) and dialog(prompt) else answer


def _with_input_columns(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with the prompt and tools of its `input: {messages, tools}` (OpenAI) as columns."""
    given = record.get("input")
    if isinstance(given, str):
        given = from_json(given)
    if not isinstance(given, Mapping) or given.get("messages") is None or record.get("prompt") is not None:
        return record
    tools = {"tools": given["tools"]} if given.get("tools") is not None else {}
    return {**{name: value for name, value in record.items() if name != "input"}, "prompt": given["messages"], **tools}


def _is_object(value: Any) -> bool:
    """Whether a value is an object, or the JSON text of one."""
    return isinstance(value, Mapping) or (isinstance(value, str) and value.lstrip().startswith("{"))


def _last_answer(messages: Messages, column: str) -> tuple[Messages, Messages]:
    """The messages up to the last user message, and those after it."""
    until = max((k + 1 for k, message in enumerate(messages) if message["role"] == "user"), default=0)
    if not until:
        raise DataError(f"`{column}` has no message from the user: there is no prompt. Drop the row.")
    if not any(message["role"] == "assistant" for message in messages[until:]):
        raise DataError(f"`{column}` has no answer after the last user message: there is nothing to label. Drop it.")
    return messages[:until], messages[until:]


def _advice_on_pair(record: Mapping[str, Any]) -> str:
    """What a row without a pair is, or how to name its columns."""
    return looks_like(record) or by_example(record, ("prompt_feature", "chosen_feature", "rejected_feature"))


def _advice_on_labeled(record: Mapping[str, Any]) -> str:
    """What a row without a label is, or how to name its columns."""
    return looks_like(record) or by_example(record, ("prompt_feature", "completion_feature"), ("label_feature",))


def _require(
    record: Mapping[str, Any],
    names: tuple[str, ...],
    formats: str,
    hint: Callable[[Mapping[str, Any]], str] = lambda _: "",
) -> None:
    if any(record.get(name) is None for name in names):
        raise DataError(f"{missing_column(record, names)} Known: {formats}. {hint(record)}".rstrip())


def _number(record: Mapping[str, Any], named: str | None, usual: str, default: float) -> float:
    """A number of at least 0, also as text (CSV files hold nothing else)."""
    name = named or usual
    if named and name not in record:
        raise DataError(missing_column(record, (name,)))
    value = record.get(name)
    if value is None:
        return default
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise DataError(f"`{name}` must be a number of at least 0, not {shown(value)}.")
    return number


def _label(value: Any, name: str) -> bool:
    """True or false, as a word, a bool or a number; also of numpy and pandas, whose types all convert to float."""
    try:
        known = _LABELS.get(value.strip().lower() if isinstance(value, str) else float(value))
    except (TypeError, ValueError, OverflowError):
        known = None
    if known is None:
        raise DataError(f"`{name}` must be true or false (or 1 or 0), not {shown(value)}.")
    return known
