"""The kinds of rows that training methods take, and how a row of each is recognised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mlx_nb.data.rows.columns import AUTOMATIC, Columns, placed
from mlx_nb.data.rows.imitation import Row, token_row
from mlx_nb.data.rows.preference import LabelledRow, PreferenceRow, labelled_row, preference_row
from mlx_nb.data.rows.prompt import PromptRow, prompt_row

# Rows with a prompt of their own: the same one may be asked again, with other answers.
Asking = PreferenceRow | LabelledRow | PromptRow
AnyRow = Row | Asking

_BUILDERS: dict[str, Callable[[Mapping[str, Any], Columns], AnyRow]] = {
    "tokens": token_row,
    "pairs": preference_row,
    "labels": labelled_row,
    "prompts": prompt_row,
}
ROW_KINDS = tuple(_BUILDERS)


def recognise_as(
    kind: str, record: Mapping[str, Any], columns: Columns = AUTOMATIC, *, row: int | None = None, location: str = ""
) -> AnyRow:
    """A row as one of a kind, whatever else it could be.

    tokens   ChatRow, PromptCompletionRow or TextRow: something to imitate
    pairs    PreferenceRow: two answers to one prompt, the first better
    labels   LabelledRow: one answer, good or bad
    prompts  PromptRow: a question that the model answers itself

    `record` is not changed. `row` and `location` name the row in errors. Raises DataError: one line, what is wrong.
    """
    with placed(row, location):
        return _BUILDERS[kind](record, columns)
