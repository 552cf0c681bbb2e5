"""Tables of rows in memory (lists, DataFrames, Datasets) and datasets that were saved to disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_nb.data.sources.files import without_nested_none
from mlx_nb.data.sources.plain_values import is_missing, plain_value
from mlx_nb.data.sources.row_source import RowSource
from mlx_nb.data.sources.row_values import exact_digest, refuse_odd, value_text
from mlx_nb.errors import DataError

KNOWN_KINDS = (
    "Data is a folder, a .jsonl, .json, .parquet, .tsv or .csv file, a hub id owner/name, a list of dicts, "
    "a pandas DataFrame, a datasets.Dataset, or a dict of splits."
)


def could_be_rows(value: object) -> bool:
    """Whether a notebook variable is of a type that can hold rows."""
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
        return _in_memory(frame.to_dict("records"), label, _of_frame)
    if library == "datasets" and kind == "Dataset":
        dataset: Any = value
        return _lazy_table(label, len(dataset), lambda row: without_nested_none(_with_plain_columns(dataset[row])))
    if library == "datasets" and kind == "IterableDataset":
        raise DataError(f"{label} is a streaming dataset, which has no rows by number. Use list({label}.take(1000)).")
    raise DataError(f"{label} is of type {kind}, which holds no rows. {KNOWN_KINDS}")


def saved_dataset(folder: Path) -> Any:
    """The Dataset or DatasetDict that `save_to_disk` wrote. Raises DataError if it is damaged."""
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
    """A row whose columns may be arrays, with NaN for missing values, as pandas' `to_dict` gives them."""
    if not isinstance(record, Mapping):
        return record
    try:
        return {
            key: plain_value(item) if isinstance(item, np.ndarray) or is_missing(item) else item
            for key, item in record.items()
        }
    except MemoryError:
        raise
    except Exception:  # an endless array, or a faulty mapping: reported when the row is read
        return record


def _of_frame(record: Mapping[Any, Any]) -> dict[str, Any]:
    """A row of a DataFrame, whose columns may have numbers as names."""
    refuse_odd({str(column): value for column, value in record.items()})
    return {str(column): plain_value(value) for column, value in record.items()}


def _in_memory(records: Sequence[Any], label: str, read: Callable[[Any], Any] = lambda record: record) -> RowSource:
    def locate(row: int) -> str:
        return f"{label}[{row}]"

    return _lazy_table(label, len(records), lambda row: read(records[row]), locate, records.__getitem__)


def _lazy_table(
    label: str,
    length: int,
    read: Callable[[int], Any],
    locate: Callable[[int], str] | None = None,
    raw: Callable[[int], Any] | None = None,
) -> RowSource:
    """`raw` gives a row that `read` refuses, so that it can still be distinguished from others."""

    def digest() -> str:
        content = hashlib.sha256()
        for row in range(length):
            content.update(text(row).encode() + b"\n")
        return content.hexdigest()

    def text(row: int) -> str:
        try:
            return value_text(read(row))
        except MemoryError:
            raise
        except Exception as error:
            return exact_digest(raw(row)) if raw is not None else f"{type(error).__name__}: {error}"

    return RowSource(label, length, read, locate or (lambda row: f"{label} row {row}"), digest)
