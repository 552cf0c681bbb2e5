"""The folder of an exported model: it appears complete or not at all, and takes the place of earlier exports only."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_nb.errors import FolderError, FolderTaken
from mlx_nb.files.folder_lock import MARK
from mlx_nb.files.places import free_name, refuse_among_files
from mlx_nb.files.whole_files import is_alive, sync_folder, sync_tree
from mlx_nb.files.written_files import EXPORT, WrittenFiles, digest_of, heading


@contextmanager
def replacing_folder(path: Path, run_id: str, name: str) -> Iterator[Path]:
    """An empty folder to write an export of the run `name` to. At the end of the block it takes the place of `path`.

    After an error or interrupt in the block, `path` is as before. An earlier export at `path` is removed at the end.
    Raises FolderError, naming the file, if `path` has anything else in it, and if the disk does not take the files.
    """
    refuse_foreign(path)
    work, old = _beside(path, os.getpid(), "part"), _beside(path, os.getpid(), "old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(path)
        work.mkdir()
        written = WrittenFiles(work)
        written.begin(run_id, name, EXPORT)
        yield work
        for file in _files_in(work):
            written.record(file, *digest_of(work / file))
        sync_tree(work)
        refuse_foreign(path)
        if os.path.lexists(path):
            os.rename(path, old)
        os.rename(work, path)
        sync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if old.is_dir() and not os.path.lexists(path):
            os.rename(old, path)
        shutil.rmtree(old, ignore_errors=True)


def unwritable(path: Path, error: OSError) -> FolderError:
    """The error for an export that the disk did not take."""
    return FolderError(f"{path} cannot be written: {error.strerror or error}. Free some space, or give another folder.")


def refuse_foreign(path: Path) -> None:
    """Raise FolderError if an export to `path` would replace anything but an earlier, unchanged export."""
    refuse_among_files(path)
    if not os.path.lexists(path):
        return
    free = f"Give another folder, such as {free_name(path)}."
    if os.path.islink(path) or not path.is_dir():
        raise FolderError(f"{path} is not a folder, so it is not overwritten. {free}")
    written = WrittenFiles(path)
    if written.run is not None and written.kind != EXPORT:
        raise FolderTaken(f"{path} is the folder of the run {written.name!r}, so nothing was written. {free}")
    foreign = [file for file in _files_in(path) if written.run is None or not written.holds(file)]
    if foreign:
        raise FolderError(
            f"{path / foreign[0]} was not written by mlx_nb, or it was changed since, so the folder is not replaced. "
            f"{free}"
        )


def refuse_beyond_disk(path: Path, size: int) -> None:
    """Raise FolderError if the disk of `path` has less than `size` bytes free."""
    there = next((folder for folder in (path, *path.parents) if folder.exists()), Path("/"))
    if (free := shutil.disk_usage(there).free) < size:
        raise FolderError(
            f"{path} needs {size / 1e6:,.0f} MB, and its disk has {free / 1e6:,.0f} MB free. Nothing was written."
        )


def _beside(path: Path, pid: int, what: str) -> Path:
    return path.with_name(f".{path.name}.{pid}.{what}")


def _files_in(folder: Path) -> list[str]:
    """The files in a folder, as names in it, without mlx_nb's bookkeeping."""
    found = []
    for above, folders, names in os.walk(folder):
        if Path(above) == folder:
            folders[:] = [name for name in folders if name != MARK]
        links = [name for name in folders if os.path.islink(os.path.join(above, name))]
        found += [(Path(above) / name).relative_to(folder).as_posix() for name in (*names, *links)]
    return sorted(found)


def _clean_up(path: Path) -> None:
    """Remove what a killed process left beside `path`; put a folder back that it had moved away last."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d+)\.(part|old)")
    for entry in path.parent.iterdir():
        found = pattern.fullmatch(entry.name)
        if found is None or is_alive(int(found[1])) or heading(entry) is None:
            continue
        if found[2] == "old" and not os.path.lexists(path):
            os.rename(entry, path)
        else:
            shutil.rmtree(entry, ignore_errors=True)
