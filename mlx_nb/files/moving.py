"""Moves a run's files to another folder; a move that is cut short by the death of its process is finished later."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

from mlx_nb.errors import FolderTaken
from mlx_nb.files.folder_lock import MARK, FolderLock, Holder
from mlx_nb.files.kept_runs import new_folder_beside
from mlx_nb.files.whole_files import write_whole
from mlx_nb.files.written_files import ARRIVING_FILE, MOVING_FILE, WrittenFiles


def held_by(folder: Path, name: str, holder: Holder) -> str:
    """Error text: the run called `name` cannot have a folder that another run holds, and what to do."""
    return (
        f"{folder} is held by {holder}. Give this run another `--name`, such as {name}-2 (or another adapter_path), or "
        "end the other one first."
    )


def finish_moving(folder: Path, name: str) -> Path | None:
    """Finish a move that was cut short by the death of its process.

    Returns where the files are; None if there was none.
    """
    try:
        target = Path((folder / MARK / MOVING_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if not (target / MARK / ARRIVING_FILE).exists():  # not begun, or complete
        (folder / MARK / MOVING_FILE).unlink()
        return None
    return _move_to(folder, target, name)


def move_aside(folder: Path, name: str) -> Path | None:
    """Move the files of the run in `folder` to a new folder beside it.

    Returns that folder; None if there are no files.
    """
    if not WrittenFiles(folder).own():
        WrittenFiles(folder).path.unlink(missing_ok=True)
        return None
    target = new_folder_beside(folder)
    (folder / MARK / MOVING_FILE).write_text(str(target), encoding="utf-8")
    (target / MARK).mkdir()
    write_whole(target / MARK / ARRIVING_FILE, lambda file: file.write(str(folder).encode()))
    return _move_to(folder, target, name)


def _move_to(folder: Path, target: Path, name: str) -> Path:
    """Move all our own files to `target`, the list of them last.

    No other run can take that folder before it is done.
    """
    lock = FolderLock(target, name)
    if (holder := lock.take()) is not None:
        raise FolderTaken(held_by(folder, name, holder))
    try:
        _move_all(folder, target)
    finally:
        lock.release()
    return target


def _move_all(folder: Path, target: Path) -> None:
    written = WrittenFiles(folder)
    own = written.own()
    for name in own:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        _move(folder / name, target / name)
    for inner in {(folder / name).parent for name in own} - {folder}:
        with suppress(OSError):  # a file of others is in it
            inner.rmdir()
    if written.path.exists():
        _move(written.path, target / MARK / written.path.name)
    (target / MARK / ARRIVING_FILE).unlink()
    (folder / MARK / MOVING_FILE).unlink()


def _move(source: Path, target: Path) -> None:
    """Rename; if the target is on another disk, copy completely and then remove."""
    try:
        os.rename(source, target)
        return
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    partial_copy = target.with_name(f".{target.name}.partial")
    if source.is_dir():
        shutil.rmtree(partial_copy, ignore_errors=True)  # left by a process that died
        shutil.copytree(source, partial_copy)
        os.rename(partial_copy, target)
        shutil.rmtree(source)
    else:
        shutil.copy2(source, partial_copy)
        os.replace(partial_copy, target)
        source.unlink()
