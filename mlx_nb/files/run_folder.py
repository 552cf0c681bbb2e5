"""The folder of a run: one run at a time may write there, and only over its own files."""

from __future__ import annotations

import functools
import gc
import os
import secrets
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from mlx_nb.errors import FolderError, FolderTaken, and_more
from mlx_nb.files.folder_lock import MARK, FolderLock
from mlx_nb.files.kept_runs import (
    delete_command,
    folder_now,
    kept_run,
    megabytes,
    prune_earlier,
    resume_command,
)
from mlx_nb.files.moving import finish_moving, held_by, move_aside
from mlx_nb.files.places import refuse_among_files, refuse_among_runs
from mlx_nb.files.whole_files import write_whole
from mlx_nb.files.written_files import (
    ADAPTER_FILE,
    ARRIVING_FILE,
    CONFIG_FILE,
    PEFT_FILE,
    RUN,
    WrittenFiles,
    foreign_marks,
    has_whole_checkpoint,
    not_ours_error,
    run_in,
)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# One thread at a time takes, checks or releases a folder: the one that trains, or one that saves meanwhile.
_lock = threading.RLock()


def _locked(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    @functools.wraps(method)
    def locked(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        with _lock:
            return method(*arguments, **options)

    return locked


class RunFolder:
    """The folder at `path`, as used by the run `run_id` called `name`.

    Call `take` before anything is loaded, `begin` before the first file, `write` for each file, `release` at the end.
    All raise FolderError in one line if the folder cannot be written, another run holds it, or a file that mlx_nb did
    not write is in the way. `at_rest` tells whether everything is saved and no training is active, so that another run
    of this process may take the folder over; `let_go(reason)` ends this run for that.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        run_id: str | None = None,
        *,
        kind: str = RUN,
        at_rest: Callable[[], bool] = lambda: False,
        let_go: Callable[[str], None] | None = None,
    ) -> None:
        self.path = path
        self.name = name
        self.run_id = run_id or secrets.token_hex(16)
        self._kind = kind
        self.at_rest = at_rest
        self.let_go = let_go or self.give_up
        self._lock = FolderLock(path, name)
        self.notes: tuple[str, ...] = ()
        self.refused = False  # whether the last attempt to write there failed
        self._given_up = ""
        self._saved = False  # when it was given up
        self._written: WrittenFiles | None = None
        self._seen: dict[Path, tuple[int, int, int]] = {}
        _folders.add(self)

    @property
    def held(self) -> bool:
        """Whether this run may write there."""
        return self._lock.held

    def holds(self, path: Path) -> bool:
        """Whether it is the folder at `path` that is held, which may have been moved since."""
        return self._lock.is_of(path)

    @_locked
    def take(self) -> None:
        """Take the lock and make sure that this run can write there. Creates the folder if needed."""
        if self.lost:
            raise FolderTaken(self.lost)
        try:
            if foreign := foreign_marks(self.path):
                raise not_ours_error(str(self.path / foreign[0]))
            holder = self._lock.take()
            if holder is not None and holder.is_this_process:
                self._take_over()
                holder = self._lock.take()
            if holder is None:
                _probe(self.path)
        except (OSError, ValueError) as error:
            self.release()
            raise self._unwritable(error) from None
        if holder is not None:
            raise FolderTaken(held_by(self.path, self.name, holder))
        self._wait_for_arrival()

    def _wait_for_arrival(self) -> None:
        """Wait until files that are being moved here have arrived. Raises FolderTaken while another run moves them."""
        try:
            source = Path((self.path / MARK / ARRIVING_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        self.release()  # whoever moves them holds both folders, this one first
        other = RunFolder(source, self.name)
        other.take()
        try:
            finish_moving(other.path, other.name)
        finally:
            other.release()
        self.take()

    def other_holder(self) -> RunFolder | None:
        """The RunFolder of another run of this process that holds this folder; None without one."""
        return holder_in_process(self.path, self)

    @_locked
    def share(self) -> None:
        """Like `take`, for a run that only reads at first: another run of this process may hold it until then."""
        if self.other_holder() is None:
            self.take()

    def _take_over(self) -> None:
        """Take over from another run of this process that nothing refers to, or that is at rest and saved."""
        gc.collect()
        other = self.other_holder()
        if other is not None and other.at_rest():
            whom = "the same run, resumed" if other.run_id == self.run_id else f"the run {self.name!r}"
            other.give_up(f"{self.path} was taken over by {whom} in this process")

    @_locked
    def release(self) -> None:
        """Release the lock. The folder can be taken again unless another run has it."""
        self._lock.release()

    @_locked
    def give_up(self, reason: str) -> None:
        """Release the lock for good: every later attempt to write fails with `reason`."""
        self._given_up = reason
        self._saved = folder_now(self.path, self.run_id) is not None and has_whole_checkpoint(self.path)
        self.at_rest, self.let_go = (
            lambda: False,
            self.give_up,
        )  # drop the references to the run, which its folder must not keep alive
        self.release()

    @property
    def given_up(self) -> bool:
        """Whether this run has lost the folder; `lost` says why."""
        return bool(self._given_up)

    @property
    def lost(self) -> str:
        """Why this run has lost the folder, and how to get it back from where it is now; empty if it has not."""
        if not self._given_up:
            return ""
        place = folder_now(self.path, self.run_id)
        way_back = resume_command(place) if place is not None else ""
        saved = " What it had saved was removed since." if self._saved else ""
        if way_back:
            saved = f" It is saved, and {way_back} continues with it."
        return f"{self._given_up}.{saved} This run no longer writes there; `run.save(FOLDER)` saves it elsewhere."

    @_locked
    def check(self) -> None:
        """Check before every save that the folder still exists and is still this run's. Raises FolderError."""
        if self.lost or not self.held:
            self.take()
        there = run_in(self.path)
        if there is None:
            self._begin_list()
        elif there[0] != self.run_id:
            self.release()
            raise FolderTaken(
                f"{self.path} holds another run, {there[1]!r}, by now. `run.save(FOLDER)` keeps this one elsewhere."
            )

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A context in which the folder is held; it is released afterwards unless it was held before."""
        before = self.held
        self.check()
        try:
            yield
        finally:
            if not before:
                self.release()

    def refuse_misplaced(self) -> None:
        """Raise FolderTaken if this run would write among the files of another one, or another one among its own."""
        refuse_among_runs(self.path)

    def refuse_foreign(self) -> None:
        """Raise FolderError if a file that mlx_nb did not write has a name that this run would write under."""
        self.refuse_misplaced()
        in_the_way = [*foreign_marks(self.path), *WrittenFiles(self.path).in_the_way()]
        if in_the_way:
            raise not_ours_error(and_more([str(self.path / name) for name in in_the_way], 1))

    @_locked
    def begin(self, keep_previous: int | None = None) -> Path | None:
        """Start this run in the folder. Files of an earlier run are moved; returns the folder they are in now.

        All other files stay. Of the earlier runs the `keep_previous` newest are kept (None: all). Notes about it for
        the user are in `notes`.
        """
        if not self.held:
            self.take()
        self.refuse_foreign()
        try:
            target = finish_moving(self.path, self.name) or move_aside(self.path, self.name)
            self._begin_list()
        except OSError as error:
            raise self._unwritable(error) from None
        in_use = {one.path for one in list(_folders) if one is not self and not one._given_up}
        self.notes = (*self._where_it_is(target), *prune_earlier(self.path, keep_previous or sys.maxsize, in_use))
        return target

    def _where_it_is(self, target: Path | None) -> list[str]:
        """Notes about the run that was moved to `target`."""
        kept = None
        if target is not None:
            with suppress(OSError):  # another process is removing it
                kept = kept_run(target)
        if kept is None:
            return []
        moved = f"The adapter from {self.path} is now in {target}, with the rest of its run: {megabytes(kept.bytes)}."
        way_back = resume_command(kept.folder)
        ways = [f"{way_back} continues with it"] if way_back else []
        return [f"{moved} {', '.join([*ways, f'{delete_command(kept.folder)} removes it'])}."]

    @_locked
    def adopt(self) -> None:
        """Continue the run that is there: its id becomes this one's. Raises FolderError if it was moved away."""
        if self.held and (target := finish_moving(self.path, self.name)):
            raise FolderError(f"the run in {self.path} was moved to {target} when another began. Resume it there.")
        written = WrittenFiles(self.path)
        if written.run is not None:
            self.run_id = written.run

    def _begin_list(self) -> None:
        """Create the list of this run's files, with its own files that already exist."""
        self._written = WrittenFiles(self.path)
        try:
            self._written.adopt(self.run_id, self.name, self._kind)
        except OSError as error:
            raise self._unwritable(error) from None

    @_locked
    def write(self, path: Path, write: Callable[[Any], Any]) -> None:
        """Write a file of the run atomically and record it. Raises OSError if the disk does not take it."""
        self.refused = True
        self.check()
        name = path.relative_to(self.path).as_posix()
        if self._written is None:
            self._written = WrittenFiles(self.path)
        written = self._written
        if path.is_symlink() or (_stamp(path) not in (None, self._seen.get(path)) and not written.holds(name)):
            raise FolderError(
                f"{path} was changed by another program, so it is not overwritten. Move it away and continue, "
                "or `run.save(FOLDER)` and continue there."
            )
        write_whole(path, write, partial(written.record, name))
        self._seen[path] = stamp if (stamp := _stamp(path)) else (0, 0, 0)
        self.refused = False

    @_locked
    def keep_numbered(self, count: int) -> None:
        """Remove the numbered adapters of this run except the `count` last written.

        An adapter that was changed since stays. Raises OSError.
        """
        self.check()
        written = WrittenFiles(self.path)
        for name in written.numbered()[:-count]:
            if written.holds(name):
                (self.path / name).unlink()

    @_locked
    def take_for_adapter(self) -> Path | None:
        """Take a folder that the user names for an adapter. An adapter saved there before is moved aside.

        Returns where that is now. Raises FolderError if a run, or an adapter that mlx_nb did not write, is in the
        folder.
        """
        refuse_among_files(self.path)
        self.take()
        written = WrittenFiles(self.path)
        if written.run == self.run_id:
            return None
        own = written.own()
        if written.kind == RUN or any("/" in name for name in own):
            whose = f"the run {written.name!r}" if written.name else "another run"
            raise FolderTaken(f"{self.path} is the folder of {whose}, so nothing was written. Give another folder.")
        for name in (ADAPTER_FILE, PEFT_FILE, CONFIG_FILE):
            if name not in own and os.path.lexists(self.path / name):
                raise FolderError(
                    f"{self.path / name} was not written by mlx_nb, so it is not overwritten. Give another folder."
                )
        return self.begin()

    def _unwritable(self, error: Exception) -> FolderError:
        reason = getattr(error, "strerror", None) or str(error)
        return FolderError(
            f"{self.path} cannot be written: {reason}. Give another `--name` or adapter_path, or make the folder "
            "writable."
        )


_folders: weakref.WeakSet[RunFolder] = weakref.WeakSet()


def holder_in_process(path: Path, but: RunFolder | None = None) -> RunFolder | None:
    """The RunFolder of this process, other than `but`, that holds the folder at `path`; None without one."""
    return next((one for one in list(_folders) if one is not but and one.holds(path)), None)


def _probe(folder: Path) -> None:
    """Check that files can be created in the folder. Raises OSError."""
    with tempfile.NamedTemporaryFile(prefix=f"{MARK}-", dir=folder):
        pass


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """A stamp that changes with every change of a file; None without the file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _in_child() -> None:
    """In a forked child: the thread that held `_lock` does not exist here, so make a new lock."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_in_child)
