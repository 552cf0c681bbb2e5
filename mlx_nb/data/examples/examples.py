"""The rows of a split as examples, tokenized when accessed; the view of one row; and rows left out by number."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from mlx_nb.data.examples.imitation import TokenizedExample, as_cut
from mlx_nb.data.examples.kinds import ROW_KINDS, Conversations, Example, Result, recognize
from mlx_nb.data.examples.prompt import PromptExample, question_of
from mlx_nb.data.examples.remarks import content_remarks
from mlx_nb.data.examples.settings import ExampleSettings, LeftOut, TooLong
from mlx_nb.data.masks.conversation import Span, TokenizedConversation, row_remarks
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.data.rows.content import RowContent
from mlx_nb.data.rows.imitation import TextRow
from mlx_nb.data.rows.questions import NoReference
from mlx_nb.data.rows.turns import format_of
from mlx_nb.data.sources.row_source import RowSource
from mlx_nb.errors import DataError

_FIRST_ROWS = 100


@dataclass(frozen=True, eq=False)
class RowView:
    """A row to look at: its content, the tokens that the model sees, and what is trained.

    `conversation` holds the tokens after truncation; for a pair the chosen answer's, with the other's in `rejected`.
    `format` says how its strings are written: "chat template" or "raw text"; empty for a row that cannot be read.
    `error` says why the row cannot be trained; then `example` is None, and so is `conversation` unless the row could be
    tokenized. Prompts train nothing, so for them `example` is None without an error. `remarks` are those of the data
    check about the row's content and length.
    """

    row: int
    location: str
    content: RowContent | None
    conversation: TokenizedConversation | None
    example: TokenizedExample | None
    error: str | None = None
    rejected: TokenizedConversation | None = None
    dropped_tokens: int = 0
    format: str = ""
    remarks: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The text that the model reads, with special tokens; empty for a row that could not be tokenized."""
        return self.conversation.text if self.conversation else ""

    @property
    def tokens(self) -> np.ndarray:
        """(T,) int32 tokens of `text`; for a pair the chosen answer's with its prompt."""
        return self.conversation.tokens if self.conversation else np.zeros(0, np.int32)

    @property
    def loss_mask(self) -> np.ndarray:
        """(T,) float32 training weight of each token."""
        return self.conversation.loss_mask if self.conversation else np.zeros(0, np.float32)

    @property
    def spans(self) -> tuple[Span, ...]:
        """The position and role of each message in `text`."""
        return self.conversation.spans if self.conversation else ()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages of the row; for a pair the prompt and the chosen answer. Empty for plain text."""
        parts = self.content.parts() if self.content else {}
        found: list[dict[str, Any]] = []
        for name, part in parts.items():
            if name == "rejected":
                continue
            role = "user" if name == "prompt" else "assistant"
            found += [{"role": role, "content": part}] if isinstance(part, str) else [dict(one) for one in part]
        return found

    @property
    def conversations(self) -> Conversations:
        """The sequences that the model reads: for a pair both answers; empty for a row that could not be tokenized."""
        return tuple(one for one in (self.conversation, self.rejected) if one is not None)

    @property
    def problems(self) -> list[str]:
        """Everything the user should know about the row, in sentences; those about a pair's other answer say so."""
        first = row_remarks(self.conversation) if self.conversation else []
        other = row_remarks(self.rejected) if self.rejected else []
        own = [f"{remark}." for remark in self.remarks]
        return [*own, *first, *(f"rejected: {one}" for one in other), *([self.error] if self.error else [])]


def refuse_unreadable(source: RowSource, settings: ExampleSettings, kind: str, seconds: float) -> None:
    """Raise DataError if no row fits `kind`, as far as `seconds` of reading can tell, without a tokenizer."""
    first: DataError | None = None
    until = time.monotonic() + seconds
    for row in range(len(source)):
        try:
            recognize(kind, source[row], settings.columns, row=row, location=source.location(row))
            return
        except DataError as error:
            first = first or error
        if time.monotonic() > until:
            return
    if first is not None:
        raise DataError(f"no row of train can be trained. The first: {first}")


def refuse_no_such_row(setting: str, rows: Iterable[int], source: RowSource) -> None:
    """Raise DataError for a number in `setting` that is of no training row."""
    for row in rows:
        if not 0 <= row < len(source):
            raise DataError(f"`{setting}`: there is no row {row}. The training rows are 0 to {len(source) - 1}.")


def exclude_rows(
    rows: Sequence[int], kept: Sequence[Any], left_out: Sequence[LeftOut], source: RowSource
) -> tuple[list[Any], list[LeftOut]]:
    """Examples, and what is left out, without the `rows` that the user leaves out. Raises DataError for no such row."""
    refuse_no_such_row("leave_out", rows, source)
    chosen, known = set(rows), {one.row for one in left_out}
    excluded = [LeftOut(row, f"{source.named(row)}: left out by `leave_out`.") for row in sorted(chosen - known)]
    return [one for one in kept if one.row not in chosen], sorted([*left_out, *excluded], key=lambda one: one.row)


class Examples:
    """The examples of one split. A row is tokenized only when it is accessed.

    `kind` is what the training method takes: tokens, pairs, labels or prompts (see `recognize`).
    """

    def __init__(
        self, source: RowSource, tokenizer: Tokenizer, settings: ExampleSettings, kind: str = "tokens"
    ) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.settings = settings.resolved(tokenizer)
        self.kind = kind

    def __len__(self) -> int:
        return len(self.source)

    def view(self, row: int, edited: Mapping[str, Any] | None = None) -> RowView:
        """Row `row` with everything known about it. Never raises for a bad row: `error` says what is wrong.

        `edited` replaces the columns of the row.
        """
        location = self.source.location(row)
        content: RowContent | None = None
        conversations: Conversations = ()
        record: Mapping[str, Any] = {}
        try:
            record = self.source[row] if edited is None else edited
            content = recognize(self.kind, record, self.settings.columns, row=row, location=location)
            conversations = tokenize_as(self.kind, content, self.tokenizer, self.settings)
            examples = examples_of(self.kind, content, conversations, row, self.settings)
        except DataError as error:
            return self._view(row, record, content, conversations, error=self._row_error(row, error))
        sequences = examples[0].sequences
        conversations = tuple(as_cut(*both, self.settings.truncate) for both in zip(conversations, sequences))
        if len(examples) > 1:
            problem = f"the text is trained in {len(examples)} pieces; this is the first."
            conversations = (dataclasses.replace(conversations[0], problems=(*conversations[0].problems, problem)),)
        example = sequences[0] if ROW_KINDS[self.kind].answered else None
        dropped, far = examples[0].dropped_tokens, beyond_context(examples, self.settings)
        return self._view(row, record, content, conversations, example, dropped_tokens=dropped, far=far)

    def _view(
        self,
        row: int,
        record: Mapping[str, Any],
        content: RowContent | None,
        conversations: Conversations,
        example: TokenizedExample | None = None,
        *,
        error: str | None = None,
        dropped_tokens: int = 0,
        far: int = 0,
    ) -> RowView:
        first, rejected = (*conversations, None, None)[:2]
        written_as = format_of(content, self.settings.rendering) if content else ""
        location = self.source.location(row)
        remarks = [*content_remarks(record, content, self.settings, self.kind).values()] if content else []
        if row in self.settings.down_weighted:
            remarks.append(f"it is down-weighted: it counts {self.settings.down_weight_factor:g}")
        remarks += [f"{far:,} tokens, and the model was made for {self.settings.limits.context:,}"] if far else []
        return RowView(
            row, location, content, first, example, error, rejected, dropped_tokens, written_as, tuple(remarks)
        )

    def question(self, row: int) -> PromptExample:
        """What row `row` asks the model, for metrics of its answers: see `question_of`. Raises DataError."""
        record, location = self.source[row], self.source.location(row)
        try:
            content = recognize(self.kind, record, self.settings.columns, row=row, location=location)
            return question_of(content, record, row, self.tokenizer, self.settings)
        except DataError as error:
            kind = NoReference if isinstance(error, NoReference) else DataError
            raise kind(self._row_error(row, error)) from None

    def tokenize_all(self) -> Iterator[Result]:
        """Every row in order, as an example (a split text as several) or as left out with the reason.

        Raises TooLong at the first long row if `truncate` is `error`.
        """
        return iter(self.completed(chain.from_iterable(self.each_row())))

    def completed(self, results: Iterable[Result]) -> Iterable[Result]:
        """The results of all rows, with what an example takes from other rows."""
        return ROW_KINDS[self.kind].complete(results, self.settings)

    def each_row(self) -> Iterator[Sequence[Result]]:
        """The results of each row, in order, before they are `completed`. Raises as `tokenize_all` does."""
        for row in range(len(self.source)):
            location = self.source.location(row)
            try:
                content = recognize(self.kind, self.source[row], self.settings.columns, row=row, location=location)
                conversations = tokenize_as(self.kind, content, self.tokenizer, self.settings)
                made: Sequence[Result] = examples_of(self.kind, content, conversations, row, self.settings)
            except TooLong as error:
                raise TooLong(self._row_error(row, error)) from None
            except DataError as error:
                made = [LeftOut(row, self._row_error(row, error))]
            yield made

    def _row_error(self, row: int, error: DataError) -> str:
        """The error with the row number first, and the row's location if that has another number."""
        text = str(error)
        text = text.removeprefix(f"row {row}: ")
        if text.startswith("row "):
            return text
        location = self.source.location(row)
        return f"row {row}: {text}" if location in text else f"{self.source.named(row)}: {text}"


def longest(examples: Sequence[Example]) -> int:
    """Tokens of the longest sequence in these examples; 0 without any."""
    return max((len(sequence.tokens) for example in examples for sequence in example.sequences), default=0)


def beyond_context(examples: Sequence[Example], settings: ExampleSettings) -> int:
    """Tokens of the longest sequence if it is longer than the model was made for, else 0."""
    length, context = longest(examples) + settings.completion, settings.limits.context
    return length if context is not None and length > context else 0


def trains_plain_text(examples: Examples) -> bool:
    """Whether the first readable row is plain text that is not a written-out chat."""
    views = (examples.view(row) for row in range(min(len(examples), _FIRST_ROWS)))
    first = next((view for view in views if view.conversation is not None), None)
    return first is not None and isinstance(first.content, TextRow) and not first.conversations[0].written


def tokenize_as(kind: str, content: RowContent, tokenizer: Tokenizer, settings: ExampleSettings) -> Conversations:
    """The sequences that the model reads for a row, before truncation: for a pair the chosen, then the rejected answer.

    Raises MaskRefused if no trustworthy mask exists, DataError if the template cannot render the row.
    """
    return ROW_KINDS[kind].tokenize(content, tokenizer, settings.loss_on, settings.rendering)


def examples_of(
    kind: str, content: RowContent, conversations: Conversations, row: int, settings: ExampleSettings
) -> Sequence[Example]:
    """The example of a row within `max_seq_length`, or several of a split text; without what comes from other rows.

    Raises DataError if nothing is left to train on, TooLong with `truncate: error`, OutsideVocabulary and
    BeyondPositions for what the model cannot read. The errors do not name the row.
    """
    examples = ROW_KINDS[kind].cut(content, conversations, row, settings)
    for sequence in (sequence for example in examples for sequence in example.sequences):
        settings.limits.require(sequence.tokens, sequence.loss_mask, more=settings.completion)
    weighted = ROW_KINDS[kind].weighted
    if weighted is not None and row in settings.down_weighted:
        return [weighted(example, settings.down_weight_factor) for example in examples]
    return examples


def split_examples(
    results: Sequence[Result],
) -> tuple[list[Any], list[LeftOut]]:
    """Separate the trainable examples from the rows that were left out."""
    kept = [result for result in results if not isinstance(result, LeftOut)]
    left_out = [result for result in results if isinstance(result, LeftOut)]
    return kept, left_out
