"""Checks paths: whether they can exist, whether a run may write there, and which path was probably meant."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from mlx_nb.errors import ConfigError, FolderError, FolderTaken, nearest, shortened, shown
from mlx_nb.files.folder_lock import MARK, holder_of, is_locked
from mlx_nb.files.written_files import (
    ADAPTER_FILE,
    BEST_FOLDER,
    CHECKPOINTS,
    CONFIG_FILE,
    EXPORT,
    NUMBERED,
    REFERENCE_FILE,
    REPORT_FILE,
    has_own_configuration,
    has_whole_checkpoint,
    heading,
)

_LONGEST_NAME = 200  # bytes: file systems take 255, and `.previous-1` may follow
_LONGEST_PART = 255
_LONGEST_BELOW = 128  # length in bytes of the longest path that a run writes below its folder
_DEEPEST = 200  # nesting depth of folders: Python's own functions to make and remove them are recursive
_OF_EXPORTS = {MARK, ADAPTER_FILE, CONFIG_FILE}
_OF_RUNS = {*_OF_EXPORTS, BEST_FOLDER, CHECKPOINTS, REFERENCE_FILE, REPORT_FILE}


def working_folder() -> Path:
    """The working folder of the process. Raises FolderError if it was removed."""
    try:
        return Path.cwd()
    except OSError:
        raise FolderError("the working folder no longer exists. Go to one that does: `%cd FOLDER`.") from None


def check_name(name: str) -> None:
    """Raise ConfigError for a run name that cannot be the name of a folder."""
    parts = name.split("/") if isinstance(name, str) else [""]
    problem = f"a run cannot be called {shown(name)}: its name is also that of its folder in adapters/"
    if not all(map(str.strip, parts)) or {".", ".."} & set(parts) or not name.isprintable():
        raise ConfigError(f"{problem}.")
    if (size := len(name.encode())) > _LONGEST_NAME:
        raise ConfigError(f"{problem}, and it has {size:,} bytes. Give one of at most {_LONGEST_NAME}.")


def folder_of(path: str, working_folder: Path | None) -> Path:
    """The absolute path of a run's folder. A link in it stays a link, unless `..` follows it. Raises FolderError."""
    try:
        folder = (working_folder or Path.cwd()) / Path(path).expanduser()
        folder = Path(os.path.realpath(folder)) if ".." in folder.parts else folder
        reason = path_problem(folder)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).rstrip(".")
    if reason is not None:
        raise FolderError(f"{shown(path)} cannot be a folder: {reason}. Give another adapter_path.")
    return folder


def run_folder(name: str, working_folder: Path) -> Path:
    """The folder that a run's name or the path of its folder refers to. Raises FolderError."""
    folder = folder_of(name, working_folder)
    return folder if os.path.lexists(folder) or "/" in name else folder_of(f"adapters/{name}", working_folder)


def path_problem(path: Path, below: int = _LONGEST_BELOW) -> str | None:
    """Why no file system accepts `path` with `below` bytes of further names in it; None if it is possible.

    What already exists on the disk is not checked.
    """
    if "\0" in str(path):
        return "it contains a null character"
    try:
        size = len(os.fsencode(path))
    except ValueError:
        return "it contains half a surrogate pair"
    longest = max(path.parts, key=lambda part: len(os.fsencode(part)), default="")
    if len(os.fsencode(longest)) > _LONGEST_PART:
        return f"the name {shortened(longest, 20)!r} in it has more than {_LONGEST_PART} bytes"
    if len(path.parts) > _DEEPEST:
        return f"it is {len(path.parts):,} folders deep, and {_DEEPEST} is the most"
    if size + below > (most := os.pathconf("/", "PC_PATH_MAX")):
        return f"it has {size:,} bytes, and {most - below:,} is the most"
    return None


def same_folder(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same folder."""
    try:
        return one == other or one.samefile(other)
    except (OSError, ValueError):
        return False


def refuse_among_files(path: Path, own: Path | None = None) -> None:
    """Raise FolderTaken if `path` is under a name that a run reserves for its own files.

    `own` is the folder of the calling run, which may not exist yet.
    """
    real = Path(os.path.realpath(path))
    folders = [real, *real.parents]
    for folder, inner in zip(reversed(folders[1:]), reversed(folders[:-1])):
        if inner.name.casefold() not in _OF_RUNS and not NUMBERED.fullmatch(inner.name):
            continue
        name = _run_in(folder, inner.name)
        if name is None and own is not None and same_folder(folder, own):
            name = own.name
        if name is not None:
            way = "-".join(real.relative_to(folder).parts)
            raise FolderTaken(
                f"{path} lies among the files of the run {name!r} in {folder}, so nothing was written there. Give "
                f"another place, such as {free_name(folder.with_name(f'{folder.name}-{way}'))}."
            )


def refuse_among_runs(folder: Path) -> None:
    """Raise FolderTaken if a run in `folder` would write into the folder of another run."""
    refuse_among_files(folder)
    for name in (BEST_FOLDER, CHECKPOINTS):
        place = folder / name
        if os.path.islink(place) and not Path(os.path.realpath(place)).is_relative_to(os.path.realpath(folder)):
            refuse_among_files(place)
        for inner in (place, *_folders_in(place)):
            found = heading(inner)
            other = found[1] if found else _holder_in(inner)
            if other is not None or has_whole_checkpoint(inner):
                raise FolderTaken(
                    f"{inner} is the folder of the run {other or inner.name!r}, and a run in {folder} would write "
                    f"there. Give another folder, such as {free_name(folder.with_name(f'{folder.name}-2'))}."
                )


def free_name(path: Path) -> Path:
    """`path`, or if that exists the same with the first free number."""
    free, number = path, 1
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


def _run_in(folder: Path, name: str) -> str | None:
    """The name of the run in whose folder `name` is one of the run's own files; None if there is none."""
    if (found := heading(folder)) is not None:
        return found[1] if found[2] != EXPORT or name.casefold() in _OF_EXPORTS else None
    if (holder := _holder_in(folder)) is not None:
        return holder
    return folder.name if has_own_configuration(folder) or has_whole_checkpoint(folder) else None


def _holder_in(folder: Path) -> str | None:
    """The name of the live run that holds a folder, which may have written nothing there yet."""
    if not is_locked(folder):
        return None
    holder = holder_of(folder)
    return folder.name if holder is None else holder.run


def _folders_in(folder: Path) -> list[Path]:
    try:
        return [path for path in sorted(folder.iterdir()) if os.path.isdir(path)]
    except OSError:
        return []


def suggest_path(given: str, wanted: Callable[[Path], bool], names: Iterable[str] = ()) -> str:
    """` Did you mean 'x'?` for a path that does not exist; an empty string if nothing has a similar name.

    Suggests the `wanted` entry of its folder with the most similar name, or one of `names`. If the folder does not
    exist, suggests one with a similar name. Raises OSError for a folder that cannot be listed.
    """
    path = Path(given).expanduser()
    names = list(names)
    beside = [entry.name for entry in sorted(path.parent.iterdir()) if wanted(entry)] if path.parent.is_dir() else []
    if near := nearest(path.name, [*names, *beside]):
        return f" Did you mean {near if near in names else str(Path(given).with_name(near))!r}?"
    above = path.parent.parent
    if path.parent.is_dir() or not above.is_dir():
        return ""
    folder = nearest(path.parent.name, [entry.name for entry in sorted(above.iterdir()) if entry.is_dir()])
    here = Path(given).parent
    return f" There is no folder {str(here)!r}. Did you mean {str(here.with_name(folder))!r}?" if folder else ""
