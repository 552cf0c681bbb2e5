"""The rows of a split as a sequence to look at: `run.rows("train")[12]`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.examples.examples import Examples, RowView, refuse_no_such_row
from mlx_nb.data.sources.export import write_rows
from mlx_nb.errors import CommandError
from mlx_nb.files.places import folder_of, working_folder
from mlx_nb.run.inputs import RunInputs
from mlx_nb.view.rows.display import ShownRow


def rows(data: Any, split: str = "train", *, namespace: Mapping[str, Any] | None = None, **settings: Any) -> Rows:
    """The rows of any data as a model will see them: `mlx_nb.rows(bees, model="smollm2-135m")`. Needs no run.

    `data` takes what the setting takes, or the rows themselves. `settings` are settings of a run, such as `model`,
    `method`, `chat_template` and `max_seq_length`. Only the tokenizer of the model is loaded. Raises ConfigError,
    DataError or ModelError, each in one line.
    """
    inputs = RunInputs(RunConfig.from_dict({**settings, "data": data}).at(working_folder()), namespace)
    return Rows(inputs.split(split), split)


class Rows(Sequence[RowView]):
    """The rows of one split as the model will see them. Each is tokenized on access and displays itself."""

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

    def edited(self, row: int, /, **columns: Any) -> Any:
        """Row `row` with changed columns, as the model would see it: `rows.edited(12, completion="Yes")`.

        The data are not changed.
        """
        before = self[row]
        examples = self.examples
        view = examples.view(before.row, {**examples.source[before.row], **columns})
        return ShownRow.of(view, examples.tokenizer, self.split)

    def export(self, path: str | Path, *, leave_out: Collection[int] = ()) -> Path:
        """Write all rows except `leave_out` to a new JSON Lines file for `data:`. Returns its path.

        Raises CommandError if the file exists or cannot be written.
        """
        place, left = folder_of(str(path), working_folder()), frozenset(leave_out)
        refuse_no_such_row("leave_out", left, self.examples.source)
        write_rows(self.examples.source, (row for row in range(len(self)) if row not in left), place)
        return place

    def __repr__(self) -> str:
        return f"Rows({self.split}, {len(self)} rows)"
