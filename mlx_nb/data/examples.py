"""Rows to examples: tokens, loss mask, and what truncation took away."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlx_nb.config import RunConfig
from mlx_nb.data.chat_template import (
    TokenizedConversation,
    tokenize_conversation,
    tokenize_prompt_completion,
    tokenize_text,
)
from mlx_nb.data.rows import ChatRow, Columns, PromptCompletionRow, Row, TextRow, recognise
from mlx_nb.data.sources import RowSource
from mlx_nb.errors import DataError, MaskRefused


@dataclass(frozen=True, eq=False)
class TokenizedExample:
    """One row, ready to train.

    tokens          (T,) int32
    loss_mask       (T,) float32, the weight of each token as a target; `loss_mask[0] == 0`
    row             number of the row in its split, from 0
    dropped_tokens  tokens that truncation took away
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    row: int
    dropped_tokens: int = 0


@dataclass(frozen=True)
class LeftOut:
    """A row that is not trained, and why."""

    row: int
    reason: str


@dataclass(frozen=True)
class ExampleSettings:
    """The settings that decide how a row becomes an example."""

    loss_on: str
    max_seq_length: int
    truncate: str
    columns: Columns

    @classmethod
    def of(cls, config: RunConfig) -> ExampleSettings:
        columns = Columns(
            messages=config.chat_feature,
            prompt=config.prompt_feature,
            completion=config.completion_feature,
            text=config.text_feature,
            system=config.system_feature,
        )
        return cls(config.loss_on, config.max_seq_length, config.truncate, columns)


@dataclass(frozen=True, eq=False)
class RowView:
    """A row to look at: what it says, what the model will see, what is trained.

    `conversation` holds the tokens that truncation left. `error` says why the row cannot be trained; then `example`
    is None, and `conversation` too unless the row could be tokenised.
    """

    row: int
    location: str
    content: Row | None
    conversation: TokenizedConversation | None
    example: TokenizedExample | None
    error: str | None = None


class Examples:
    """The examples of one split. A row is tokenised when it is asked for, and not before."""

    def __init__(self, source: RowSource, tokenizer: object, settings: ExampleSettings) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.settings = settings

    def __len__(self) -> int:
        return len(self.source)

    def view(self, row: int) -> RowView:
        """Row `row` with everything known about it. Never raises for a bad row: `error` says what is wrong."""
        location = self.source.location(row)
        content = conversation = None
        try:
            content = recognise(self.source[row], self.settings.columns, row=row, location=location)
            conversation = tokenize_row(content, self.tokenizer, self.settings.loss_on)
            example = cut_to_length(conversation, row, self.settings)
        except DataError as error:
            return RowView(row, location, content, conversation, None, _row_error(row, error))
        return RowView(row, location, content, _as_cut(conversation, example, self.settings.truncate), example)

    def tokenize_all(self) -> Iterator[TokenizedExample | LeftOut]:
        """Every row in order, as an example or as left out with the reason.

        Raises TooLong at the first long row when `truncate` is `error`.
        """
        for row in range(len(self.source)):
            location = self.source.location(row)
            try:
                content = recognise(self.source[row], self.settings.columns, row=row, location=location)
                conversation = tokenize_row(content, self.tokenizer, self.settings.loss_on)
                yield cut_to_length(conversation, row, self.settings)
            except TooLong:
                raise
            except DataError as error:
                yield LeftOut(row, _row_error(row, error))


class TooLong(DataError):
    """A row is longer than max_seq_length and `truncate: error` forbids cutting it."""


def tokenize_row(content: Row, tokenizer: object, loss_on: str) -> TokenizedConversation:
    """The tokens and loss mask of one recognised row. Raises MaskRefused when no trustworthy mask exists."""
    match content:
        case ChatRow():
            return tokenize_conversation(content.messages, tokenizer, tools=content.tools, loss_on=loss_on)
        case PromptCompletionRow():
            conversation = tokenize_prompt_completion(content.prompt, content.completion, tokenizer)
            return _all_trained(conversation) if loss_on == "all" else conversation
        case TextRow():
            return tokenize_text(content.text, tokenizer)


def _all_trained(conversation: TokenizedConversation) -> TokenizedConversation:
    loss_mask = np.ones_like(conversation.loss_mask)
    loss_mask[0] = 0
    return dataclasses.replace(conversation, loss_mask=loss_mask)


def cut_to_length(conversation: TokenizedConversation, row: int, settings: ExampleSettings) -> TokenizedExample:
    """The example of a conversation within `max_seq_length`. Raises DataError when nothing is left to train on."""
    tokens, loss_mask = conversation.tokens, conversation.loss_mask
    limit, dropped = settings.max_seq_length, max(0, len(tokens) - settings.max_seq_length)
    if dropped:
        if settings.truncate == "error":
            raise TooLong(
                f"row {row}: {len(tokens)} tokens, over max_seq_length={limit}. Raise max_seq_length, or set "
                "truncate to right, left or drop."
            )
        if settings.truncate == "drop":
            raise DataError(
                f"row {row}: {len(tokens)} tokens, over max_seq_length={limit}, and `truncate: drop` leaves it out."
            )
        kept = slice(dropped, None) if settings.truncate == "left" else slice(0, limit)
        tokens, loss_mask = tokens[kept], loss_mask[kept].copy()
        loss_mask[0] = 0
    if not loss_mask.any():
        if dropped and conversation.loss_mask.any():
            raise DataError(
                f"row {row}: no token is trained: the reply was cut at max_seq_length={limit}. "
                "Raise max_seq_length or drop the row."
            )
        raise MaskRefused(
            f"row {row}: no token is trained with loss_on={settings.loss_on!r}. Drop the row or change loss_on."
        )
    return TokenizedExample(tokens, loss_mask, row, dropped)


def _as_cut(conversation: TokenizedConversation, example: TokenizedExample, truncate: str) -> TokenizedConversation:
    """The conversation with the tokens that are left of it; text and spans stay whole."""
    start = example.dropped_tokens if truncate == "left" else 0
    offsets = conversation.offsets[start : start + len(example.tokens)]
    return dataclasses.replace(conversation, tokens=example.tokens, loss_mask=example.loss_mask, offsets=offsets)


def _row_error(row: int, error: DataError) -> str:
    text = str(error)
    return text if text.startswith("row ") else f"row {row}: {text}"


def split_examples(
    results: Sequence[TokenizedExample | LeftOut],
) -> tuple[list[TokenizedExample], list[LeftOut]]:
    """What can be trained, and what was left out."""
    kept = [result for result in results if isinstance(result, TokenizedExample)]
    left_out = [result for result in results if isinstance(result, LeftOut)]
    return kept, left_out
