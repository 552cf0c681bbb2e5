"""One writer per run folder: a lock that the operating system releases when its process dies.

`.mlx_nb/lock` in the folder is locked with flock(2) and names its holder. On a disk without locks the file alone is the
lock, and it counts as long as the process that it names is alive.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import socket
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from mlx_nb.files.typed_json import WrongJson, json_object, read_as

MARK = ".mlx_nb"  # the subfolder of a run folder with mlx_nb's bookkeeping
LOCK_FILE = "lock"
_CANNOT_LOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_BEGINNING = b'{"run": "'  # of a lock file, and of the list of a run's files
_TRIES = 50
_WAIT_SECONDS = 0.01  # for a holder that has the lock and has yet to write its name


@dataclass(frozen=True)
class Holder:
    """Who holds a folder. `started` distinguishes a process from a later one with the same pid; `since` is in UTC."""

    run: str
    pid: int
    host: str
    started: str | None
    since: str

    def __str__(self) -> str:
        where = "" if self.host == socket.gethostname() else f" on {self.host}"
        who = "this process" if self.is_this_process else f"process {self.pid}{where}"
        return f"the run {self.run!r} of {who}, since {self.since}"

    @property
    def is_this_process(self) -> bool:
        """Whether the holder is a run of this process."""
        return self == _this_process(self.run, self.since)

    @property
    def is_dead(self) -> bool:
        """Whether its process is known to be gone; always False for a process of another machine."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:
            pass
        return self.started is not None and self.started != process_start(self.pid)


def process_start(pid: int) -> str | None:
    """When a process of this machine started, in ticks since boot; None if unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]


def _this_process(run: str, since: str | None = None) -> Holder:
    since = since or time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return Holder(run, os.getpid(), socket.gethostname(), process_start(os.getpid()), since)


class _LockFile:
    """The open file of a lock. `close` cleans up whatever an interrupt left; calling it twice is harmless."""

    def __init__(self, path: Path, made: Sequence[Path]) -> None:
        self.path, self._made, self._pid = path, made, os.getpid()
        self.locked = False
        self._file = io.FileIO(path, "r+", opener=lambda name, _: os.open(name, os.O_RDWR | os.O_CREAT, 0o644))

    def lock(self, name: str) -> bool:
        """Lock it for the run called `name`. Returns False if another holds it, or it is no longer at its path."""
        self.locked = _lock(self._file.fileno(), self.path, name)
        return self.locked

    def holder(self) -> Holder | None:
        """The holder; None if its name is not written yet."""
        return _read(self._file.fileno())

    def is_at(self, path: Path) -> bool:
        """Whether it is locked and is the file at `path`."""
        return self.locked and not self._file.closed and _is_file(self._file.fileno(), path)

    def close(self) -> None:
        """Release the lock if this process has it, and remove folders that were created for it and are empty."""
        try:
            if self._pid == os.getpid() and self.is_at(self.path):
                # Unlinked while locked: whoever opened it in between sees that it is gone, and opens the next one.
                with suppress(OSError):
                    self.path.unlink()
                    _remove_empty([*self._made, self.path.parent])
        finally:
            self._file.close()

    def forget(self) -> None:
        """Close it without releasing the lock: in a forked child the lock belongs to the parent."""
        self._file.close()


class FolderLock:
    """The lock of one folder, for the run called `name`. Released by `release`, or when nothing refers to it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / MARK / LOCK_FILE
        self._name = name
        self._file: _LockFile | None = None
        self._given_back: weakref.finalize[[], FolderLock] | None = None
        self._made: list[Path] = []
        _locks.add(self)

    @property
    def held(self) -> bool:
        """Whether the folder at this path is still the one that was locked."""
        return self.is_of(self.path.parent.parent)

    def is_of(self, folder: Path) -> bool:
        """Whether it is held and locks `folder`, by whatever path it was taken."""
        return self._file is not None and self._file.is_at(folder / MARK / LOCK_FILE)

    def take(self) -> Holder | None:
        """Take the lock, creating the folder if needed. Returns the holder if it is another one.

        Raises OSError if the folder cannot be created or written.
        """
        if self.held:
            return None
        self.release()
        for left in reversed(range(_TRIES)):
            try:
                self._make_folders()
                # Stored before locking: what an interrupt leaves is closed by the next `take` or `release`.
                self._file = _LockFile(self.path, tuple(self._made))
            except FileNotFoundError:  # its last holder removed the folder in between
                if left:
                    continue
                raise
            self._given_back = weakref.finalize(self, self._file.close)
            if self._file.lock(self._name):
                return None
            holder = self._file.holder()
            self._file.close()
            self._given_back.detach()
            if holder is not None:
                return holder
            time.sleep(_WAIT_SECONDS)
        return Holder("?", 0, "an unknown machine", None, "an unknown time")

    def _make_folders(self) -> None:
        # A link whose target does not exist yet stays a link; its target is created.
        folder = Path(os.path.realpath(self.path.parent))
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        self._made += [path for path in missing if path not in self._made]
        folder.mkdir(parents=True, exist_ok=True)

    def release(self) -> None:
        """Release it if it is held, and remove folders that were created for it and are empty."""
        if self._file is not None:
            self._file.close()
        else:
            _remove_empty(self._made)
        if self._given_back is not None:
            self._given_back.detach()
        self._file, self._given_back, self._made = None, None, []

    def forget(self) -> None:
        """In a forked child: the lock belongs to the parent."""
        if self._given_back is not None:
            self._given_back.detach()
        if self._file is not None:
            self._file.forget()
        self._file, self._given_back = None, None


def is_locked(folder: Path) -> bool:
    """Whether a live process, including this one, holds the lock of `folder`."""
    try:
        descriptor = os.open(folder / MARK / LOCK_FILE, os.O_RDWR)
    except (OSError, ValueError):
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError as error:
        holder = _read(descriptor)
        return error.errno not in _CANNOT_LOCK or (holder is not None and not holder.is_dead)
    finally:
        os.close(descriptor)


def holder_of(folder: Path) -> Holder | None:
    """The holder that the lock of `folder` names; None if there is no lock, or no name in it yet."""
    try:
        with open(folder / MARK / LOCK_FILE, "rb") as file:
            return _read(file.fileno())
    except (OSError, ValueError):
        return None


def begins_as_ours(path: Path) -> bool:
    """Whether a lock or list may be mlx_nb's: a file of its own that is empty or begins with the name of a run.

    True also for a missing file. A process that died while writing leaves the beginning of such a file.
    """
    if os.path.islink(path):
        return False
    try:
        with open(path, "rb") as file:
            return _BEGINNING.startswith(file.read(len(_BEGINNING)))
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in sorted(set(folders), key=lambda one: len(one.parts), reverse=True):
        with suppress(OSError):
            folder.rmdir()


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _lock(descriptor: int, path: Path, name: str) -> bool:
    """Lock an open file and record the holder. Returns False if another holds it, or it is no longer at `path`."""
    locks = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _CANNOT_LOCK:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            raise
        locks = False
        holder = _read(descriptor)
        if holder is not None and not holder.is_dead:
            return False
    if not _is_file(descriptor, path):
        return False
    mine = _this_process(name)
    text = json.dumps(asdict(mine)).encode()
    os.pwrite(descriptor, text, 0)
    os.ftruncate(descriptor, len(text))
    if not locks:  # of several that came at the same instant the last one has it
        time.sleep(5 * _WAIT_SECONDS)
    return locks or _read(descriptor) == mine


def _read(descriptor: int) -> Holder | None:
    """The holder; None if its name is not written yet."""
    try:
        holder: Holder = read_as(Holder, json_object(os.pread(descriptor, 4096, 0)))
    except WrongJson:
        return None
    return holder


_locks: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _forget_all() -> None:
    for lock in list(_locks):
        lock.forget()


os.register_at_fork(after_in_child=_forget_all)
