"""Converts a row of any kind to a prompt with a reference answer, for metrics of the model's answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_nb.data.rows.columns import Messages
from mlx_nb.data.rows.content import RowContent, TextOrMessages
from mlx_nb.data.rows.imitation import ChatRow, PromptCompletionRow, TextRow
from mlx_nb.data.rows.preference import LabeledRow, PreferenceRow
from mlx_nb.data.rows.prompt import PromptRow
from mlx_nb.errors import DataError


class NoReference(DataError):
    """A row whose answer is labeled false, so the model's answer cannot be compared with it."""


def question_in(content: RowContent, record: Mapping[str, Any]) -> PromptRow:
    """The question in a row: its prompt, the reference answer, and the row's columns.

    The question of a conversation is everything before its last assistant message, and that message is the reference.
    The reference of a pair is the chosen answer, that of a labeled answer the answer itself if its label is true, and
    that of a prompt the row's answer column, if it has one. Raises DataError for a row without a question: plain
    text, a conversation without assistant text to compare with, and an answer labeled false.
    """
    match content:
        case PromptRow():
            return content
        case ChatRow(messages, tools):
            prompt, reference = _before_last_answer(messages)
            return PromptRow(prompt, reference, dict(record), tools, prompt, content.from_texts)
        case PromptCompletionRow(text, completion):
            return PromptRow(text, completion, dict(record), None, text)
        case PreferenceRow(question, chosen, _, tools):
            return PromptRow(question, _text_of(chosen), dict(record), tools, question, content.from_texts)
        case LabeledRow(question, answer, True, tools):
            return PromptRow(question, _text_of(answer), dict(record), tools, question, content.from_texts)
        case LabeledRow():
            raise NoReference("its answer is labeled false, so there is no reference to compare with.")
        case _:
            what = "plain text" if isinstance(content, TextRow) else f"a {content.shape}"
            raise DataError(f"{what} has no question. Metrics of answers need rows with a prompt and an answer.")


def _before_last_answer(messages: Messages) -> tuple[Messages, str]:
    """The messages before the assistant's last one, and its text."""
    last = max((place for place, one in enumerate(messages) if one["role"] == "assistant"), default=0)
    text = messages[last].get("content")
    if not last or not isinstance(text, str) or not text:
        raise DataError("the conversation has no assistant text to compare an answer with.")
    return [{name: value for name, value in one.items() if name != "train"} for one in messages[:last]], text


def _text_of(answer: TextOrMessages) -> str:
    text = answer if isinstance(answer, str) else _last_text(answer)
    if not text:
        raise DataError("the answer has no text to compare with.")
    return text


def _last_text(messages: Sequence[Mapping[str, Any]]) -> str:
    text = messages[-1].get("content")
    return text if isinstance(text, str) else ""
