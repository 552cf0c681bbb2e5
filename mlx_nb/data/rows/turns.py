"""Who says what in a row: its turns by name, its roles in order, its shape in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlx_nb.data.masks.prompt_format import CHAT, FORMAT_WORDS, RAW, Rendering
from mlx_nb.data.rows.columns import Messages
from mlx_nb.data.rows.imitation import ChatRow, PromptCompletionRow, TextRow
from mlx_nb.data.rows.kinds import AnyRow
from mlx_nb.data.rows.preference import LabelledRow, PreferenceRow
from mlx_nb.data.rows.prompt import PromptRow


def shape(content: AnyRow) -> str:
    """The shape of a row in words: chat, prompt + completion, text, pair of texts, ..."""
    as_messages = is_of_messages(content)
    match content:
        case ChatRow():
            return "chat"
        case PromptCompletionRow():
            return "prompt + completion"
        case TextRow():
            return "text"
        case PreferenceRow():
            return "pair of conversations" if as_messages else "pair of texts"
        case LabelledRow():
            return "labelled conversation" if as_messages else "labelled text"
        case PromptRow():
            return "prompt as messages" if as_messages else "prompt as text"


def format_of(content: AnyRow, rendering: Rendering) -> str:
    """How a row is written for the model, in words: "chat template" or "raw text". `rendering` is resolved."""
    if isinstance(content, TextRow):
        return FORMAT_WORDS[RAW]
    return FORMAT_WORDS[CHAT if is_of_messages(content) else rendering.prompt_format or CHAT]


def is_of_messages(content: AnyRow) -> bool:
    """Whether a row is made of messages, which only a chat template turns into text."""
    if not isinstance(content, PromptCompletionRow | TextRow) and content.from_texts:
        return False
    return any(not isinstance(said, str) for said in _parts(content).values())


def turns(content: AnyRow) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every turn of a row as (name, message); a plain text has none."""
    for part, said in _parts(content).items():
        if isinstance(said, str):
            yield f"the {part}", {"content": said}
            continue
        of = f" of {part}" if part else ""
        for index, message in enumerate(said):
            yield f"message {index} ({message['role']}){of}", message


def role_sequences(content: AnyRow) -> list[list[str]]:
    """The roles of a conversation in order; of a pair of conversations both. None for texts."""
    spoken = [[message["role"] for message in said] for said in _parts(content).values() if not isinstance(said, str)]
    start, answers = spoken[:1], spoken[1:]
    return [start[0] + answer for answer in answers] or start


def _parts(content: AnyRow) -> dict[str, str | Messages]:
    match content:
        case ChatRow():
            return {"": content.messages}
        case TextRow():
            return {}
        case PreferenceRow():
            return {"prompt": content.prompt, "chosen": content.chosen, "rejected": content.rejected}
        case PromptRow():
            return {"prompt": content.prompt}
        case _:
            return {"prompt": content.prompt, "completion": content.completion}
