"""RowContent: the interface of a recognized row of any kind, for views, the data check and remarks."""

from __future__ import annotations

from typing import Any, Protocol

from mlx_nb.data.rows.columns import Messages

TextOrMessages = str | Messages


class RowContent(Protocol):
    """A row as its kind reads it."""

    @property
    def from_texts(self) -> bool:
        """Whether its messages were made from texts, perhaps with its system prompt or tools."""

    @property
    def shape(self) -> str:
        """Its shape in words: `chat`, `pair of texts`."""

    def parts(self) -> dict[str, TextOrMessages]:
        """Its texts and messages by name, in order: for a pair the prompt and both answers. Empty for plain text."""

    def distinctive(self) -> TextOrMessages:
        """The part compared with other rows: for rows that differ in their answers, or have none, only the prompt."""

    def question(self) -> list[Any] | None:
        """The prompt with its tools, for finding repeated prompts; None if the whole row is compared."""

    def ratings(self) -> dict[str, Any]:
        """The user's ratings of the answers by name, such as the label."""

    def reward_columns(self) -> dict[str, Any]:
        """The columns for the rewards of its completions, by name."""


def is_of_messages(content: RowContent) -> bool:
    """Whether a row consists of messages, which only a chat template turns into text."""
    return not content.from_texts and any(not isinstance(text, str) for text in content.parts().values())
