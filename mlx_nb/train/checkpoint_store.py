"""The checkpoints of a run in one folder. Each is written completely or not at all.

    checkpoints/
      history-0001.jsonl                events of the run (see history_file)
      latest                            name of the newest checkpoint and the SHA-256 of that name
      save-0008-step-0000120-best/      a checkpoint (see checkpoint)
      .tmp-...                          half written or half removed; deleted by the next save

Every save has its own folder name, so saving a step again never removes the old checkpoint before the new one is
complete. Checkpoints are ordered by save and not by step: after a rewind the newest may have a lower step.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from mlx_nb.errors import CheckpointError
from mlx_nb.files.whole_files import is_alive, sync_folder
from mlx_nb.train.checkpoint import (
    FOLDER_NAME,
    Checkpoint,
    CheckpointInfo,
    folder_info,
    foreign_files,
    read_folder,
    state_bytes,
    write_file,
    write_folder,
)

BEST, AUTO = "best", "auto"
AUTOS_KEPT = 2
LATEST_FILE = "latest"
PARTIAL_PREFIX = ".tmp-"
WORD = re.compile(r"[a-z][a-z_]*")
PARTIAL_NAME = re.compile(rf"{re.escape(PARTIAL_PREFIX)}(\d+)-(?:latest|(?:old-)?{FOLDER_NAME.pattern})")
ADVICE = {
    errno.ENOSPC: "Free some disk space",
    errno.EDQUOT: "Free some of your disk quota",
    errno.EFBIG: "Raise the limit on file sizes (`ulimit -f`)",
    errno.EACCES: "Make the folder writable or choose another one",
    errno.EPERM: "Make the folder writable or choose another one",
    errno.EROFS: "Choose a folder on a writable disk",
    errno.ENOTDIR: "Move the file that has the name of the folder",
    errno.EEXIST: "Move the file that has the name of the folder",
    errno.ENOTEMPTY: "End the other run that saves into this folder",
    errno.ENOENT: "Do not move or delete the folder while a run saves into it",
}


class CheckpointStore:
    """The checkpoints of one run. It keeps the newest save of each of the last `keep` steps, the newest `best`, and the
    two newest autosaves.

    If the process dies at any instruction of `save`, `load` finds the new checkpoint or the one before it.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: at least one checkpoint must be kept.")
        self.folder = Path(folder)
        self.keep = keep

    def save(self, checkpoint: Checkpoint, *, kind: str) -> Path:
        """Write a checkpoint, flush it, and return its folder. Older checkpoints are removed only after that.

        An earlier save of the same step is replaced, unless it is the newest `best` and this one is not. `kind` and
        the names of groups are lower-case words. Raises CheckpointError with the reason and advice; after that, or
        after an interrupt, the older checkpoints are unchanged and nothing half written is left.
        """
        for word in (kind, *checkpoint.arrays):
            if not WORD.fullmatch(word):
                raise CheckpointError(f"{word!r} cannot name a checkpoint or a group. Use lower-case letters and `_`.")
        state_bytes(checkpoint.state)  # before anything is written
        mx.eval(checkpoint.arrays)
        final = None
        try:
            self.make_folder()
            self._remove_partial()
            number = max((info.save for info in self.list()), default=0) + 1
            final = self.folder / f"save-{number:04d}-step-{checkpoint.step:07d}-{kind}"
            partial = self._partial(final.name)
            identity = {"save": number, "step": checkpoint.step, "kind": kind}
            try:
                write_folder(partial, identity, checkpoint.arrays, checkpoint.state)
                os.rename(partial, final)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            sync_folder(self.folder)
            self._point_latest_to(final.name)
            self._prune()
        except OSError as error:
            raise save_error(self.folder, checkpoint.step, final, error) from error
        return final

    def load(
        self, which: int | str | None = None, refuse_unusable: Callable[[Checkpoint], None] = lambda checkpoint: None
    ) -> tuple[Checkpoint, list[str]]:
        """The newest good checkpoint, and one line about each newer one that cannot be used.

        `which` restricts the choice to a step (int), a kind, or a folder name. A checkpoint is good if every byte is
        as written and `refuse_unusable` does not raise CheckpointError. If there is none, raises CheckpointError with
        the problem of each.
        """
        infos = self.list()
        chosen = [info for info in infos if which is None or which in (info.step, info.kind, info.path.name)]
        wanted = "checkpoint" if which is None else f"checkpoint {which!r}"
        if not chosen:
            steps = ", ".join(f"{info.step} ({info.kind})" for info in infos) or "none"
            raise CheckpointError(f"there is no {wanted} in {self.folder}. Available steps: {steps}.")
        problems = _latest_problems(self.folder, {info.path.name for info in infos}) if which is None else []
        for info in reversed(chosen):
            try:
                checkpoint = read_folder(info)
                refuse_unusable(checkpoint)
            except (CheckpointError, OSError) as error:
                problems.append(f"{info.path.name}: {error}")
            else:
                return checkpoint, [f"{problem}; used {info.path.name} instead." for problem in problems]
        raise CheckpointError(
            f"no {wanted} in {self.folder} can be used. {'. '.join(problems)}. "
            "Put back the folder from a copy, upgrade mlx_nb if it is older than the checkpoint, or start a new run."
        )

    def list(self) -> list[CheckpointInfo]:
        """The checkpoints, oldest save first. Reads only names and sizes, so damaged ones are listed too."""
        try:
            folders = [path for path in self.folder.iterdir() if FOLDER_NAME.fullmatch(path.name)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot be read as a folder of checkpoints: {error.strerror}."
            ) from error
        infos = [info for path in folders if (info := folder_info(path)) is not None]
        return sorted(infos, key=lambda info: (info.save, info.step))

    def delete(self, info: CheckpointInfo) -> None:
        """Remove a checkpoint. Raises CheckpointError if that is not possible."""
        if foreign := foreign_files(info.path):
            raise CheckpointError(f"{foreign[0]} was not written by mlx_nb, so {info.path} stays. Move it away first.")
        try:
            self._remove(info)
        except OSError as error:
            raise CheckpointError(f"{info.path} cannot be removed: {error.strerror}.") from error

    def make_folder(self) -> None:
        """Create the folder and flush its entry. Raises OSError."""
        missing = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in missing:
            sync_folder(path.parent)

    def _partial(self, name: str) -> Path:
        return self.folder / f"{PARTIAL_PREFIX}{os.getpid()}-{name}"

    def _remove_partial(self) -> None:
        """Remove partial files of dead processes, and of this one, which saves one checkpoint at a time."""
        for path in self.folder.glob(f"{PARTIAL_PREFIX}*"):
            partial = PARTIAL_NAME.fullmatch(path.name)
            if partial is None or (int(partial[1]) != os.getpid() and is_alive(int(partial[1]))):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _point_latest_to(self, name: str) -> None:
        partial = self._partial(LATEST_FILE)
        try:
            write_file(partial, _latest_bytes(name))
            os.replace(partial, self.folder / LATEST_FILE)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_folder(self.folder)

    def _prune(self) -> None:
        infos = self.list()[::-1]
        newest_of_step = {info.step: info for info in reversed(infos)}
        newest = [info for info in infos if newest_of_step[info.step] is info]
        # Autosaves are frequent and must not displace others.
        kept = [info for info in newest if info.kind != AUTO][: self.keep]
        kept += [info for info in newest if info.kind == AUTO][:AUTOS_KEPT]
        kept += [info for info in infos if info.kind == BEST][:1]
        for info in infos:
            if info not in kept and not foreign_files(info.path):
                self._remove(info)

    def _remove(self, info: CheckpointInfo) -> None:
        # Renamed first, so that an interrupted removal does not leave something that looks like a checkpoint.
        partial = self._partial(f"old-{info.path.name}")
        os.rename(info.path, partial)
        if partial.is_symlink():
            partial.unlink()
        else:
            shutil.rmtree(partial)


def _latest_problems(folder: Path, names: set[str]) -> list[str]:
    """The problems with the file `latest`. It may name an older checkpoint: a writer may die before updating it."""
    try:
        written = (folder / LATEST_FILE).read_bytes()
    except OSError as error:
        return [f"{LATEST_FILE}: {error.strerror}"]
    name = written.split(b" ")[0].decode(errors="replace")
    if written != _latest_bytes(name):
        return [f"{LATEST_FILE}: damaged"]
    return [] if name in names else [f"{LATEST_FILE}: names {name}, which is not there"]


def save_error(folder: Path, step: int, final: Path | None, error: OSError) -> CheckpointError:
    """The error for a step that could not be saved. `final` is its checkpoint folder, which may be complete anyway."""
    reason = error.strerror or str(error)
    advice = ADVICE.get(error.errno or 0, "Look at the disk and the folder")
    if final is not None and final.exists():
        return CheckpointError(
            f"step {step} is saved in {final}, but cleaning up {folder} after it failed: {reason}. {advice}; the next "
            "save tries again."
        )
    return CheckpointError(
        f"step {step} could not be saved in {folder}: {reason}. The run in memory and older checkpoints are unchanged. "
        f"{advice}, then save again."
    )


def _latest_bytes(name: str) -> bytes:
    return f"{name} {hashlib.sha256(name.encode()).hexdigest()}\n".encode()
