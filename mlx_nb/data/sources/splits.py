"""Opens `data` as train, valid and test rows: resolves files, folders, hub ids, notebook variables and mixtures."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mlx_nb.data.sources.compression import bare_name
from mlx_nb.data.sources.files import holds_rows, open_file
from mlx_nb.data.sources.folders import (
    TEST_NAMES,
    TRAIN_NAMES,
    VALID_NAMES,
    is_saved_dataset,
    is_saved_dict,
    part_note,
    split_files,
    visible,
    whole_split,
)
from mlx_nb.data.sources.mixtures import SourceSpec, SplitWords, hold_out, mixed, mixture_specs, renamed
from mlx_nb.data.sources.row_source import RowSource, joined
from mlx_nb.data.sources.row_values import OddRow
from mlx_nb.data.sources.tables import KNOWN_KINDS, could_be_rows, saved_dataset, table_in_memory
from mlx_nb.errors import DataError, did_you_mean, shown
from mlx_nb.files.places import path_problem

_Item = TypeVar("_Item")

_ROWS_LOOKED_AT = 3
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Splits:
    """The rows to train, validate and test on. `notes` tell the user what was decided automatically.

    `held_out` says that the validation rows were taken out of the training rows.
    """

    train: RowSource
    valid: RowSource | None
    test: RowSource | None
    notes: tuple[str, ...] = ()
    held_out: bool = False


def open_splits(
    data: object,
    *,
    namespace: Mapping[str, object] | None = None,
    working_folder: Path | None = None,
    val_set_size: float = 0.1,
    seed: int = 0,
    train_split: str | None = None,
    valid_split: str | None = None,
    test_split: str | None = None,
    subset: str | None = None,
) -> Splits:
    """The train, valid and test rows of the user's `data`.

    data: a folder with train, valid (or validation, val, dev) and test files, shards or folders of files; a folder
        written by `save_to_disk`; one .jsonl, .json, .parquet, .tsv or .csv file, also compressed; a variable of
        `namespace` by name; a hub id `owner/name`; a list of dicts (or conversations), DataFrame or datasets.Dataset;
        a DatasetDict or dict of splits, also in a .json file. An existing path takes precedence over a variable, a
        variable over a hub id.

    Relative paths begin in `working_folder`; None is the process's, also when a row is read later.

    Hold-out: without a validation split, `val_set_size` of the training rows are drawn by `seed` and removed
        from train. Below 1 it is a share (at least 1 row, at most 200, never all), from 1 on a number of rows.

    Mixture: a list of paths, names or `{path, weight, subset, train_split, valid_split, test_split,
        chat_feature, prompt_feature, completion_feature, chosen_feature, rejected_feature, label_feature,
        answer_feature, preference_score_feature, text_feature, system_feature}`.
        - Without any weight an epoch holds every row of every source exactly once.
        - With weights (1 where missing) the numbers of rows drawn from the sources are proportional to their weights,
          whatever the sizes. The epoch is the shortest in which every row occurs at least once: the rows
          of one source occur once, those of the others repeat, no row more than once more than its neighbors.
        - Sources are interleaved evenly, each in an order drawn by `seed`; every epoch is the same mixture.
        - Holding out comes first, so no row is both trained and validated on. valid and test join the splits of
          all sources that have one, unweighted.

    Raises DataError, with the nearest known name, for everything that cannot be found or read. The first rows of each
    table are read here; a later broken row raises when it is read.
    """
    words = SplitWords(train_split, valid_split, test_split, subset)
    known = _Known({name: value for name, value in (namespace or {}).items() if not name.startswith("_")})
    if working_folder is not None:
        known = dataclasses.replace(known, folder=working_folder)
    found, label, notes = _look_up(data, known)
    specs = mixture_specs(found)
    if specs is None:
        parts = [_open(found, label, words, known)]
    else:
        words.refuse(tuple(vars(words)), "data is a list of sources. Give it inside a source")
        parts = [_open_spec(spec, known) for spec in specs]
    valid = joined([part.valid for part in parts if part.valid])
    test = joined([part.test for part in parts if part.test])
    trains = [part.train for part in parts]
    notes += tuple(note for part in parts for note in part.notes)
    held_out = valid is None
    if held_out:
        trains, valid, note = hold_out(trains, val_set_size, seed)
        notes += (note,)
    if specs is None:
        return Splits(trains[0], valid, test, notes, held_out)
    train, note = mixed(trains, [spec.weight for spec in specs], seed)
    return Splits(train, valid, test, (*notes, note), held_out)


def refuse_unknown_data(data: object, namespace: Mapping[str, object] | None, working_folder: Path | None) -> None:
    """Raise DataError for a name that cannot be resolved. Opens nothing and makes no request to the hub."""
    if isinstance(data, str):
        known = {name: value for name, value in (namespace or {}).items() if not name.startswith("_")}
        _look_up(data, _Known(known, working_folder or Path()))


def is_local(data: object, namespace: Mapping[str, object] | None, working_folder: Path | None) -> bool:
    """Whether the rows are in memory or in local files, so that nothing has to be fetched or mixed.

    Raises DataError.
    """
    known = {name: value for name, value in (namespace or {}).items() if not name.startswith("_")}
    found = _look_up(data, _Known(known, working_folder or Path()))[0]
    return not isinstance(found, str) and mixture_specs(found) is None


@dataclass(frozen=True)
class _Known:
    """What names can refer to: variables of the notebook, and paths relative to `folder`."""

    variables: Mapping[str, object]
    folder: Path = Path()

    def path(self, text: str | os.PathLike[str]) -> Path:
        """The path that `text` denotes, whether or not it exists. Raises DataError for an impossible path."""
        try:
            path = self.folder / Path(text).expanduser()
            problem = path_problem(path, below=0)
        except RuntimeError as error:
            problem = str(error).rstrip(".")
        if problem is not None:
            raise DataError(f"{shown(os.fspath(text))} cannot be a file or folder: {problem}. {KNOWN_KINDS}")
        return path


def _look_up(data: object, known: _Known) -> tuple[object, str, tuple[str, ...]]:
    """Resolve a name to a Path, a hub id (str) or an object; with a label and notes."""
    if not isinstance(data, (str, os.PathLike)):
        return data, "data", ()
    text = os.fspath(data)
    path = known.path(text)
    variables = dict(known.variables)
    if isinstance(data, str) and text in variables and not could_be_rows(variables[text]):
        if not path.exists():
            kind = type(variables[text]).__name__
            raise DataError(f"variable `{text}` is of type {kind}, which holds no rows. {KNOWN_KINDS}")
        variables.pop(text)
    if text and path.exists():
        if text not in variables:
            return path, text, ()
        kind = "folder" if path.is_dir() else "file"
        return path, text, (f"`{text}` is a {kind} and a variable: the {kind} is used. Rename one of them.",)
    if isinstance(data, str) and text in variables:
        value = variables[text]
        return (known.path(value) if isinstance(value, os.PathLike) else value), text, ()
    near_a_path = bool(did_you_mean(path.name, _names_in(path.parent))) or holds_rows(path)
    if isinstance(data, str) and _HUB_ID.fullmatch(text) and not near_a_path:
        return text, text, ()
    raise DataError(_not_found(text, path, variables, known.folder))


def _names_in(folder: Path) -> list[str]:
    return [entry.name for entry in visible(folder)]


def _not_found(text: str, path: Path, variables: Mapping[str, object], folder: Path) -> str:
    if not text.strip():
        return f"`data` is empty. {KNOWN_KINDS}"
    near = did_you_mean(path.name, _names_in(path.parent))
    if near and path.parent != folder:
        near += f" (in {Path(text).expanduser().parent})"
    if text.isidentifier():
        near = did_you_mean(text, [name for name in variables if could_be_rows(variables[name])]) or near
        again = "" if near else f" If `{text}` is a variable, run the cell that defines it first."
        return f"no file, folder or variable {text!r}.{near}{again} A hub id has the form owner/name."
    if not path.parent.is_dir():
        above = Path(text).expanduser().parent
        near = f" There is no folder {above}.{did_you_mean(above.name, _names_in(path.parent.parent))}"
    elif not near and len(text.split()) > 1 and not path.suffix:
        return (
            f"{shown(text)} is not a file or folder, and text alone is not a row. A row is a dict, such as "
            '{"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [...]}.'
        )
    there = [name for name in variables if not name.startswith("_") and could_be_rows(variables[name])]
    another = f" The variable `{there[0]}` may hold rows: `data: {there[0]}`." if there and not near else ""
    return f"no such file or folder: {text}.{near} Working folder: {Path.cwd() / folder}.{another}"


def _open(found: object, label: str, words: SplitWords, known: _Known) -> Splits:
    if isinstance(found, str):
        return _open_hub(found, words)
    words.refuse(("subset",), "only hub datasets have subsets")
    notes: tuple[str, ...] = ()
    if isinstance(found, Path):
        notes = part_note(found)
        found = _read_path(found, words)
    if isinstance(found, Splits):
        return found
    if isinstance(found, Mapping):
        return _open_mapping(found, label, words, known)
    words.refuse(("train_split", "valid_split", "test_split"), f"{label} has no splits")
    return Splits(_open_table(found, label), None, None, notes)


def _read_path(path: Path, words: SplitWords) -> object:
    """A table or a dict of tables (from a file or saved dataset), or the splits of a folder."""
    if not path.is_dir():
        return open_file(path)
    if is_saved_dict(path) or is_saved_dataset(path):
        return saved_dataset(path)
    return _open_folder(path, words)


def _joined(tables: Sequence[RowSource], name: str) -> RowSource:
    """The rows of the parts of one table. A part may be empty, as filtered shards are."""
    whole = joined([table for table in tables if len(table)] or tables[:1], name)
    assert whole is not None
    return whole


def _open_folder(folder: Path, words: SplitWords) -> Splits:
    files = split_files(folder, words.train_split, holds_rows)
    if not files:
        inside = ", ".join(_names_in(folder)[:8]) or "nothing"
        raise DataError(f"folder {folder} has no .jsonl, .json, .parquet or .csv file; it holds: {inside}.")

    def opened(item: tuple[str, list[Path]]) -> RowSource:
        split, paths = item
        paths = whole_split(folder, split, paths)
        if len(paths) == 1:
            return _open_table(paths[0], paths[0].name)
        tables = [_table(path, path.name) for path in paths]
        return _open_table(_joined(tables, f"{split} ({len(tables)} files)"), split)

    return _pick_splits({name: (name, paths) for name, paths in files.items()}, words, f"folder {folder}", opened)


def _open_mapping(found: Mapping[Any, Any], label: str, words: SplitWords, known: _Known) -> Splits:
    named = {str(name): (str(name), value) for name, value in found.items()}
    columns = [
        isinstance(value, (list, tuple)) and value and not isinstance(value[0], Mapping) for value in found.values()
    ]
    if columns and all(columns) and not {words.train_split, *TRAIN_NAMES} & set(named):
        raise DataError(
            f"the dict {label} holds columns ({', '.join(list(named)[:8])}), not splits. "
            f"Make rows of it: datasets.Dataset.from_dict({label})."
        )

    def opened(item: tuple[str, object]) -> RowSource:
        name, value = item
        part_label = f"{label}[{name!r}]"
        if isinstance(value, (list, tuple)) and value and all(isinstance(part, (str, os.PathLike)) for part in value):
            tables = [_open_table(_look_up(part, known)[0], part_label) for part in value]
            return _joined(tables, part_label)
        if isinstance(value, (str, os.PathLike)):
            value, _, _ = _look_up(value, known)
        return _open_table(value, part_label)

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

    # `train[:80%]` is the hub's own notation for a part of a split, which only the hub library can read.
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
    def pick(wanted: str | None, usual: Sequence[str], setting: str) -> RowSource | None:
        if wanted is not None:
            name = wanted if wanted in available else bare_name(Path(wanted))
            if name not in available:
                raise DataError(
                    f"{where} has no split {wanted!r} (`{setting}`).{did_you_mean(wanted, available)} {found}"
                )
            return opened(available[name])
        name = next((name for name in usual if name in available), "")
        return opened(available[name]) if name else None

    found = f"It has: {', '.join(list(available)[:8]) or 'nothing'}."
    train = pick(words.train_split, TRAIN_NAMES, "train_split")
    if train is None:
        raise DataError(f"{where} has no train split. {found} Name one of them with train_split, or give its path.")
    valid = pick(words.valid_split, VALID_NAMES, "valid_split")
    return Splits(train, valid, pick(words.test_split, TEST_NAMES, "test_split"))


def _open_spec(spec: SourceSpec, known: _Known) -> Splits:
    found, label, notes = _look_up(spec.path, known)
    splits = _open(found, label, spec.words, known)
    train, valid, test = splits.train, splits.valid, splits.test
    if spec.columns:
        train = renamed(train, spec.columns)
        valid = renamed(valid, spec.columns) if valid else None
        test = renamed(test, spec.columns) if test else None
    return Splits(train, valid, test, (*notes, *splits.notes))


def _open_table(value: object, label: str) -> RowSource:
    """One table of rows, after a check of its first rows."""
    source = _table(value, label)
    if not len(source):
        raise DataError(f"{source.name} has no rows. Add rows, or remove it.")
    for row in range(min(len(source), _ROWS_LOOKED_AT)):
        with suppress(OddRow):  # left out like any row that cannot be trained
            source[row]
    return source


def _table(value: object, label: str) -> RowSource:
    if isinstance(value, RowSource):
        return value
    if isinstance(value, Path):
        return _table(_read_path(value, SplitWords()), str(value))
    if isinstance(value, Splits):
        return value.train
    if isinstance(value, Mapping):
        raise DataError(
            f"{label} holds splits of its own: {', '.join(map(str, list(value)[:8]))}. Use it alone as data."
        )
    return table_in_memory(value, label)
