"""One file of rows: jsonl (read lazily, by an index of its lines), json, csv, tsv or parquet, also compressed.

Rows are counted from 0 (as in `run.rows("train")[12]`), lines of a file from 1 (as in an editor).
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
from typing import IO, Any

import numpy as np

from mlx_nb.data.sources.compression import compression_of, decompressed, row_endings
from mlx_nb.data.sources.folders import TRAIN_NAMES
from mlx_nb.data.sources.row_source import RowSource, is_of_messages
from mlx_nb.errors import DataError, did_you_mean

_SCAN_BYTES = 1 << 22


def open_file(path: Path) -> RowSource | dict[str, RowSource]:
    """The rows of one file; for a .json file `{"train": [...], "valid": [...]}`, the rows of each list by its name.

    A compressed file (.jsonl.gz, .csv.zst, ...) is read as its content, which also determines its fingerprint.
    Fingerprints are taken here, so they describe the rows that were read, whatever happens to the file later. Raises
    DataError if its extension or content is not that of rows.
    """
    ending, compression = row_endings(path)
    read = _READERS.get(ending)
    if read is None:
        raise DataError(_unknown_ending(path, ending, compression))
    try:
        stamp = _stamp(path)
        with path.open("rb") as file:
            start = file.read(64)
        if not start:
            raise DataError(f"{path} is empty (0 bytes). Remove it, or download it again.")
        if compression and compression_of(start) != compression:
            fault = _no_rows(start, path) or f"not compressed that way. Rename it to {path.stem}"
            raise DataError(f"{path} is not a {compression} file: by its content it is {fault}.")
        with decompressed(path) if compression else path.open("rb") as content:
            start = content.read(64)
            content.seek(0)
            fault = _no_rows(start, path)
            if fault and not (ending == ".parquet" and start.startswith(b"PAR1")):
                raise DataError(f"{path} is not a {ending} file: by its content it is {fault}.")
            opened = read(path, content)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None
    tables = [opened] if isinstance(opened, RowSource) else list(opened.values())
    read_as = [table.fingerprint() for table in tables]
    watch = _Watch(path, stamp, read_as)
    for table in tables:
        table.changed = watch.changed
    return opened


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """A stamp that usually changes with the file; None if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


class _Watch:
    """Detects whether the content of a file changed since it was read. Only a file with a new stamp is read again."""

    def __init__(self, path: Path, stamp: tuple[int, int, int] | None, read_as: list[str]) -> None:
        self._path = path
        self._stamp = stamp
        self._read_as = read_as

    def changed(self) -> list[str]:
        """The path, if the content has changed."""
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return []
        try:
            opened = open_file(self._path)
        except DataError:
            return [str(self._path)]
        tables = [opened] if isinstance(opened, RowSource) else list(opened.values())
        if [table.fingerprint() for table in tables] != self._read_as:
            return [str(self._path)]
        self._stamp = stamp
        return []


def holds_rows(path: Path) -> bool:
    """Whether rows can be read from a file with this extension."""
    return row_endings(path)[0] in _READERS


_COMPRESSED_WITH = {".gz": "gzip", ".zst": "zstandard", ".bz2": "bzip2", ".xz": "xz"}
_NOT_ROWS = {
    b"PAR1": "a parquet file. Rename it to .parquet",
    b"PK\x03\x04": "a zip archive. Unpack it first",
    b"version https://git-lfs": "a Git LFS pointer. Run `git lfs pull`",
    b"\xff\xfe": "text in UTF-16. Save it as UTF-8",
    b"\xfe\xff": "text in UTF-16. Save it as UTF-8",
    b"<!": "a web page. Download the raw file",
    b"<html": "a web page. Download the raw file",
}


def _no_rows(start: bytes, path: Path) -> str:
    """What a file with these first bytes is, and what to do, if it is not a file of rows."""
    compression = compression_of(start)
    if compression:
        return f"compressed with {_COMPRESSED_WITH[compression]}. Rename it to {path.name}{compression}"
    return next((what for magic, what in _NOT_ROWS.items() if start.startswith(magic)), "")


def _unknown_ending(path: Path, ending: str, compression: str) -> str:
    if compression and not ending:
        return f"{path} does not say what is compressed. Give it a name such as {path.stem}.jsonl{compression}."
    if ending == ".arrow":
        return f"{path} is part of a dataset. Give the folder that save_to_disk wrote, or save the rows as parquet."
    known = "rows are read from .jsonl, .json, .parquet, .tsv and .csv files."
    found = f"ends in {ending}{compression}" if ending else "has no ending"
    return f"{path} {found}; {known}{did_you_mean(ending.lower(), _READERS)}"


class _JsonLines:
    """The index of a jsonl file: where each row starts. The file stays open and is never loaded whole."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path = path
        self.descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self.descriptor)
        self.state = self._current_state()
        self.bounds, self.line_numbers = self._index()

    def _current_state(self) -> tuple[int, int]:
        status = os.fstat(self.descriptor)
        return status.st_size, status.st_mtime_ns

    def _index(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Byte offset of each row and of the end of the file, and line numbers if blank lines were skipped."""
        size, offset = self.state[0], 0
        self.content = hashlib.sha256()
        if (mark := os.pread(self.descriptor, 3, 0)) == b"\xef\xbb\xbf":
            offset = 3
            self.content.update(mark)
        found, perhaps_blank = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=bool)]
        at_line_start = True
        while block := os.pread(self.descriptor, _SCAN_BYTES, offset):
            self.content.update(block)
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
        if not isinstance(record, dict) and not is_of_messages(record):
            kind = "an array" if isinstance(record, list) else f"{record!r:.40}"
            fix = "Rename the file to .json" if isinstance(record, list) and row == 0 else "Fix or delete the line"
            raise DataError(f"{self.location(row)}: a row must be a JSON object {{...}}, not {kind}. {fix}.")
        return record if isinstance(record, dict) else {"messages": record}

    def digest(self) -> str:
        """Digest of the bytes that were indexed."""
        return self.content.hexdigest()

    def _check_unchanged(self) -> None:
        """Raise DataError if the content is not what was indexed. A file that was only touched counts as unchanged."""
        state = self._current_state()
        if state == self.state:
            return
        if state[0] == self.state[0]:
            with open(os.dup(self.descriptor), "rb") as file:
                file.seek(0)
                same = hashlib.file_digest(file, "sha256").hexdigest() == self.digest()
        else:
            same = False
        if same:
            self.state = state
        else:
            raise DataError(f"{self.path} was changed while it was open. Open the data again to read the new content.")


def _json_problem(row: int, line: bytes, error: json.JSONDecodeError) -> str:
    if row == 0 and line in (b"[", b"{"):
        return "the file holds JSON over several lines; .jsonl needs one object per line. Rename it to .json."
    return f"not valid JSON ({_fault(error, f'column {error.colno}')}). Fix or delete the line."


def _fault(error: json.JSONDecodeError, where: str) -> str:
    """What is wrong, and where. Some of Python's own messages end with "at" already."""
    return f"{error.msg.removesuffix(' at')} at {where}"


def _open_jsonl(path: Path, file: IO[bytes]) -> RowSource:
    index = _JsonLines(path, file)
    return RowSource(path.name, len(index.bounds) - 1, index.read, index.location, index.digest)


def _open_json(path: Path, file: IO[bytes]) -> RowSource | dict[str, RowSource]:
    """A list of rows, or an object with the list of each split; or JSON lines with the wrong extension."""
    content = file.read()
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: not valid UTF-8 at byte {error.start}. Save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"[")):
            return _open_jsonl(path, file)
        fault = _fault(error, f"line {error.lineno} column {error.colno}")
        raise DataError(f"{path.name}: not valid JSON ({fault}). Fix the file.") from None
    except (RecursionError, ValueError) as error:
        fault = "nested too deeply to be rows" if isinstance(error, RecursionError) else f"not readable ({error})"
        raise DataError(f"{path.name}: {fault}.") from None
    digest = hashlib.sha256(content)
    if isinstance(value, list):
        return _from_json(path.name, value, digest.hexdigest())
    if not isinstance(value, dict) or not _holds_splits(value):
        kind = "one object" if isinstance(value, dict) else type(value).__name__
        raise DataError(
            f"{path.name} holds {kind}; expected a list of objects [{{...}}, {{...}}], "
            'or such a list for each split {"train": [...]}.'
        )
    splits = {}
    for name, records in value.items():
        if isinstance(records, list):
            part = digest.copy()
            part.update(name.encode())
            splits[name] = _from_json(f"{path.name}[{name!r}]", records, part.hexdigest())
    return splits


def _holds_splits(value: Mapping[str, Any]) -> bool:
    """Whether an object contains lists of rows by split, as opposed to being a row itself."""
    if any(isinstance(value.get(name), list) for name in TRAIN_NAMES):
        return True
    return bool(value) and all(
        isinstance(rows, list) and not is_of_messages(rows) and all(isinstance(row, dict) for row in rows)
        for rows in value.values()
    )


def _from_json(name: str, records: list[Any], digest: str) -> RowSource:
    return RowSource(name, len(records), records.__getitem__, lambda row: f"{name} row {row}", lambda: digest)


def _open_csv(path: Path, file: IO[bytes], delimiter: str = ",") -> RowSource:
    content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path.name} line {line}: not valid UTF-8. Save the file as UTF-8.") from None
    limit = csv.field_size_limit(sys.maxsize)
    try:
        records, lines = _csv_records(path.name, text, delimiter)
    finally:
        csv.field_size_limit(limit)
    digest = hashlib.sha256(content).hexdigest()
    return RowSource(
        path.name, len(records), records.__getitem__, lambda row: f"{path.name} line {lines[row]}", lambda: digest
    )


def _open_tsv(path: Path, file: IO[bytes]) -> RowSource:
    return _open_csv(path, file, delimiter="\t")


def _csv_records(name: str, text: str, delimiter: str) -> tuple[list[dict[str, Any]], list[int]]:
    """The records and the line each starts on. An empty cell is None."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    records, lines, line = [], [], 1
    try:
        header = next(reader, [])
        _check_delimiter(name, header, delimiter)
        if header[:1] == [""]:
            header[0] = _PANDAS_INDEX
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


# pandas' own name for the unnamed first column that `DataFrame.to_csv` writes.
_PANDAS_INDEX = "Unnamed: 0"


def _check_delimiter(name: str, header: list[str], delimiter: str) -> None:
    """Raise DataError if the whole header is one cell because the columns have another separator."""
    other = next((mark for mark in ("\t", ";", "|", ",") if len(header) == 1 and mark in header[0]), delimiter)
    if other != delimiter:
        fix = "Rename it to .tsv" if other == "\t" else "Rename it to .csv" if other == "," else "Save it with commas"
        raise DataError(f"{name} line 1: the columns are separated by {other!r}, not by {delimiter!r}. {fix}.")


def _open_parquet(path: Path, file: IO[bytes]) -> RowSource:
    import pyarrow
    import pyarrow.parquet

    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    file.seek(0)
    try:
        table = pyarrow.parquet.read_table(file)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path.name} is not a readable parquet file: {str(error).splitlines()[0]}") from None

    def read(row: int) -> Mapping[str, Any]:
        return without_nested_none(table.slice(row, 1).to_pylist()[0])

    return RowSource(path.name, table.num_rows, read, lambda row: f"{path.name} row {row}", lambda: digest)


_READERS: dict[str, Callable[[Path, IO[bytes]], RowSource | dict[str, RowSource]]] = {
    ".jsonl": _open_jsonl,
    ".ndjson": _open_jsonl,
    ".json": _open_json,
    ".parquet": _open_parquet,
    ".csv": _open_csv,
    ".tsv": _open_tsv,
}


def without_nested_none(record: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the nulls that Arrow adds to give every object in a list the keys of all others.

    Not in tool calls and tools, where a null may have been intended: those are left out with a remark (`tool_values`).
    """

    def clean(key: str, value: Any) -> Any:
        if key in _OF_TOOLS:
            return value
        if isinstance(value, Mapping):
            return {inner: clean(inner, item) for inner, item in value.items() if item is not None}
        return [clean("", item) for item in value] if isinstance(value, list) else value

    return {key: clean(key, value) for key, value in record.items()}


_OF_TOOLS = ("tools", "functions", "tool_calls", "function_call")
