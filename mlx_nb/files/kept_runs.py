"""Runs kept on disk: where earlier runs of a name are, their sizes, and their removal.

Only files that mlx_nb wrote are ever removed, byte for byte as written, and never while a run holds the folder.
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

END_IT_FIRST = "End that run first, with `%finetune stop` in its notebook or `run.release()` in Python."


class KeptRun(NamedTuple):
    """A run on disk. `bytes` is the size of its own files, `update` that of its newest checkpoint."""

    folder: Path
    name: str
    kind: str
    update: int | None
    bytes: int


def megabytes(size: int) -> str:
    """A size as text: `66.2 MB`, `1.3 GB`."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def delete_command(folder: Path) -> str:
    """The command that removes the run in `folder`, as the user would type it here."""
    return f"`{'%finetune' if in_ipython() else 'mlx-nb'} delete {shlex.quote(str(folder))} --yes`"


def resume_command(folder: Path) -> str:
    """The command that resumes the run in `folder`; empty if it has no checkpoint."""
    newest = newest_checkpoint(folder)
    if newest is None:
        return ""
    if not in_ipython() or not _names_its_rows(newest):
        rows = "" if _names_its_rows(newest) else ", data=ROWS"
        return f"`Run.resume({str(folder)!r}{rows})`"
    return f"`%finetune resume {shlex.quote(str(folder))}`"


def _names_its_rows(checkpoint: Path) -> bool:
    """Whether the settings in a checkpoint name the source of the rows; rows given as an object are not stored."""
    try:
        return "data" in json.loads((checkpoint / "state.json").read_bytes())["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


# Earlier runs of a name


def earlier_runs(folder: Path) -> list[Path]:
    """The folders of runs that were in `folder` before, the newest last."""
    found = [(number, path) for parent, start in _places(folder) for number, path in _numbered(parent, start)]
    return [path for _, path in sorted(found)]


def new_folder_beside(folder: Path) -> Path:
    """Create `NAME.previous-1` beside the folder; inside it if that is a link, a mount or the working folder.

    The number is above all existing ones.
    """
    here = Path.cwd().resolve()
    beside, inside = _places(folder)
    if not folder.is_symlink() and not os.path.ismount(folder) and folder.resolve() not in (here, *here.parents):
        with suppress(OSError):  # such as a name that is too long, or a parent folder that cannot be written
            return _make_next(*beside)
    return _make_next(*inside)


def folder_now(folder: Path, run_id: str) -> Path | None:
    """The current folder of a run that was in `folder`; None if it is neither there nor moved aside by a later run."""
    places = [folder, *reversed(earlier_runs(folder))]
    return next((place for place in places if (found := heading(place)) and found[0] == run_id), None)


def _places(folder: Path) -> tuple[tuple[Path, str], tuple[Path, str]]:
    """Where an earlier run can be, beside and inside: the parent folder, and how its name begins."""
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
    """Remove the runs that were in `folder` before, except the `keep` newest. Returns notes about it for the user.

    A run stays if it is in use, or if its folder contains anything that mlx_nb did not write.
    """
    rule = f"of the earlier runs in {folder} the {keep} newest are kept (`keep_previous`)"
    lines = []
    for place in earlier_runs(folder)[:-keep]:
        found = heading(place)
        if found is None or found[2] != RUN or place in in_use or is_locked(place):
            continue
        with suppress(OSError, FolderTaken):  # the next run tries again
            own = own_files(place)
            if others := others_in(place, own):
                lines.append(f"{place} stays, although {rule}: mlx_nb did not write {and_more(others, 1)} in it.")
                continue
            delete_own(place)
            lines.append(f"{place} ({megabytes(sum(own.values()))}) was removed: {rule}.")
    return lines


# What a run's folder holds


def runs_below(folder: Path) -> Iterator[KeptRun]:
    """The runs in a folder and its subfolders, by path."""
    for parent, inner, _ in os.walk(folder):
        inner.sort()
        place = Path(parent)
        if (run := kept_run(place)) is not None:
            own = {CHECKPOINTS, MARK, *([] if (place / BEST_FOLDER / MARK).exists() else [BEST_FOLDER])}
            inner[:] = [name for name in inner if name not in own]
            yield run


def kept_run(folder: Path) -> KeptRun | None:
    """The run in a folder; None if there is none."""
    found, own = heading(folder), own_files(folder, exact=False)
    newest = newest_checkpoint(folder)
    if found is None and not own:
        return None
    update = None if newest is None else int(newest.name.split("-")[3])
    name, kind = (found[1], found[2]) if found else (folder.name, RUN)
    return KeptRun(folder, name, kind, update, sum(own.values()))


def own_files(folder: Path, *, exact: bool = True) -> dict[str, int]:
    """The files of the run in `folder`: names and sizes in bytes, the list of files last.

    With `exact`, only files with exactly the bytes that were written; otherwise the size is enough.
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
    """The files of a checkpoint that match its manifest, and the manifest itself, last."""
    try:
        content: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
        recorded = content.pop("sha256")
        if recorded != hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest():
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
    """Everything else in a folder, as names in it: files, links and empty folders."""
    ours = {name for file in own for name in (file, *(parent.as_posix() for parent in Path(file).parents))} | {MARK}
    if begins_as_ours(folder / MARK / LOCK_FILE):
        ours.add(f"{MARK}/{LOCK_FILE}")
    found = []
    for parent, folders, files in os.walk(folder):
        inner = [*files, *(name for name in folders if _is_leaf(Path(parent) / name))]
        found += [(Path(parent) / name).relative_to(folder).as_posix() for name in inner]
    return sorted(name for name in found if name not in ours)


def _is_leaf(folder: Path) -> bool:
    """Whether a folder is a link, or has nothing visible in it."""
    try:
        return folder.is_symlink() or not os.listdir(folder)
    except OSError:
        return True


def delete_own(folder: Path) -> dict[str, int]:
    """Remove the files of the run in `folder`, and the folder if nothing else is in it. Returns what was removed.

    Raises FolderTaken if a run holds it, and OSError; calling it again removes what is left then.
    """
    lock = FolderLock(folder, folder.name)
    if (holder := lock.take()) is not None:
        raise FolderTaken(f"{folder} is held by {holder}, so nothing was removed. {END_IT_FIRST}")
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
        with suppress(OSError):  # a file of others is in it
            (folder / parent).rmdir()
