"""Tables of rows that are no files: lists, DataFrames, Datasets; and datasets that were saved to disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_nb.data.sources.files import without_nested_none
from mlx_nb.data.sources.plain_values import is_missing, plain_value
from mlx_nb.data.sources.row_source import RowSource
from mlx_nb.errors import DataError

KNOWN_KINDS = (
    "Data is a folder, a .jsonl, .json, .parquet, .tsv or .csv file, a hub id owner/name, a list of dicts, "
    "a pandas DataFrame, a datasets.Dataset, or a dict of splits."
)


def could_be_rows(value: object) -> bool:
    """Whether a variable of the notebook is of a kind that can hold rows."""
    if isinstance(value, (list, tuple, Mapping, os.PathLike, RowSource)):
        return True
    return type(value).__module__.split(".")[0] in ("pandas", "datasets")


def table_in_memory(value: object, label: str) -> RowSource:
    """The rows of a list, DataFrame or Dataset. Raises DataError for anything else."""
    if isinstance(value, (list, tuple)):
        return _in_memory([_with_plain_columns(record) for record in value], label)
    library, kind = type(value).__module__.split(".")[0], type(value).__name__
    if library == "pandas" and kind == "DataFrame":
        frame: Any = value
        return _in_memory([plain_value(record) for record in frame.to_dict("records")], label)
    if library == "datasets" and kind == "Dataset":
        dataset: Any = value
        return _lazy_table(label, len(dataset), lambda row: without_nested_none(_with_plain_columns(dataset[row])))
    if library == "datasets" and kind == "IterableDataset":
        raise DataError(f"{label} is a streaming dataset, which has no rows by number. Use list({label}.take(1000)).")
    raise DataError(f"{label} is of type {kind}, which holds no rows. {KNOWN_KINDS}")


def saved_dataset(folder: Path) -> Any:
    """The Dataset or DatasetDict that `save_to_disk` wrote. Raises DataError when it is damaged."""
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"folder {folder} was written by save_to_disk, and is damaged or not whole: "
            f"{reason.rstrip('.')}. Save it again."
        ) from None


def _with_plain_columns(record: Any) -> Any:
    """A row whose columns may be arrays, and NaN where they have no value, as `to_dict` of pandas gives them."""
    if not isinstance(record, Mapping):
        return record
    return {
        key: plain_value(item) if isinstance(item, np.ndarray) or is_missing(item) else item
        for key, item in record.items()
    }


def _in_memory(records: Sequence[Any], label: str) -> RowSource:
    return _lazy_table(label, len(records), records.__getitem__, lambda row: f"{label}[{row}]")


def _lazy_table(
    label: str,
    length: int,
    read: Callable[[int], Mapping[str, Any]],
    locate: Callable[[int], str] | None = None,
) -> RowSource:
    def digest() -> str:
        content = hashlib.sha256()
        for row in range(length):
            record = json.dumps(read(row), sort_keys=True, default=str)
            content.update(record.encode() + b"\n")
        return content.hexdigest()

    return RowSource(label, length, read, locate or (lambda row: f"{label} row {row}"), digest)
