"""Examples of rows to imitate: tokens and loss mask, cut to length."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from mlx_nb.data.examples.settings import ExampleSettings, TooLong
from mlx_nb.data.masks.conversation import (
    TokenizedConversation,
    tokenize_conversation,
    tokenize_prompt_completion,
    tokenize_text,
)
from mlx_nb.data.masks.prompt_format import DEFAULT_RENDERING, Rendering
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.data.rows.imitation import ChatRow, PromptCompletionRow, Row, TextRow, raw_strings
from mlx_nb.errors import DataError, MaskRefused


@dataclass(frozen=True, eq=False)
class TokenizedExample:
    """One row, ready to train.

    tokens          (T,) int32
    loss_mask       (T,) float32, the weight of each token as a target; `loss_mask[0] == 0`
    row             number of the row in its split, from 0
    dropped_tokens  tokens removed by truncation
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    row: int
    dropped_tokens: int = 0

    @property
    def sequences(self) -> tuple[TokenizedExample, ...]:
        """The sequences that the model reads for this example: itself."""
        return (self,)

    @property
    def length(self) -> int:
        """Number of tokens that the model reads."""
        return len(self.tokens)


def tokenize_row(
    content: Row, tokenizer: Tokenizer, loss_on: str, rendering: Rendering = DEFAULT_RENDERING
) -> TokenizedConversation:
    """The tokens and loss mask of one recognized row.

    Raises MaskRefused if no trustworthy mask exists, and DataError for strings that cannot be raw text.
    """
    if isinstance(content, ChatRow) and content.from_texts and rendering.is_raw(tokenizer):
        content = raw_strings(content)
    match content:
        case ChatRow(messages, tools):
            return tokenize_conversation(messages, tokenizer, tools=tools, loss_on=loss_on, rendering=rendering)
        case PromptCompletionRow(prompt, completion) if rendering.is_raw(tokenizer):
            conversation = tokenize_prompt_completion(prompt, completion, tokenizer, rendering=rendering)
            return _all_trained(conversation) if loss_on == "all" else conversation
        case PromptCompletionRow(prompt, completion):
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            return tokenize_conversation(messages, tokenizer, loss_on=loss_on, rendering=rendering)
        case TextRow(text):
            return tokenize_text(text, tokenizer, rendering)


def _all_trained(conversation: TokenizedConversation) -> TokenizedConversation:
    loss_mask = np.ones_like(conversation.loss_mask)
    loss_mask[0] = 0
    return dataclasses.replace(conversation, loss_mask=loss_mask)


def cut_row(
    content: Row, conversation: TokenizedConversation, row: int, settings: ExampleSettings
) -> list[TokenizedExample]:
    """The examples of a row: one, or the pieces of a long text with `truncate: split`.

    Raises as `cut_to_length` does.
    """
    if isinstance(content, TextRow) and settings.truncate == "split":
        return split_text(conversation, row, settings)
    return [cut_to_length(conversation, row, settings)]


def cut_to_length(conversation: TokenizedConversation, row: int, settings: ExampleSettings) -> TokenizedExample:
    """The example of a conversation within `max_seq_length`. Raises DataError if nothing is left to train on."""
    tokens, loss_mask = conversation.tokens, conversation.loss_mask
    kept = kept_part(len(tokens), settings)
    dropped = len(tokens) - (kept.stop - kept.start)
    if dropped:
        tokens, loss_mask = tokens[kept], loss_mask[kept].copy()
        loss_mask[0] = 0
    if not loss_mask.any():
        if dropped and conversation.loss_mask.any():
            raise DataError(
                f"no token is trained: the reply was cut at max_seq_length={settings.max_seq_length}. "
                "Raise max_seq_length or drop the row."
            )
        raise MaskRefused(f"no token is trained with loss_on={settings.loss_on!r}. Drop the row or change loss_on.")
    return TokenizedExample(tokens, loss_mask, row, dropped)


def kept_part(length: int, settings: ExampleSettings) -> slice:
    """The part of `length` tokens that `truncate` keeps. Raises DataError if it keeps none, TooLong for `error`."""
    limit = settings.max_seq_length
    if length <= limit:
        return slice(0, length)
    found = f"{length} tokens, over max_seq_length={limit}"
    if settings.truncate == "error":
        raise TooLong(f"{found}. Raise max_seq_length, or set truncate to right, left or drop.")
    if settings.truncate == "drop":
        raise DataError(f"{found}, and `truncate: drop` leaves it out.")
    if settings.truncate == "split":
        raise DataError(f"{found}, and `truncate: split` is for plain text. Set truncate to right, left or drop.")
    return slice(length - limit, length) if settings.truncate == "left" else slice(0, limit)


def split_text(conversation: TokenizedConversation, row: int, settings: ExampleSettings) -> list[TokenizedExample]:
    """Divide a text into pieces of at most `max_seq_length` tokens; every token except the first is trained once.

    Each piece begins with the last `stride` tokens of the previous one, which are not trained again. At least one token
    is repeated, since the first token of a piece has nothing to be predicted from.
    """
    shared = max(1, settings.stride)
    pieces, end = [], 0
    while end < len(conversation.tokens):
        start = max(0, end - shared)
        seen, end = end - start, min(start + settings.max_seq_length, len(conversation.tokens))
        loss_mask = conversation.loss_mask[start:end].copy()
        loss_mask[:seen] = 0
        pieces.append(TokenizedExample(conversation.tokens[start:end], loss_mask, row))
    return pieces


def as_cut(conversation: TokenizedConversation, example: TokenizedExample, truncate: str) -> TokenizedConversation:
    """The conversation with only its remaining tokens; text and spans stay whole."""
    start = example.dropped_tokens if truncate == "left" else 0
    offsets = conversation.offsets[start : start + len(example.tokens)]
    return dataclasses.replace(conversation, tokens=example.tokens, loss_mask=example.loss_mask, offsets=offsets)
