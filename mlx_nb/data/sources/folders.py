"""Assigns the files of a folder to splits: one file each, shards, a folder each, or the folders of a hub download."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from mlx_nb.data.sources.compression import bare_name
from mlx_nb.errors import DataError, and_more

TRAIN_NAMES = ("train",)
VALID_NAMES = ("valid", "validation", "val", "dev")
TEST_NAMES = ("test",)
_SPLIT_NAMES = {*TRAIN_NAMES, *VALID_NAMES, *TEST_NAMES}
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
# The hub's folder for the rows of a dataset without others.
_MAIN_FOLDERS = ("data", "default")
# The depth of the rows in the hub's own cache: snapshots/<commit>/data.
_DEEPEST = 3
# train-00000-of-00002, the same with the hash of older datasets, train_1, 0003, part-7
_SHARD = re.compile(
    r"(?:(?P<name>.*?)[-_.])?(?:(?:part|shard|chunk)[-_.]?)?(?P<number>[0-9]+)"
    r"(?:-of-(?P<total>[0-9]+))?(?:-[0-9a-f]{16})?",
    re.IGNORECASE,
)

Files = dict[str, list[Path]]


def visible(folder: Path) -> list[Path]:
    """The visible entries of a folder in natural order: 2 before 10. Empty if it cannot be read."""
    try:
        found = [entry for entry in folder.iterdir() if not entry.name.startswith((".", "__"))]
    except OSError:
        return []
    return sorted(found, key=_order)


def is_saved_dataset(folder: Path) -> bool:
    """Whether the folder was written by `Dataset.save_to_disk`."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def is_saved_dict(folder: Path) -> bool:
    """Whether the folder was written by `DatasetDict.save_to_disk`."""
    return (folder / "dataset_dict.json").is_file()


def split_files(folder: Path, wanted: str | None, holds_rows: Callable[[Path], bool]) -> Files:
    """The files (or saved datasets) of each split, in the folder or in the subfolder that has the rows.

    `wanted` is the split to train on (None: `train`): if this folder lacks it, subfolders are searched. A file belongs
    to the split in its name, or else to the folder `train`, `test`, ... around it. A split whose name several files
    share with numbers is in shards, to be ordered by `whole_split`. Raises DataError if several subfolders could be
    meant.
    """
    if wanted is not None:
        named = [path for path in _row_files(folder, holds_rows) if wanted in (path.name, bare_name(path))]
        return {**_level(folder, holds_rows), wanted: named} if named else _found_in(folder, (wanted,), holds_rows)
    found = _found_in(folder, TRAIN_NAMES, holds_rows)
    if folder.absolute().name in TRAIN_NAMES and found and not _SPLIT_NAMES & set(found):
        return {folder.absolute().name: [path for paths in found.values() for path in paths]}
    return found


def whole_split(folder: Path, split: str, paths: list[Path]) -> list[Path]:
    """The files of a split, shards in order. Raises DataError if it is ambiguous, or a shard is missing."""
    if len(paths) == 1 and bare_name(paths[0]) == split:
        return paths
    place = paths[0].parent
    sets: dict[tuple[str, int], dict[int, Path]] = {}
    for path in paths:
        shard = _SHARD.fullmatch(bare_name(path))
        name = (shard["name"] or "") if shard else bare_name(path)
        number = int(shard["number"]) if shard else -1
        shards = sets.setdefault((name, int(shard["total"] or 0) if shard else 0), {})
        if path.parent != place or number in shards:
            raise _ambiguous(folder, shards.get(number, paths[0]), path)
        shards[number] = path
    # All files in a folder named after the split belong to it; elsewhere they must be one set of shards.
    own_folder = place.absolute().name == split
    first: dict[str, Path] = {}
    for (name, total), shards in sets.items():
        path = next(iter(shards.values()))
        rival = first.setdefault(name if own_folder else "", path)
        if rival is not path:
            raise _ambiguous(folder, rival, path)
        if total:
            _check_complete(split, total, shards)
    return paths


def part_note(path: Path) -> tuple[str, ...]:
    """A note for a user who trains on one file of several."""
    shard = _SHARD.fullmatch(bare_name(path))
    if shard is None or not shard["total"] or int(shard["total"]) < 2:
        return ()
    return (f"{path.name} is one of {int(shard['total'])} shards. Give the folder to train on all of them.",)


def _ambiguous(folder: Path, *rivals: Path) -> DataError:
    names = " and ".join(str(path.relative_to(folder)) for path in rivals)
    return DataError(f"folder {folder} has {names}: which one? Remove one, or give the path of a file.")


def _check_complete(split: str, total: int, shards: dict[int, Path]) -> None:
    start = 1 if 0 not in shards and total in shards else 0
    missing = [number for number in range(start, start + total) if number not in shards]
    if not missing:
        return
    path = next(iter(shards.values()))
    names = [
        re.sub(r"[0-9]+(?=-of-)", lambda found: f"{number:0{len(found[0])}}", path.name, count=1)  # noqa: B023
        for number in missing
    ]
    raise DataError(
        f"folder {path.parent} has {total - len(missing)} of the {total} shards of {split}; missing: "
        f"{and_more(names, 3)}. Download them, or give the path of one file."
    )


def _found_in(
    folder: Path, wanted: tuple[str, ...], holds_rows: Callable[[Path], bool], depth: int = _DEEPEST
) -> Files:
    own_files = _level(folder, holds_rows)
    if depth == 0 or any(name in own_files for name in wanted):
        return own_files
    below = {}
    for inner in visible(folder):
        if inner.name not in _SPLIT_NAMES and inner.is_dir():
            found = _found_in(inner, wanted, holds_rows, depth - 1)
            if found:
                below[inner.name] = found
    full = [name for name, found in below.items() if any(split in found for split in wanted)]
    main = next((name for name in _MAIN_FOLDERS if name in full), None)
    if len(full) > 1 and main is None:
        names = ", ".join(full[:8])
        raise DataError(f"folder {folder} has several sets of rows: {names}. Give the path of one: {folder / full[0]}.")
    if full:
        return below[main or full[0]]
    return next(iter(below.values())) if not own_files and len(below) == 1 else own_files


def _level(folder: Path, holds_rows: Callable[[Path], bool]) -> Files:
    """The files of each split directly in a folder, and in its subfolders named after a split."""
    files = _row_files(folder, holds_rows)
    whole = {bare_name(path) for path in files}
    found: Files = {}
    for path in files:
        found.setdefault(_split_named(path, whole, folder.absolute().name), []).append(path)
    for inner in visible(folder):
        if inner.name not in _SPLIT_NAMES or not inner.is_dir():
            continue
        for path in [inner] if is_saved_dataset(inner) else _row_files(inner, holds_rows):
            named = _split_named(path, set(), inner.name)
            found.setdefault(named if named in _SPLIT_NAMES else inner.name, []).append(path)
    return found


def _row_files(folder: Path, holds_rows: Callable[[Path], bool]) -> list[Path]:
    return [path for path in visible(folder) if holds_rows(path) and path.name not in _DESCRIPTIONS and path.is_file()]


def _split_named(path: Path, whole: set[str], folder: str) -> str:
    """The split in a file's name. Without a total, numbers are shards only of the folder or a known split."""
    name = bare_name(path)
    shard = _SHARD.fullmatch(name)
    if shard is None:
        return name
    of = shard["name"] or folder
    return of if shard["total"] or not shard["name"] or (of in _SPLIT_NAMES and of not in whole) else name


def _order(path: Path) -> list[tuple[int, int, str]]:
    """A sort key that compares the numbers in names by value."""
    parts = re.split(r"([0-9]+)", path.name)
    return [(0, int(part), "") if part.isascii() and part.isdigit() else (1, 0, part) for part in parts]
