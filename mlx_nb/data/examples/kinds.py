"""The kinds of rows that training methods take: how each is read, tokenized, cut and completed.

A new kind is a `RowKind` here with a reader of its own, its facts in `config/row_kinds.py`, and the common part of its
losses in `objectives/kinds.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_nb.data.examples.imitation import TokenizedExample, cut_row, tokenize_row
from mlx_nb.data.examples.preference import (
    LabeledExample,
    PreferenceExample,
    labeled_example,
    preference_example,
    tokenize_labeled,
    tokenize_pair,
    with_mismatched,
)
from mlx_nb.data.examples.prompt import PromptExample, prompt_example, tokenize_prompt
from mlx_nb.data.examples.settings import ExampleSettings, LeftOut
from mlx_nb.data.masks.conversation import TokenizedConversation
from mlx_nb.data.masks.prompt_format import Rendering
from mlx_nb.data.rows.columns import AUTOMATIC, Columns, errors_at
from mlx_nb.data.rows.content import RowContent
from mlx_nb.data.rows.imitation import token_row
from mlx_nb.data.rows.preference import labeled_row, preference_row
from mlx_nb.data.rows.prompt import prompt_row

Example = TokenizedExample | PreferenceExample | LabeledExample | PromptExample
Result = Example | LeftOut
Conversations = tuple[TokenizedConversation, ...]
Remarks = Iterator[tuple[str, str]]


def _as_they_are(results: Iterable[Result], _settings: ExampleSettings) -> Iterable[Result]:
    return results


def _no_remarks(_record: Mapping[str, Any], _content: Any) -> Remarks:
    return iter(())


@dataclass(frozen=True)
class RowKind:
    """One kind of row.

    read      a row's columns -> its recognized content; raises DataError
    tokenize  (content, tokenizer, loss_on, rendering) -> what the model reads, before truncation: for a pair
              the chosen, then the rejected answer; raises MaskRefused, DataError
    cut       (content, conversations, row, settings) -> its examples within `max_seq_length`; raises DataError, TooLong
    complete  the results of all rows, with what an example takes from other rows
    remarks   oddities of a row of this kind, each with the kind of finding that it is
    weighted  (example, factor) -> the example with its weight in the loss scaled by the factor
    answered  whether the rows contain the trained answers; otherwise the model generates them
    compared  how rows are compared, mentioned if some are similar; empty = by all their content
    unit      what is counted in a data check
    """

    read: Callable[[Mapping[str, Any], Columns], RowContent]
    tokenize: Callable[[Any, Any, str, Rendering], Conversations]
    cut: Callable[[Any, Conversations, int, ExampleSettings], Sequence[Example]]
    complete: Callable[[Any, ExampleSettings], Iterable[Result]] = _as_they_are
    remarks: Callable[[Mapping[str, Any], Any], Remarks] = _no_remarks
    weighted: Callable[[Any, float], Example] | None = None
    answered: bool = True
    compared: str = ""
    unit: str = "row"


BY_PROMPT = "by their prompts"


def _label_of_a_bad_answer(record: Mapping[str, Any], _content: Any) -> Remarks:
    # The number 0 is not meant: it can be a class label.
    label = record.get("label")
    if label.strip().lower() == "false" if isinstance(label, str) else isinstance(label, bool | np.bool_) and not label:
        yield "labeled_bad", "the `label` says that the answer is bad"


def _answer_is_missing(_record: Mapping[str, Any], content: Any) -> Remarks:
    if content.answer is None:
        yield "missing_answers", "the prompt has no answer"


ROW_KINDS: dict[str, RowKind] = {
    "tokens": RowKind(
        token_row,
        lambda *row: (tokenize_row(*row),),
        lambda content, read, row, settings: cut_row(content, read[0], row, settings),
        remarks=_label_of_a_bad_answer,
        weighted=lambda example, factor: replace(example, loss_mask=example.loss_mask * np.float32(factor)),
    ),
    "pairs": RowKind(
        preference_row,
        tokenize_pair,
        lambda content, read, row, settings: [preference_example(content, (read[0], read[1]), row, settings)],
        weighted=lambda example, factor: replace(example, weight=example.weight * factor),
        compared=BY_PROMPT,
        unit="answer",
    ),
    "labels": RowKind(
        labeled_row,
        lambda *row: (tokenize_labeled(*row),),
        lambda content, read, row, settings: [labeled_example(content, read[0], row, settings)],
        with_mismatched,
        compared=BY_PROMPT,
    ),
    "prompts": RowKind(
        prompt_row,
        lambda content, tokenizer, _loss_on, rendering: (tokenize_prompt(content, tokenizer, rendering),),
        lambda content, read, row, settings: [prompt_example(content, read[0], row, settings)],
        remarks=_answer_is_missing,
        answered=False,
        compared=BY_PROMPT,
    ),
}


def recognize(
    kind: str, record: Mapping[str, Any], columns: Columns = AUTOMATIC, *, row: int | None = None, location: str = ""
) -> RowContent:
    """Recognize a row as one of a kind, whatever else it could be.

    tokens   ChatRow, PromptCompletionRow or TextRow: something to imitate
    pairs    PreferenceRow: two answers to one prompt, the first better
    labels   LabeledRow: one answer, good or bad
    prompts  PromptRow: a prompt that the model answers itself

    `record` is not changed. `row` and `location` identify the row in errors. Raises DataError in one line.
    """
    with errors_at(row, location):
        return ROW_KINDS[kind].read(record, columns)
