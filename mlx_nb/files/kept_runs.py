"""The runs that are kept on disk: where earlier ones of a name are, what they take, and how they are removed.

Only what mlx_nb wrote is ever removed, byte for byte as it was written, and never while a run holds the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from mlx_nb.errors import FolderTaken, and_more
from mlx_nb.files.folder_lock import LOCK_FILE, MARK, FolderLock, begins_as_ours, is_locked
from mlx_nb.files.written_files import (
    BEST_FOLDER,
    CHECKPOINTS,
    LIST_FILE,
    PREVIOUS,
    RUN,
    WrittenFiles,
    heading,
    newest_checkpoint,
)
from mlx_nb.process.ipython import in_ipython


class KeptRun(NamedTuple):
    """A run on disk. `bytes` are those of its own files, `update` is that of its newest checkpoint."""

    folder: Path
    name: str
    kind: str
    update: int | None
    bytes: int


def megabytes(size: int) -> str:
    """`66.2 MB`, `1.3 GB`."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def delete_command(folder: Path) -> str:
    """What removes the run in `folder`, as a person would write it here."""
    return f"`{'%finetune' if in_ipython() else 'mlx-nb'} delete {shlex.quote(str(folder))} --yes`"


def resume_command(folder: Path) -> str:
    """What goes on with the run in `folder`; empty where there is no checkpoint to go on from."""
    newest = newest_checkpoint(folder)
    if newest is None:
        return ""
    if not in_ipython() or not _names_its_rows(newest):
        rows = "" if _names_its_rows(newest) else ", data=ROWS"
        return f"`Run.resume({str(folder)!r}{rows})`"
    return f"`%finetune resume {shlex.quote(str(folder))}`"


def _names_its_rows(checkpoint: Path) -> bool:
    """Whether the settings in a checkpoint say where the rows are; those that were an object are not in it."""
    try:
        return "data" in json.loads((checkpoint / "state.json").read_bytes())["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


# Earlier runs of a name


def earlier_runs(folder: Path) -> list[Path]:
    """Where the runs are that were in `folder` before, the newest last."""
    found = [(number, path) for parent, start in _places(folder) for number, path in _numbered(parent, start)]
    return [path for _, path in sorted(found)]


def new_folder_beside(folder: Path) -> Path:
    """`NAME.previous-1` beside the folder; `previous-1` in it where it is a link, a mount or the working folder.

    The number is above all that are there.
    """
    here = Path.cwd().resolve()
    beside, inside = _places(folder)
    if not folder.is_symlink() and not os.path.ismount(folder) and folder.resolve() not in (here, *here.parents):
        with suppress(OSError):  # such as a name that is too long, or a folder above that cannot be written
            return _make_next(*beside)
    return _make_next(*inside)


def folder_now(folder: Path, run_id: str) -> Path | None:
    """Where the run is that was in `folder`; None when it is neither there nor moved aside by a later one."""
    places = [folder, *reversed(earlier_runs(folder))]
    return next((place for place in places if (found := heading(place)) and found[0] == run_id), None)


def _places(folder: Path) -> tuple[tuple[Path, str], tuple[Path, str]]:
    """Where an earlier run can be, beside and inside: the folder above it, and how its name begins."""
    return (folder.parent, f"{folder.name}.previous-"), (folder, "previous-")


def _numbered(parent: Path, start: str) -> list[tuple[int, Path]]:
    try:
        names = os.listdir(parent)
    except OSError:
        return []
    ends = [(name.removeprefix(start), name) for name in names if name.startswith(start) and PREVIOUS.fullmatch(name)]
    return [(int(end), parent / name) for end, name in ends if end.isdecimal()]


def _make_next(parent: Path, start: str) -> Path:
    number = max((number for number, _ in _numbered(parent, start)), default=0)
    while True:
        number += 1
        with suppress(FileExistsError):
            (parent / f"{start}{number}").mkdir()
            return parent / f"{start}{number}"


def prune_earlier(folder: Path, keep: int, in_use: Collection[Path] = ()) -> list[str]:
    """Of the runs that were in `folder` before, remove all but the `keep` newest. Returns what there is to say of it.

    One stays that is in use, or with anything in its folder that mlx_nb did not write.
    """
    rule = f"of the earlier runs in {folder} the {keep} newest are kept (`keep_previous`)"
    lines = []
    for place in earlier_runs(folder)[:-keep]:
        found = heading(place)
        if found is None or found[2] != RUN or place in in_use or is_locked(place):
            continue
        with suppress(OSError, FolderTaken):  # it is tried again by the next run
            own = own_files(place)
            if others := others_in(place, own):
                lines.append(f"{place} stays, although {rule}: mlx_nb did not write {and_more(others, 1)} in it.")
                continue
            delete_own(place)
            lines.append(f"{place} ({megabytes(sum(own.values()))}) was removed: {rule}.")
    return lines


# What a run's folder holds


def runs_below(folder: Path) -> Iterator[KeptRun]:
    """The runs in a folder and the folders in it, by path."""
    for parent, inner, _ in os.walk(folder):
        inner.sort()
        place = Path(parent)
        if (run := kept_run(place)) is not None:
            own = {CHECKPOINTS, MARK, *([] if (place / BEST_FOLDER / MARK).exists() else [BEST_FOLDER])}
            inner[:] = [name for name in inner if name not in own]
            yield run


def kept_run(folder: Path) -> KeptRun | None:
    """The run in a folder; None when there is none."""
    found, own = heading(folder), own_files(folder, exact=False)
    newest = newest_checkpoint(folder)
    if found is None and not own:
        return None
    update = None if newest is None else int(newest.name.split("-")[3])
    name, kind = (found[1], found[2]) if found else (folder.name, RUN)
    return KeptRun(folder, name, kind, update, sum(own.values()))


def own_files(folder: Path, *, exact: bool = True) -> dict[str, int]:
    """The files of the run in `folder`, as names in it with their bytes, the list of them last.

    `exact` are those with the very bytes that were written; otherwise the size is enough.
    """
    names: list[str] = []
    for name in WrittenFiles(folder).own(exact=exact):
        if (folder / name).is_dir():
            names += [f"{name}/{file}" for file in _checkpoint_files(folder / name, exact)]
        else:
            names.append(name)
    if heading(folder) is not None:
        names.append(f"{MARK}/{LIST_FILE}")
    return {name: (folder / name).stat().st_size for name in names if not (folder / name).is_symlink()}


def _checkpoint_files(folder: Path, exact: bool) -> list[str]:
    """The files of a checkpoint that are as its manifest says, and that manifest, last."""
    try:
        content: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
        told = content.pop("sha256")
        if told != hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest():
            return []
        listed = content["files"].items()
        own = [name for name, about in listed if "/" not in name and _is_as_written(folder / name, about, exact)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return [*own, "manifest.json"]


def _is_as_written(path: Path, about: dict[str, Any], exact: bool) -> bool:
    if path.is_symlink() or not path.is_file() or path.stat().st_size != about["bytes"]:
        return False
    if not exact:
        return True
    with path.open("rb") as file:
        return bool(hashlib.file_digest(file, "sha256").hexdigest() == about["sha256"])


def others_in(folder: Path, own: Collection[str]) -> list[str]:
    """What else lies in a folder, as names in it: files, links, and folders with nothing in them."""
    ours = {name for file in own for name in (file, *(parent.as_posix() for parent in Path(file).parents))} | {MARK}
    if begins_as_ours(folder / MARK / LOCK_FILE):
        ours.add(f"{MARK}/{LOCK_FILE}")
    found = []
    for parent, folders, files in os.walk(folder):
        inner = [*files, *(name for name in folders if _is_leaf(Path(parent) / name))]
        found += [(Path(parent) / name).relative_to(folder).as_posix() for name in inner]
    return sorted(name for name in found if name not in ours)


def _is_leaf(folder: Path) -> bool:
    """Whether a folder is a link, or has nothing in it that can be seen."""
    try:
        return folder.is_symlink() or not os.listdir(folder)
    except OSError:
        return True


def delete_own(folder: Path) -> dict[str, int]:
    """Remove the files of the run in `folder`, and it if nothing else is in it. Returns what was removed, as in it.

    Raises FolderTaken where a run holds it, and OSError; what is left then can be removed by a second time.
    """
    lock = FolderLock(folder, folder.name)
    if (holder := lock.take()) is not None:
        raise FolderTaken(f"{folder} is held by {holder}, so nothing was removed. End that run first.")
    try:
        own = own_files(folder)
        for name in own:
            (folder / name).unlink()
        _remove_empty_folders(folder, own)
    finally:
        lock.release()
    here = Path.cwd()
    if here != folder and folder not in here.parents:
        with suppress(OSError):  # something else is in it
            folder.rmdir()
    return own


def _remove_empty_folders(folder: Path, names: Iterable[str]) -> None:
    parents = {parent for name in names for parent in Path(name).parents} - {Path(), Path(MARK)}
    for parent in sorted(parents, key=lambda one: -len(one.parts)):
        with suppress(OSError):  # something of somebody else is in it
            (folder / parent).rmdir()
