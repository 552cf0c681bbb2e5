"""Prompts as tokens: what the model is given before it answers, in training by reward and whenever it is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_nb.data.chat_template import (
    Span,
    TokenizedConversation,
    encode_with_offsets,
    fast_tokenizer,
    plain_messages,
)
from mlx_nb.data.prompt_rows import PromptRow
from mlx_nb.data.row_values import Messages
from mlx_nb.data.token_examples import ExampleSettings, TokenizedExample, kept_part
from mlx_nb.errors import DataError


@dataclass(frozen=True, eq=False)
class PromptExample:
    """A question, ready to be answered.

    prompt_tokens   (T,) int32, the template's generation prompt at the end
    prompt          as the row has it: text, or messages
    answer          the right answer, if the row has one
    columns         all other columns of the row, by name
    row             number of the row in its split, from 0
    dropped_tokens  tokens that truncation took away, from the start
    """

    prompt_tokens: np.ndarray
    prompt: str | Messages
    answer: Any
    columns: dict[str, Any]
    row: int
    dropped_tokens: int = 0

    @property
    def sequences(self) -> tuple[TokenizedExample, ...]:
        """What the model reads for this example; nothing of it is trained."""
        untrained = np.zeros(len(self.prompt_tokens), np.float32)
        return (TokenizedExample(self.prompt_tokens, untrained, self.row, self.dropped_tokens),)

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_tokens)


def has_chat_template(tokenizer: Any) -> bool:
    """Whether texts go through a chat template as messages."""
    return getattr(tokenizer, "chat_template", None) is not None


def prompt_tokens(
    tokenizer: Any, prompt: str | Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
) -> list[int]:
    """The tokens of a prompt with the template's generation prompt at the end.

    A text is a user message; with a tokenizer without a chat template it is continued instead, from a beginning-of-
    sequence token where the tokenizer adds one. Raises DataError when the template does not render the prompt.
    """
    text, special = _prompt_text(tokenizer, prompt, tools)
    return list(tokenizer.encode(text, add_special_tokens=special))


def tokenize_prompt(content: PromptRow, tokenizer: Any) -> TokenizedConversation:
    """`prompt_tokens` of a row with the characters they cover; nothing is trained.

    Raises DataError when the template does not render the prompt, MaskRefused for a tokenizer without offsets.
    """
    text, special = _prompt_text(tokenizer, content.prompt, content.tools)
    tokens, offsets = encode_with_offsets(fast_tokenizer(tokenizer), text, special=special)
    if len(tokens) == 0:
        raise DataError("the prompt has no tokens. Drop the row.")
    asked = Span(0, len(text), "prompt", 0, 0.0)
    return TokenizedConversation(tokens, np.zeros(len(tokens), np.float32), text, offsets, (asked,))


def prompt_example(
    content: PromptRow, conversation: TokenizedConversation, row: int, settings: ExampleSettings
) -> PromptExample:
    """The example of a row. Raises DataError for a prompt over `max_seq_length`, unless `truncate` keeps its end."""
    length = len(conversation.tokens)
    if length > settings.max_seq_length and settings.truncate == "right":
        raise DataError(
            f"the prompt has {length} tokens, over max_seq_length={settings.max_seq_length}, and a question without "
            "its end is no question. Raise max_seq_length, or set truncate to left or drop."
        )
    kept = kept_part(length, settings)
    return PromptExample(
        conversation.tokens[kept],
        content.as_given,
        content.answer,
        content.columns,
        row,
        length - (kept.stop - kept.start),
    )


def _prompt_text(
    tokenizer: Any, prompt: str | Sequence[Mapping[str, Any]], tools: Sequence[Any] | None
) -> tuple[str, bool]:
    """The text of a prompt, and whether the tokenizer should add its special tokens to it."""
    if isinstance(prompt, str):
        if not has_chat_template(tokenizer):
            return prompt, True
        prompt = [{"role": "user", "content": prompt}]
    given = {"tools": list(tools)} if tools else {}
    try:
        text = tokenizer.apply_chat_template(
            plain_messages(prompt), add_generation_prompt=True, tokenize=False, **given
        )
    except Exception as error:  # a template is a program of its own and raises what it likes
        raise DataError(f"the chat template does not render this prompt: {type(error).__name__}: {error}") from error
    return text, False
