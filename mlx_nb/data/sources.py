"""Where rows come from: files, folders, the hub, variables of the notebook. One RowSource for all of them.

Rows are counted from 0 (as in `run.rows("train")[12]`), lines of a file from 1 (as an editor shows them).
In four parts: a sequence of rows; one file; holding out and mixing; finding what a person means.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mlx_nb.errors import DataError, did_you_mean

_TRAIN_NAMES = ("train",)
_VALID_NAMES = ("valid", "validation", "val", "dev")
_TEST_NAMES = ("test",)
_ROWS_LOOKED_AT = 3
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_KNOWN_KINDS = (
    "Data is a folder, a .jsonl, .json, .parquet or .csv file, a hub id owner/name, a list of dicts, "
    "a pandas DataFrame, a datasets.Dataset, or a dict of splits."
)
_SCAN_BYTES = 1 << 22
_HELD_OUT_AT_MOST = 200

_Item = TypeVar("_Item")


# A sequence of rows


class RowSource:
    """A sequence of rows: `len(source)`, `source[i] -> dict`, iteration. Rows are read when asked for.

    `name` is for messages. `location(i)` says where row i comes from, such as `train.jsonl line 18`.
    `fingerprint()` is a sha256 over the content (of a file: over its bytes), the same in every process.
    Reading a row that is broken raises DataError naming its location.
    """

    def __init__(
        self,
        name: str,
        length: int,
        read: Callable[[int], Mapping[str, Any]],
        locate: Callable[[int], str],
        digest: Callable[[], str],
    ) -> None:
        self.name = name
        self._length = length
        self._read = read
        self._locate = locate
        self._digest = digest
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> dict[str, Any]:
        position = self._position(row)
        record = self._read(position)
        if not isinstance(record, Mapping):
            raise DataError(f"{self._locate(position)}: a row must be a dict of columns, not {type(record).__name__}.")
        return dict(record)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[row] for row in range(self._length))

    def __repr__(self) -> str:
        return f"RowSource({self.name!r}, {self._length} rows)"

    def location(self, row: int) -> str:
        """Where row `row` comes from."""
        return self._locate(self._position(row))

    def fingerprint(self) -> str:
        """sha256 over the content, computed once."""
        if self._fingerprint is None:
            self._fingerprint = self._digest()
        return self._fingerprint

    def _position(self, row: int) -> int:
        if not -self._length <= row < self._length:
            raise IndexError(f"row {row} of {self.name}, which has {self._length} rows")
        return int(row) % self._length


def gathered(sources: Sequence[RowSource], source_ids: np.ndarray, row_ids: np.ndarray) -> RowSource:
    """Rows `row_ids[i]` of `sources[source_ids[i]]`, in this order."""

    def at(row: int) -> tuple[RowSource, int]:
        return sources[source_ids[row]], int(row_ids[row])

    def read(row: int) -> dict[str, Any]:
        source, inner = at(row)
        return source[inner]

    def locate(row: int) -> str:
        source, inner = at(row)
        return source.location(inner)

    def digest() -> str:
        content = hashlib.sha256("".join(source.fingerprint() for source in sources).encode())
        content.update(source_ids.astype("<i4").tobytes())
        content.update(row_ids.astype("<i8").tobytes())
        return content.hexdigest()

    name = " + ".join(dict.fromkeys(source.name for source in sources))
    return RowSource(name, len(row_ids), read, locate, digest)


def joined(sources: Sequence[RowSource]) -> RowSource | None:
    """All rows of all sources, one source after the other; None without sources."""
    if len(sources) < 2:
        return sources[0] if sources else None
    lengths = [len(source) for source in sources]
    source_ids = np.repeat(np.arange(len(sources), dtype=np.int32), lengths)
    return gathered(sources, source_ids, np.concatenate([np.arange(length) for length in lengths]))


# One file


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


# Holding out and mixing


@dataclass(frozen=True)
class SplitWords:
    """The names of splits and subset a person asked for."""

    train_split: str | None = None
    valid_split: str | None = None
    test_split: str | None = None
    subset: str | None = None

    def refuse(self, names: Sequence[str], what: str) -> None:
        for name in names:
            if getattr(self, name) is not None:
                raise DataError(f"`{name}: {getattr(self, name)}` has no effect: {what}. Remove it.")


@dataclass(frozen=True)
class SourceSpec:
    """One source of a mixture."""

    path: Any
    weight: float | None
    words: SplitWords
    columns: dict[str, str]


_FEATURES = {
    "chat_feature": "messages",
    "prompt_feature": "prompt",
    "completion_feature": "completion",
    "text_feature": "text",
    "system_feature": "system",
}
_SPEC_KEYS = ("path", "weight", "subset", "train_split", "valid_split", "test_split", *_FEATURES)
_ROW_COLUMNS = {"messages", "conversations", "conversation", "prompt", "completion", "output", "text"}
_MOST_REPEATS = 100


def mixture_specs(found: object) -> list[SourceSpec] | None:
    """The sources of a mixture; None when `found` is no mixture."""
    if not isinstance(found, (list, tuple)) or not found:
        return None
    first = found[0]
    named = isinstance(first, (str, os.PathLike))
    if not named and not (isinstance(first, Mapping) and "path" in first and not _ROW_COLUMNS & set(first)):
        return None
    return [_spec(item, number) for number, item in enumerate(found, start=1)]


def _spec(item: object, number: int) -> SourceSpec:
    if isinstance(item, (str, os.PathLike)):
        return SourceSpec(item, None, SplitWords(), {})
    if not isinstance(item, Mapping) or "path" not in item:
        raise DataError(f"source {number} of data needs a path, such as {{path: other.jsonl, weight: 2}}: {item!r}.")
    for key in item:
        if key not in _SPEC_KEYS:
            raise DataError(
                f"source {number} of data has the unknown key {key!r}.{did_you_mean(str(key), _SPEC_KEYS)} "
                f"Known: {', '.join(_SPEC_KEYS)}."
            )
    weight = item.get("weight")
    if weight is not None and (
        isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf")
    ):
        raise DataError(f"weight of source {number} of data must be a number above 0, not {weight!r}.")
    words = SplitWords(**{name: item.get(name) for name in vars(SplitWords())})
    columns = {standard: item[key] for key, standard in _FEATURES.items() if item.get(key) is not None}
    return SourceSpec(item["path"], weight, words, columns)


def hold_out(
    trains: Sequence[RowSource], val_set_size: float, seed: int
) -> tuple[list[RowSource], RowSource | None, str]:
    """The training sources without the held-out rows, the held-out rows, and a note. No source is emptied."""
    lengths = np.array([len(source) for source in trains])
    total = int(lengths.sum())
    count = _held_out_count(val_set_size, total)
    count = min(count, total - len(trains))
    if not count:
        reason = "too few training rows" if val_set_size else "val_set_size: 0"
        return list(trains), None, f"No validation: no validation split, and nothing held out ({reason})."
    starts = np.concatenate([[0], np.cumsum(lengths)])
    left, held = lengths.copy(), []
    for row in np.random.default_rng([seed, total]).permutation(total):
        owner = int(np.searchsorted(starts, row, side="right")) - 1
        if left[owner] > 1:
            left[owner] -= 1
            held.append(int(row))
            if len(held) == count:
                break
    held_rows = np.sort(np.array(held, dtype=np.int64))
    held_sources = (np.searchsorted(starts, held_rows, side="right") - 1).astype(np.int32)
    valid = gathered(trains, held_sources, held_rows - starts[held_sources])
    remaining = []
    for index, source in enumerate(trains):
        kept = np.delete(np.arange(len(source)), held_rows[held_sources == index] - starts[index])
        remaining.append(gathered([source], np.zeros(len(kept), dtype=np.int32), kept))
    note = f"No validation split: held out {count} of {total} training rows (seed {seed})."
    return remaining, valid, note


def _held_out_count(val_set_size: float, total: int) -> int:
    if isinstance(val_set_size, bool) or not isinstance(val_set_size, (int, float)) or not val_set_size >= 0:
        raise DataError(f"val_set_size must be a share such as 0.1 or a number of rows, not {val_set_size!r}.")
    if val_set_size < 1:
        return min(_HELD_OUT_AT_MOST, max(1, round(val_set_size * total))) if val_set_size else 0
    if val_set_size != int(val_set_size):
        raise DataError(f"val_set_size must be a whole number of rows from 1 on, not {val_set_size:g}.")
    if val_set_size >= total:
        raise DataError(f"val_set_size: {int(val_set_size)} would hold out all {total} training rows. Lower it.")
    return int(val_set_size)


def renamed(source: RowSource, columns: Mapping[str, str]) -> RowSource:
    """The rows with their columns under the standard names, and without the columns of other shapes."""
    keep = {"system", "tools"} | ({"prompt", "completion"} if {"prompt", "completion"} & set(columns) else set())

    def read(row: int) -> dict[str, Any]:
        record = source[row]
        for column in columns.values():
            if column not in record:
                names = ", ".join(map(repr, record))
                raise DataError(
                    f"{source.location(row)}: no column {column!r}. The row has: {names}.{did_you_mean(column, record)}"
                )
        kept = record if set(columns) == {"system"} else {key: record[key] for key in record if key in keep}
        return {**kept, **{standard: record[column] for standard, column in columns.items()}}

    def digest() -> str:
        return hashlib.sha256((source.fingerprint() + json.dumps(columns, sort_keys=True)).encode()).hexdigest()

    read(0)
    return RowSource(source.name, len(source), read, source.location, digest)


def mixed(sources: Sequence[RowSource], weights: Sequence[float | None], seed: int) -> tuple[RowSource, str]:
    """One epoch of the mixture (see `open_splits`), and a note with the numbers of rows."""
    lengths = [len(source) for source in sources]
    if any(weight is not None for weight in weights):
        shares = [1.0 if weight is None else weight for weight in weights]
        rounds = max(length / share for length, share in zip(lengths, shares))
        draws = [max(length, round(share * rounds)) for length, share in zip(lengths, shares)]
        if sum(draws) > _MOST_REPEATS * sum(lengths):
            raise DataError(
                f"the weights of data ({', '.join(f'{share:g}' for share in shares)}) make an epoch of "
                f"{sum(draws)} rows out of {sum(lengths)}. Bring them closer together."
            )
    else:
        draws = list(lengths)
    times, source_ids, row_ids = [], [], []
    for index, (length, count) in enumerate(zip(lengths, draws)):
        random = np.random.default_rng([seed, index])
        passes = [random.permutation(length) for _ in range(-(-count // length))]
        row_ids.append(np.concatenate(passes)[:count])
        times.append((np.arange(count) + random.random()) / count)
        source_ids.append(np.full(count, index, dtype=np.int32))
    order = np.argsort(np.concatenate(times), kind="stable")
    train = gathered(sources, np.concatenate(source_ids)[order], np.concatenate(row_ids)[order])
    parts = [
        f"{count} from {source.name}" + (f" ({length} rows, repeated)" if count > length else "")
        for source, length, count in zip(sources, lengths, draws)
    ]
    return train, f"Mixed {len(train)} training rows an epoch: {', '.join(parts)}."


# Finding what a person means


@dataclass(frozen=True)
class Splits:
    """The rows to train, validate and test on. `notes` say what was decided on the way, for the person."""

    train: RowSource
    valid: RowSource | None
    test: RowSource | None
    notes: tuple[str, ...] = ()


def open_splits(
    data: object,
    *,
    namespace: Mapping[str, object] | None = None,
    val_set_size: float = 0.1,
    seed: int = 0,
    train_split: str | None = None,
    valid_split: str | None = None,
    test_split: str | None = None,
    subset: str | None = None,
) -> Splits:
    """The train, valid and test rows of whatever a person calls data.

    data: a folder with train, valid (or validation, val, dev) and test files; one .jsonl, .json, .parquet or
    .csv file; a variable of `namespace` by name; a hub id `owner/name`; a list of dicts, DataFrame or
    datasets.Dataset; a DatasetDict or dict of splits. An existing path wins over a variable, a variable over
    a hub id.

    Hold-out: without a validation split, `val_set_size` of the training rows are drawn by `seed` and taken
    out of train. Below 1 it is a share (at least 1 row, at most 200, never all), from 1 on a number of rows.

    Mixture: a list of paths, names or `{path, weight, subset, train_split, valid_split, test_split,
    chat_feature, prompt_feature, completion_feature, text_feature, system_feature}`.
    - Without any weight an epoch holds every row of every source exactly once.
    - With weights (1 where missing) the numbers of rows drawn from the sources are to each other as their
      weights, whatever the sizes. The epoch is the shortest in which every row occurs at least once: the rows
      of one source occur once, those of the others repeat, no row more than once more than its neighbours.
    - Sources are interleaved evenly, each in an order drawn by `seed`; every epoch is the same mixture.
    - Holding out comes first, so no row is both trained and validated on. valid and test join the splits of
      all sources that have one, unweighted.

    Raises DataError, with the nearest known name, for everything that cannot be found or read. The first rows
    of each table are read here; a later broken row raises when it is read.
    """
    words = SplitWords(train_split, valid_split, test_split, subset)
    found, label, notes = _look_up(data, namespace)
    specs = mixture_specs(found)
    if specs is None:
        parts = [_open(found, label, words, namespace)]
    else:
        words.refuse(tuple(vars(words)), "data is a list of sources. Give it inside a source")
        parts = [_open_spec(spec, namespace) for spec in specs]
    valid = joined([part.valid for part in parts if part.valid])
    test = joined([part.test for part in parts if part.test])
    trains = [part.train for part in parts]
    notes += tuple(note for part in parts for note in part.notes)
    if valid is None:
        trains, valid, note = hold_out(trains, val_set_size, seed)
        notes += (note,)
    if specs is None:
        return Splits(trains[0], valid, test, notes)
    train, note = mixed(trains, [spec.weight for spec in specs], seed)
    return Splits(train, valid, test, (*notes, note))


def _look_up(data: object, namespace: Mapping[str, object] | None) -> tuple[object, str, tuple[str, ...]]:
    """What a name stands for: a Path, a hub id (str) or an object; with a label and notes."""
    if not isinstance(data, (str, os.PathLike)):
        return data, "data", ()
    text = os.fspath(data)
    path = Path(text).expanduser()
    variables = {name: value for name, value in (namespace or {}).items() if not name.startswith("_")}
    if isinstance(data, str) and text in variables and not _could_be_rows(variables[text]):
        if not path.exists():
            kind = type(variables[text]).__name__
            raise DataError(f"variable `{text}` is of type {kind}, which holds no rows. {_KNOWN_KINDS}")
        variables.pop(text)
    if text and path.exists():
        if text not in variables:
            return path, text, ()
        kind = "folder" if path.is_dir() else "file"
        return path, text, (f"`{text}` is a {kind} and a variable: the {kind} is used. Rename one of them.",)
    if isinstance(data, str) and text in variables:
        value = variables[text]
        return (Path(value).expanduser() if isinstance(value, os.PathLike) else value), text, ()
    near_a_path = bool(did_you_mean(path.name, _names_in(path.parent))) or path.suffix in READERS
    if isinstance(data, str) and _HUB_ID.fullmatch(text) and not near_a_path:
        return text, text, ()
    raise DataError(_not_found(text, path, variables))


def _could_be_rows(value: object) -> bool:
    if isinstance(value, (list, tuple, Mapping, os.PathLike, RowSource)):
        return True
    return type(value).__module__.split(".")[0] in ("pandas", "datasets")


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError:
        return []


def _not_found(text: str, path: Path, variables: Mapping[str, object]) -> str:
    if not text.strip():
        return f"`data` is empty. {_KNOWN_KINDS}"
    near = did_you_mean(path.name, _names_in(path.parent))
    if near and path.parent != Path("."):
        near += f" (in {path.parent})"
    if text.isidentifier():
        near = did_you_mean(text, [name for name in variables if _could_be_rows(variables[name])]) or near
        return f"no file, folder or variable {text!r}.{near} A hub id has the form owner/name."
    if not path.parent.is_dir():
        above = path.parent
        near = f" There is no folder {above}.{did_you_mean(above.name, _names_in(above.parent))}"
    return f"no such file or folder: {text}.{near} Working folder: {Path.cwd()}."


def _open(found: object, label: str, words: SplitWords, namespace: Mapping[str, object] | None) -> Splits:
    if isinstance(found, str):
        return _open_hub(found, words)
    words.refuse(("subset",), "only hub datasets have subsets")
    if isinstance(found, Path) and found.is_dir():
        return _open_folder(found, words)
    if isinstance(found, Mapping):
        return _open_mapping(found, label, words, namespace)
    words.refuse(("train_split", "valid_split", "test_split"), f"{label} has no splits")
    return Splits(_open_table(found, label), None, None)


def _open_folder(folder: Path, words: SplitWords) -> Splits:
    files: dict[str, list[Path]] = {}
    for name in _names_in(folder):
        if Path(name).suffix in READERS:
            files.setdefault(Path(name).stem, []).append(folder / name)
    if not files:
        inside = ", ".join(_names_in(folder)[:8]) or "nothing"
        raise DataError(f"folder {folder} has no .jsonl, .json, .parquet or .csv file; it holds: {inside}.")

    def opened(paths: list[Path]) -> RowSource:
        if len(paths) > 1:
            names = " and ".join(path.name for path in paths)
            raise DataError(f"folder {folder} has {names}: which one? Remove one, or give the path of a file.")
        return _open_table(paths[0], paths[0].name)

    return _pick_splits(files, words, f"folder {folder}", opened)


def _open_mapping(
    found: Mapping[Any, Any], label: str, words: SplitWords, namespace: Mapping[str, object] | None
) -> Splits:
    named = {str(name): (str(name), value) for name, value in found.items()}

    def opened(item: tuple[str, object]) -> RowSource:
        name, value = item
        if isinstance(value, (str, os.PathLike)):
            value, _, _ = _look_up(value, namespace)
        return _open_table(value, f"{label}[{name!r}]")

    return _pick_splits(named, words, f"the dict {label}", opened)


def _open_hub(hub_id: str, words: SplitWords) -> Splits:
    import datasets

    def load(split: str | None) -> Any:
        try:
            return datasets.load_dataset(hub_id, name=words.subset, split=split)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DataError(
                f"no folder {hub_id!r} here, and the hub dataset of that name could not be loaded: "
                f"{reason.rstrip('.')}. Check the name and the network, or give a local path."
            ) from None

    # `train[:80%]` is the hub's own notation for a part of a split: only the hub library can read it.
    parts = {
        word: load(word) for word in (words.train_split, words.valid_split, words.test_split) if word and "[" in word
    }
    whole = {} if words.train_split in parts and words.valid_split in parts else dict(load(None))
    named = {name: (name, value) for name, value in (whole | parts).items()}
    return _pick_splits(
        named, words, f"hub dataset {hub_id}", lambda item: _open_table(item[1], f"{hub_id}[{item[0]}]")
    )


def _pick_splits(
    available: Mapping[str, _Item], words: SplitWords, where: str, opened: Callable[[_Item], RowSource]
) -> Splits:
    def pick(asked: str | None, usual: Sequence[str], setting: str) -> RowSource | None:
        if asked is not None:
            name = asked if asked in available else Path(asked).stem
            if name not in available:
                raise DataError(
                    f"{where} has no split {asked!r} (`{setting}`).{did_you_mean(asked, available)} {found}"
                )
            return opened(available[name])
        name = next((name for name in usual if name in available), "")
        return opened(available[name]) if name else None

    found = f"It has: {', '.join(list(available)[:8]) or 'nothing'}."
    train = pick(words.train_split, _TRAIN_NAMES, "train_split")
    if train is None:
        raise DataError(f"{where} has no train split. {found} Name one of them with train_split, or give its path.")
    valid = pick(words.valid_split, _VALID_NAMES, "valid_split")
    return Splits(train, valid, pick(words.test_split, _TEST_NAMES, "test_split"))


def _open_spec(spec: SourceSpec, namespace: Mapping[str, object] | None) -> Splits:
    found, label, notes = _look_up(spec.path, namespace)
    splits = _open(found, label, spec.words, namespace)
    train, valid, test = splits.train, splits.valid, splits.test
    if spec.columns:
        train = renamed(train, spec.columns)
        valid = renamed(valid, spec.columns) if valid else None
        test = renamed(test, spec.columns) if test else None
    return Splits(train, valid, test, notes)


def _open_table(value: object, label: str) -> RowSource:
    """One table of rows, its first rows looked at."""
    source = _table(value, label)
    if not len(source):
        raise DataError(f"{source.name} has no rows. Add rows, or remove it.")
    for row in range(min(len(source), _ROWS_LOOKED_AT)):
        source[row]
    return source


def _table(value: object, label: str) -> RowSource:
    if isinstance(value, RowSource):
        return value
    if isinstance(value, Path):
        return open_file(value)
    if isinstance(value, (list, tuple)):
        return _in_memory(list(value), label)
    library, kind = type(value).__module__.split(".")[0], type(value).__name__
    if library == "pandas" and kind == "DataFrame":
        frame: Any = value
        return _in_memory([_plain(record) for record in frame.to_dict("records")], label)
    if library == "datasets" and kind == "Dataset":
        dataset: Any = value
        return _lazy_table(label, len(dataset), lambda row: without_nested_none(dataset[row]))
    if library == "datasets" and kind == "IterableDataset":
        raise DataError(f"{label} is a streaming dataset, which has no rows by number. Use list({label}.take(1000)).")
    raise DataError(f"{label} is of type {kind}, which holds no rows. {_KNOWN_KINDS}")


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


def _plain(value: Any) -> Any:
    """numpy and pandas values as JSON would hold them; a missing value is None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    missing = (isinstance(value, float) and value != value) or type(value).__name__ in ("NAType", "NaTType")
    return None if missing else value
