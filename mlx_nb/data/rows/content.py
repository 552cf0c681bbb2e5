"""What a row says, whatever its kind: what views, the data check and remarks ask of it."""

from __future__ import annotations

from typing import Any, Protocol

from mlx_nb.data.rows.columns import Messages

TextOrMessages = str | Messages


class RowContent(Protocol):
    """A row as its kind reads it."""

    @property
    def from_texts(self) -> bool:
        """Whether its messages are texts of the row, perhaps with its system prompt or tools."""

    @property
    def shape(self) -> str:
        """What it is made of, in words: `chat`, `pair of texts`."""

    def parts(self) -> dict[str, TextOrMessages]:
        """Its texts and messages by name, in order: of a pair the prompt and both answers. A plain text has none."""

    def spoken(self) -> TextOrMessages:
        """What tells it from other rows: of rows that differ by their answers, or have none, the prompt alone."""

    def question(self) -> list[Any] | None:
        """The prompt, and the tools with it, that another row may ask again; None where the whole row is compared."""

    def marks(self) -> dict[str, Any]:
        """What a person said about the answers, by name, such as the label."""

    def given(self) -> dict[str, Any]:
        """What it holds for the rewards of its completions, by column."""


def is_of_messages(content: RowContent) -> bool:
    """Whether a row is made of messages, which only a chat template turns into text."""
    return not content.from_texts and any(not isinstance(text, str) for text in content.parts().values())
