"""Atomic file writes: a file is complete or absent, even after a power cut or when its writer is killed."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Called with the finished file, its size in bytes and its SHA-256, before it replaces the target.
BeforeReplacing = Callable[[int, str], None]


class HashedFile(io.BufferedWriter):
    """A new file that hashes what is written to it, in order. Raises FileExistsError if the file exists."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "xb"))
        self.sha256 = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Write, and add to the digest."""
        self.sha256.update(data)
        return super().write(data)


def write_whole(path: Path, write: Callable[[Any], Any], before_replacing: BeforeReplacing | None = None) -> None:
    """Write beside `path`, flush to disk, then rename: a reader sees the old file or the new one, never a part.

    Removes what a process that was killed while writing the same file left behind. `before_replacing` may raise to
    cancel the write. Raises OSError.
    """
    _remove_leftovers(path)
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    partial.unlink(missing_ok=True)
    try:
        with HashedFile(partial) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        if before_replacing is not None:
            before_replacing(size, file.sha256.hexdigest())
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
    """Whether a process with this pid exists."""
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
    """Flush the directory entries of a folder to disk."""
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
        # Some network disks cannot flush folders; other errors mean a failed write.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
