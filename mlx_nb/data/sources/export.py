"""Rows as a new file of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from mlx_nb.data.sources.row_source import RowSource
from mlx_nb.errors import CommandError


def write_rows(source: RowSource, rows: Iterable[int], place: Path) -> int:
    """Write these rows to a file that is not there yet, one a line, for `data:`. Returns how many.

    Raises CommandError where a file is already, or nothing can be written.
    """
    written = 0
    try:
        with place.open("x", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(source[row], ensure_ascii=False, default=str) + "\n")
                written += 1
    except FileExistsError:
        raise CommandError(f"{place} already exists and is not overwritten. Name another file.") from None
    except OSError as error:
        raise CommandError(f"{place} cannot be written: {error.strerror or error}. Name another file.") from None
    return written
