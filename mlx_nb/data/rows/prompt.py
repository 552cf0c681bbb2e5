"""Recognizes prompts that the model answers itself, with the columns that a reward needs to judge the answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_nb.data.rows.columns import Columns, Messages, by_example, missing_column, read_messages
from mlx_nb.data.rows.content import TextOrMessages, is_of_messages
from mlx_nb.data.rows.forms import conversation_column, looks_like, read_text_or_messages
from mlx_nb.data.rows.preference import all_texts, with_context
from mlx_nb.errors import DataError

PROMPT_FORMATS = "prompt (+ answer and any other columns)"

_QUESTION_WORDS = ("question", "problem", "query", "instruction", "input")


@dataclass(frozen=True)
class PromptRow:
    """A prompt, as text or messages; the correct answer, if the row has one; and all other columns of the row.

    `prompt` is the model's input, with the row's system prompt; `as_given` is the content of the row's column.
    `from_texts`: the messages were made from a text with the row's system prompt or tools.
    """

    prompt: str | Messages
    answer: Any = None
    columns: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None
    as_given: str | Messages = ""
    from_texts: bool = field(default=False, compare=False)

    @property
    def shape(self) -> str:
        """`prompt as messages` or `prompt as text`."""
        return "prompt as messages" if is_of_messages(self) else "prompt as text"

    def parts(self) -> dict[str, TextOrMessages]:
        """The prompt."""
        return {"prompt": self.prompt}

    def distinctive(self) -> TextOrMessages:
        """The prompt."""
        return self.prompt

    def question(self) -> list[Any]:
        """The prompt and the tools."""
        return [self.prompt, self.tools]

    def ratings(self) -> dict[str, Any]:
        """Empty: there is no answer to rate."""
        return {}

    def reward_columns(self) -> dict[str, Any]:
        """The correct answer, if the row has one, and all other columns."""
        return {**({} if self.answer is None else {"answer": self.answer}), **self.columns}


def prompt_row(record: Mapping[str, Any], columns: Columns) -> PromptRow:
    """The prompt in a row. Raises DataError if there is none."""
    name, answer_name = columns.prompt or "prompt", columns.answer or "answer"
    if record.get(name) is None:
        raise DataError(f"{missing_column(record, (name,))} {_fix(record, columns)}")
    if columns.answer and answer_name not in record:
        raise DataError(f"{missing_column(record, (answer_name,))} A row without an answer needs null there.")
    as_given = read_text_or_messages(record[name], name, columns.roles)
    prompt, _, tools = with_context(as_given, (), record, columns)
    if isinstance(prompt, str) and not prompt.strip():
        raise DataError(f"`{name}` is empty: there is nothing to answer. Drop the row.")
    if not isinstance(prompt, str) and prompt[-1]["role"] in ("assistant", "system"):
        raise DataError(
            f"`{name}` ends with the {prompt[-1]['role']}: there is nothing to answer. "
            "It must end with the user's message."
        )
    others = {column: value for column, value in record.items() if column not in (name, answer_name)}
    return PromptRow(prompt, record.get(answer_name), others, tools, as_given, all_texts(as_given))


def _fix(record: Mapping[str, Any], columns: Columns) -> str:
    """The setting that would make a row without a prompt readable, or what kind of row it is instead."""
    known = f"Known: {PROMPT_FORMATS}."
    if columns.prompt:
        return known
    talk = conversation_column(record)
    if talk and read_messages(record[talk], talk, columns.roles)[-1]["role"] != "assistant":
        return f"Set prompt_feature: {talk}."
    asking = next((word for word in _QUESTION_WORDS if record.get(word) is not None), None)
    if asking:
        return f"Set prompt_feature: {asking}."
    return f"{known} {looks_like(record) or by_example(record, ('prompt_feature',))}".rstrip()
