"""The rows of a split as a person looks at them: `run.rows("train")[12]`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_nb.data.examples.split import Examples, RowView
from mlx_nb.errors import CommandError
from mlx_nb.view.rows.display import ShownRow


class Rows(Sequence[RowView]):
    """The rows of one split as the model will see them; each is tokenized when asked for, and displays itself."""

    def __init__(self, examples: Examples, split: str) -> None:
        self.examples = examples
        self.split = split

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, row: Any) -> Any:
        if not isinstance(row, int):
            raise CommandError(f"row numbers are whole numbers, not {row!r}.")
        index = row + len(self) if row < 0 else row
        if not 0 <= index < len(self):
            raise IndexError(f"no row {row}: {self.split} has rows 0 to {len(self) - 1}.")
        return ShownRow.of(self.examples.view(index), self.examples.tokenizer, self.split)

    def __repr__(self) -> str:
        return f"Rows({self.split}, {len(self)} rows)"
