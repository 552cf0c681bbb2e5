"""One file of rows: jsonl (lazily, by an index of its lines), json, csv or parquet.

Rows are counted from 0 (as in `run.rows("train")[12]`), lines of a file from 1 (as an editor shows them).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlx_nb.data.row_source import RowSource
from mlx_nb.errors import DataError, did_you_mean

_SCAN_BYTES = 1 << 22


def open_file(path: Path) -> RowSource:
    """The rows of one file. Raises DataError when its ending or content is not that of rows."""
    read = READERS.get(path.suffix)
    if read is None:
        ending = f"ends in {path.suffix}" if path.suffix else "has no ending"
        near = did_you_mean(path.suffix.lower(), READERS)
        raise DataError(f"{path} {ending}; rows are read from .jsonl, .json, .parquet and .csv files.{near}")
    try:
        with path.open("rb") as file:
            start = file.read(64)
        if not start:
            raise DataError(f"{path} is empty (0 bytes).")
        for magic, what in _NOT_ROWS.items():
            if start.startswith(magic) and not (magic == b"PAR1" and path.suffix == ".parquet"):
                raise DataError(f"{path} is not a {path.suffix} file: by its content it is {what}.")
        return read(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None


_NOT_ROWS = {
    b"PAR1": "a parquet file. Rename it to .parquet",
    b"\x1f\x8b": "compressed with gzip. Decompress it first",
    b"PK\x03\x04": "a zip archive. Unpack it first",
    b"version https://git-lfs": "a Git LFS pointer. Run `git lfs pull`",
    b"\xff\xfe": "text in UTF-16. Save it as UTF-8",
    b"\xfe\xff": "text in UTF-16. Save it as UTF-8",
    b"<!": "a web page. Download the raw file",
    b"<html": "a web page. Download the raw file",
}


class _JsonLines:
    """The index of a jsonl file: where each row starts. The file stays open and is never held in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        self.state = self._current_state()
        self.bounds, self.line_numbers = self._index()

    def _current_state(self) -> tuple[int, int]:
        status = os.fstat(self.descriptor)
        return status.st_size, status.st_mtime_ns

    def _index(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Byte offset of each row and of the file's end, and line numbers if blank lines were skipped."""
        size, offset = self.state[0], 0
        if os.pread(self.descriptor, 3, 0) == b"\xef\xbb\xbf":
            offset = 3
        found, perhaps_blank = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=bool)]
        at_line_start = True
        while block := os.pread(self.descriptor, _SCAN_BYTES, offset):
            data = np.frombuffer(block, dtype=np.uint8)
            starts = np.flatnonzero(data == 0x0A) + 1
            if at_line_start:
                starts = np.insert(starts, 0, 0)
            at_line_start = bool(starts.size) and starts[-1] == len(data)
            starts = starts[: len(starts) - at_line_start]
            found.append(starts + offset)
            perhaps_blank.append(data[starts] <= 0x20)
            offset += len(data)
        bounds = np.append(np.concatenate(found), size)
        blank = [line for line in np.flatnonzero(np.concatenate(perhaps_blank)) if not self._line(bounds, line)]
        if not blank:
            return bounds, None
        return np.delete(bounds, blank), np.delete(np.arange(1, len(bounds)), blank)

    def _line(self, bounds: np.ndarray, line: int | np.integer) -> bytes:
        start, end = int(bounds[line]), int(bounds[line + 1])
        return os.pread(self.descriptor, end - start, start).rstrip()

    def location(self, row: int) -> str:
        line = row + 1 if self.line_numbers is None else self.line_numbers[row]
        return f"{self.path.name} line {line}"

    def read(self, row: int) -> dict[str, Any]:
        self._check_unchanged()
        line = self._line(self.bounds, row)
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            byte = line[error.start]
            problem = f"not valid UTF-8 (byte 0x{byte:02x} at byte {error.start + 1} of the line)"
            raise DataError(f"{self.location(row)}: {problem}. Save the file as UTF-8.") from None
        except json.JSONDecodeError as error:
            raise DataError(f"{self.location(row)}: {_json_problem(row, line, error)}") from None
        except (RecursionError, ValueError) as error:
            raise DataError(f"{self.location(row)}: not readable ({error}). Fix or delete the line.") from None
        if not isinstance(record, dict):
            kind = "an array" if isinstance(record, list) else f"{record!r:.40}"
            fix = "Rename the file to .json" if isinstance(record, list) and row == 0 else "Fix or delete the line"
            raise DataError(f"{self.location(row)}: a row must be a JSON object {{...}}, not {kind}. {fix}.")
        return record

    def digest(self) -> str:
        self._check_unchanged()
        with open(os.dup(self.descriptor), "rb") as file:
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _check_unchanged(self) -> None:
        if self._current_state() != self.state:
            raise DataError(f"{self.path} was changed while it was open. Open the data again to read it anew.")


def _json_problem(row: int, line: bytes, error: json.JSONDecodeError) -> str:
    if row == 0 and line in (b"[", b"{"):
        return "the file holds JSON over several lines; .jsonl needs one object per line. Rename it to .json."
    return f"not valid JSON ({error.msg} at column {error.colno}). Fix or delete the line."


def _open_jsonl(path: Path) -> RowSource:
    index = _JsonLines(path)
    return RowSource(path.name, len(index.bounds) - 1, index.read, index.location, index.digest)


def _open_json(path: Path) -> RowSource:
    """A list of objects; or, under a wrong ending, JSON lines."""
    content = path.read_bytes()
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: not valid UTF-8 at byte {error.start}. Save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            return _open_jsonl(path)
        where = f"line {error.lineno} column {error.colno}"
        raise DataError(f"{path.name}: not valid JSON ({error.msg} at {where}). Fix the file.") from None
    except RecursionError:
        raise DataError(f"{path.name}: nested too deeply to be rows.") from None
    if not isinstance(value, list):
        kind = "one object" if isinstance(value, dict) else type(value).__name__
        raise DataError(f"{path.name} holds {kind}; expected a list of objects [{{...}}, {{...}}].")
    return _from_file(path, len(value), value.__getitem__, lambda row: f"{path.name} row {row}", content)


def _open_csv(path: Path) -> RowSource:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path.name} line {line}: not valid UTF-8. Save the file as UTF-8.") from None
    limit = csv.field_size_limit(sys.maxsize)
    try:
        records, lines = _csv_records(path.name, text)
    finally:
        csv.field_size_limit(limit)
    return _from_file(path, len(records), records.__getitem__, lambda row: f"{path.name} line {lines[row]}", content)


def _csv_records(name: str, text: str) -> tuple[list[dict[str, Any]], list[int]]:
    """The records and the line each starts on. An empty cell is None."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    records, lines, line = [], [], 1
    try:
        header = next(reader, [])
        if len(set(header)) < len(header) or "" in header:
            raise DataError(f"{name} line 1: the header has an empty or repeated column name: {', '.join(header)}.")
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{name} line {line}: {len(cells)} cells, but the header has {len(header)}. "
                    'Put text with commas or line breaks in "quotes".'
                )
            if cells:
                records.append({column: cell or None for column, cell in zip(header, cells)})
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{name} line {line}: not valid CSV ({error}). Fix or delete the record.") from None
    return records, lines


def _open_parquet(path: Path) -> RowSource:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path.name} is no readable parquet file: {str(error).splitlines()[0]}") from None

    def read(row: int) -> Mapping[str, Any]:
        return without_nested_none(table.slice(row, 1).to_pylist()[0])

    return _from_file(path, table.num_rows, read, lambda row: f"{path.name} row {row}")


def _from_file(
    path: Path,
    length: int,
    read: Callable[[int], Mapping[str, Any]],
    locate: Callable[[int], str],
    content: bytes | None = None,
) -> RowSource:
    digest = hashlib.sha256(path.read_bytes() if content is None else content).hexdigest()
    return RowSource(path.name, length, read, locate, lambda: digest)


READERS: dict[str, Callable[[Path], RowSource]] = {
    ".jsonl": _open_jsonl,
    ".json": _open_json,
    ".parquet": _open_parquet,
    ".csv": _open_csv,
}


def without_nested_none(record: Mapping[str, Any]) -> dict[str, Any]:
    """Arrow gives every object in a list the keys of all the others, as nulls: take them out again."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: clean(item) for key, item in value.items() if item is not None}
        return [clean(item) for item in value] if isinstance(value, list) else value

    return {key: clean(value) for key, value in record.items()}
