"""The turns and roles of a recognized row, and the format it is written in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlx_nb.data.masks.prompt_format import CHAT, FORMAT_WORDS, RAW, Rendering
from mlx_nb.data.rows.content import RowContent, is_of_messages
from mlx_nb.data.rows.imitation import TextRow


def format_of(content: RowContent, rendering: Rendering) -> str:
    """The format in which a row is written for the model: "chat template" or "raw text". `rendering` is resolved."""
    if isinstance(content, TextRow):
        return FORMAT_WORDS[RAW]
    return FORMAT_WORDS[CHAT if is_of_messages(content) else rendering.prompt_format or CHAT]


def turns(content: RowContent) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every turn of a row as (name, message); none for plain text."""
    for part, part_content in content.parts().items():
        if isinstance(part_content, str):
            yield f"the {part}", {"content": part_content}
            continue
        of = f" of {part}" if part else ""
        for index, message in enumerate(part_content):
            yield f"message {index} ({message['role']}){of}", message


def role_sequences(content: RowContent) -> list[list[str]]:
    """The roles of a conversation in order; for a pair of conversations both. Empty for texts."""
    parts = content.parts().values()
    roles = [[message["role"] for message in part] for part in parts if not isinstance(part, str)]
    start, answers = roles[:1], roles[1:]
    return [start[0] + answer for answer in answers] or start
