"""Files that are there whole or not at all, also after a power cut; and what killed processes left of them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Any], Any]) -> None:
    """Write beside `path`, flush to disk, then rename: a reader sees the old file or the new one, never half.

    What a process that was killed while it wrote the same file left behind is removed.
    """
    _remove_leftovers(path)
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
    for partial in path.parent.glob(f".*.{path.name}"):
        pid = partial.name[1 : -len(path.name) - 1]
        if pid.isdecimal() and not is_alive(int(pid)):
            partial.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def sync_tree(folder: Path) -> None:
    """Flush every file of a folder to disk, and the folder."""
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync(Path(parent) / name, os.O_RDONLY)
        sync_folder(Path(parent))


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk."""
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """Flush an open file or folder to disk."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network disks cannot flush folders; a write that failed says something else.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
