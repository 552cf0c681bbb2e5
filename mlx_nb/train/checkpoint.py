"""Exact checkpoints in a folder: safetensors and JSON, whole or not at all, checked byte for byte when read.

    checkpoints/
      history-0001.jsonl                events of the run (see history_file)
      latest                            name of the newest checkpoint and the SHA-256 of that name
      save-0008-step-0000120-best/      the eighth save of this folder, at step 120, of the kind `best`
        parameters.safetensors          one file for each group of arrays
        optimizer.safetensors
        state.json
        manifest.json                   format, save, step, kind; size and SHA-256 of every file; its own SHA-256
      .tmp-...                          something half written or half removed; gone after the next save

Every save has a folder name of its own, so saving a step again never takes away what is there before the new one
stands. The order is that of the saves and not of the steps: after a rewind the newest may have a lower step.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_nb.errors import CheckpointError, shown
from mlx_nb.files.typed_json import WrongJson, json_object, read_as
from mlx_nb.files.whole_files import HashedFile as _HashedFile
from mlx_nb.files.whole_files import is_alive, sync, sync_folder

FORMAT = 1
BEST, AUTO = "best", "auto"
AUTOS_KEPT = 2
LATEST_FILE = "latest"
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
ARRAYS = "arrays"  # in the state: the digests of the arrays that belong to it
PARTIAL_PREFIX = ".tmp-"
WORD = re.compile(r"[a-z][a-z_]*")
SAVED_GROUP = re.compile(r"[a-z][a-z_]*\.safetensors")
FOLDER_NAME = re.compile(r"save-(\d{4,})-step-(\d{7,})-([a-z][a-z_]*)")
PARTIAL_NAME = re.compile(rf"{re.escape(PARTIAL_PREFIX)}(\d+)-(?:latest|(?:old-)?{FOLDER_NAME.pattern})")
ADVICE = {
    errno.ENOSPC: "Free some disk space",
    errno.EDQUOT: "Free some of your disk quota",
    errno.EFBIG: "Raise the limit on file sizes (`ulimit -f`)",
    errno.EACCES: "Make the folder writable or choose another one",
    errno.EPERM: "Make the folder writable or choose another one",
    errno.EROFS: "Choose a folder on a writable disk",
    errno.ENOTDIR: "Move the file that stands in the place of the folder",
    errno.EEXIST: "Move the file that stands in the place of the folder",
    errno.ENOTEMPTY: "End the other run that saves into this folder",
    errno.ENOENT: "Do not move or delete the folder while a run saves into it",
}


@dataclass(frozen=True)
class Checkpoint:
    """What is stored. Arrays come back with the same dtype, shape and bits, sorted by name.

    arrays   group -> name -> array of any dtype but float64; each group is a file
    state    JSON with string keys; floats come back bit for bit, infinities too, NaN as NaN; tuples as lists
    path     the folder it was read from; None before
    """

    step: int
    arrays: dict[str, dict[str, mx.array]]
    state: dict[str, Any]
    path: Path | None = None


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint seen from outside. `save` counts the saves of its folder; `time` in seconds since 1970."""

    save: int
    step: int
    kind: str
    time: float
    bytes: int
    path: Path


class CheckpointStore:
    """The checkpoints of one run: the newest save of each of the `keep` last steps, the newest `best`, and the two
    newest autosaves.

    A process that dies at any instruction of `save` leaves the newest or the one before it to `load`.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: at least one checkpoint has to be kept.")
        self.folder = Path(folder)
        self.keep = keep

    def save(self, checkpoint: Checkpoint, *, kind: str) -> Path:
        """Write a checkpoint to disk, flushed, and return its folder. Older ones are removed only after that.

        An earlier save of the same step is replaced, unless it is the newest `best` and this one is not. `kind` and
        the groups are words of lower-case letters. Raises CheckpointError with the reason and what to do; then, and
        after an interrupt, the older checkpoints are as they were and nothing half written stays.
        """
        for word in (kind, *checkpoint.arrays):
            if not WORD.fullmatch(word):
                raise CheckpointError(f"{word!r} cannot name a checkpoint or a group. Use lower-case letters and `_`.")
        _state_bytes(checkpoint.state)  # before anything is written
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
                _write_folder(partial, identity, checkpoint.arrays, checkpoint.state)
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
        """The newest good checkpoint, and one line about everything that was passed over on the way to it.

        `which` narrows the choice to a step (int), a kind, or a folder's name. A checkpoint is good when every byte
        is as written and `refuse_unusable` does not raise CheckpointError. Raises CheckpointError when there is none,
        naming what is wrong with each.
        """
        infos = self.list()
        chosen = [info for info in infos if which is None or which in (info.step, info.kind, info.path.name)]
        wanted = "checkpoint" if which is None else f"checkpoint {which!r}"
        if not chosen:
            there = ", ".join(f"{info.step} ({info.kind})" for info in infos) or "none"
            raise CheckpointError(f"there is no {wanted} in {self.folder}. Steps that are there: {there}.")
        problems = _latest_problems(self.folder, {info.path.name for info in infos}) if which is None else []
        for info in reversed(chosen):
            try:
                checkpoint = _read_folder(info)
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
        """What is there, oldest save first. Reads names and sizes only, so a damaged one is listed too."""
        try:
            folders = [path for path in self.folder.iterdir() if FOLDER_NAME.fullmatch(path.name)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot be read as a folder of checkpoints: {error.strerror}."
            ) from error
        infos = [info for path in folders if (info := _info(path)) is not None]
        return sorted(infos, key=lambda info: (info.save, info.step))

    def delete(self, info: CheckpointInfo) -> None:
        """Remove one checkpoint. Raises CheckpointError when that is not possible."""
        if foreign := _foreign(info.path):
            raise CheckpointError(f"{foreign[0]} was not written by mlx_nb, so {info.path} stays. Move it away first.")
        try:
            self._remove(info)
        except OSError as error:
            raise CheckpointError(f"{info.path} cannot be removed: {error.strerror}.") from error

    def make_folder(self) -> None:
        """Make the folder, flushed. Raises OSError."""
        missing = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in missing:
            sync_folder(path.parent)

    def _partial(self, name: str) -> Path:
        return self.folder / f"{PARTIAL_PREFIX}{os.getpid()}-{name}"

    def _remove_partial(self) -> None:
        """Take away what dead writers left: a process saves one checkpoint at a time, so its own is dead too."""
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
            _write_file(partial, _latest_bytes(name))
            os.replace(partial, self.folder / LATEST_FILE)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_folder(self.folder)

    def _prune(self) -> None:
        infos = self.list()[::-1]
        newest_of_step = {info.step: info for info in reversed(infos)}
        newest = [info for info in infos if newest_of_step[info.step] is info]
        # Autosaves come often, and push no other out.
        kept = [info for info in newest if info.kind != AUTO][: self.keep]
        kept += [info for info in newest if info.kind == AUTO][:AUTOS_KEPT]
        kept += [info for info in infos if info.kind == BEST][:1]
        for info in infos:
            if info not in kept and not _foreign(info.path):
                self._remove(info)

    def _remove(self, info: CheckpointInfo) -> None:
        # Renamed first, so that a removal cut short does not leave something that looks like a checkpoint.
        partial = self._partial(f"old-{info.path.name}")
        os.rename(info.path, partial)
        if partial.is_symlink():
            partial.unlink()
        else:
            shutil.rmtree(partial)


def _foreign(folder: Path) -> list[Path]:
    """What a person put into the folder of a checkpoint."""
    own = {MANIFEST_FILE, STATE_FILE}
    return [path for path in folder.glob("*") if path.name not in own and path.suffix != ".safetensors"]


def _latest_problems(folder: Path, names: set[str]) -> list[str]:
    """What is wrong with `latest`. That it names an older one is right: a writer may die before moving it."""
    try:
        written = (folder / LATEST_FILE).read_bytes()
    except OSError as error:
        return [f"{LATEST_FILE}: {error.strerror}"]
    name = written.split(b" ")[0].decode(errors="replace")
    if written != _latest_bytes(name):
        return [f"{LATEST_FILE}: damaged"]
    return [] if name in names else [f"{LATEST_FILE}: names {name}, which is not there"]


def save_error(folder: Path, step: int, final: Path | None, error: OSError) -> CheckpointError:
    """What to say when a step could not be saved; `final` is its checkpoint, where that stands all the same."""
    reason = error.strerror or str(error)
    advice = ADVICE.get(error.errno or 0, "Look at the disk and the folder")
    if final is not None and final.exists():
        return CheckpointError(
            f"step {step} is saved in {final}, but {folder} could not be put in order after it: {reason}. {advice}; "
            "the next save tries again."
        )
    return CheckpointError(
        f"step {step} could not be saved in {folder}: {reason}. Nothing in memory and no older checkpoint has changed. "
        f"{advice}, then save again."
    )


def _info(path: Path) -> CheckpointInfo | None:
    match = FOLDER_NAME.fullmatch(path.name)
    try:
        sizes = [entry.stat().st_size for entry in os.scandir(path)]
        time = path.stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:  # such as a link to itself: listed, so that it is named when it is to be read
        sizes, time = [], 0.0
    assert match is not None
    return CheckpointInfo(int(match[1]), int(match[2]), match[3], time, sum(sizes), path)


def _write_file(path: Path, content: bytes | dict[str, mx.array]) -> dict[str, Any]:
    """Write and flush bytes, or arrays as safetensors. Returns size and SHA-256 as the manifest holds them."""
    with _HashedFile(path) as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            try:
                mx.save_safetensors(typing.cast(str, file), content)
            except RuntimeError as error:
                raise CheckpointError(f"{path.stem} cannot be saved as safetensors: {error}") from error
        file.flush()
        sync(file.fileno())
        return {"bytes": file.tell(), "sha256": file.sha256.hexdigest()}


def _write_folder(
    folder: Path, identity: dict[str, Any], arrays: dict[str, dict[str, mx.array]], state: dict[str, Any]
) -> None:
    folder.mkdir()
    files = {f"{group}.safetensors": _write_file(folder / f"{group}.safetensors", arrays[group]) for group in arrays}
    digests = {name: file["sha256"] for name, file in files.items()}
    files[STATE_FILE] = _write_file(folder / STATE_FILE, _state_bytes({**state, ARRAYS: digests}))
    _write_file(folder / MANIFEST_FILE, _manifest_bytes({"format": FORMAT, **identity, "files": files}))
    sync_folder(folder)


def _manifest_bytes(content: dict[str, Any]) -> bytes:
    """The one spelling of a manifest, in every format: a file that is spelled otherwise has been altered."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, sort_keys=True, indent=2).encode()


def _latest_bytes(name: str) -> bytes:
    return f"{name} {hashlib.sha256(name.encode()).hexdigest()}\n".encode()


def _state_bytes(state: dict[str, Any]) -> bytes:
    try:
        _require_string_keys(state)
        return json.dumps(state).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the state cannot be saved as JSON: {error}.") from error


def _require_string_keys(value: Any) -> None:
    """JSON would turn other keys into strings without a word."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} is not a string")
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            _require_string_keys(item)


def _read_folder(info: CheckpointInfo) -> Checkpoint:
    """The checkpoint in a folder. Raises CheckpointError with what is wrong with it."""
    files = _read_manifest(info).files
    for name, expected in files.items():
        try:
            with open(info.path / name, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != expected.bytes:
                    raise CheckpointError(f"{name} has {size} bytes of {expected.bytes}")
                if hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
                    raise CheckpointError(f"{name} is not as it was written (SHA-256 differs)")
        except OSError as error:
            raise CheckpointError(f"{name}: {error.strerror}") from error
    arrays = {}
    for name in sorted(set(files) - {STATE_FILE}):
        try:
            loaded = typing.cast(dict[str, mx.array], mx.load(str(info.path / name)))
            # Loading is lazy, and the file may be pruned before the arrays are used.
            mx.eval(loaded)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{name} holds no arrays: {' '.join(str(error).split())}") from error
        arrays[name.removesuffix(".safetensors")] = dict(sorted(loaded.items()))
    return Checkpoint(info.step, arrays, _read_state(info, files), info.path)


def _read_state(info: CheckpointInfo, files: dict[str, FileEntry]) -> dict[str, Any]:
    """The state, once it is certain that the arrays beside it are those that it was written with."""
    try:
        state: dict[str, Any] = read_as(dict[str, Any], json_object((info.path / STATE_FILE).read_bytes()))
    except WrongJson as error:
        raise CheckpointError(f"{STATE_FILE}: {error}") from None
    written = {name: entry.sha256 for name, entry in files.items() if name != STATE_FILE}
    if state.pop(ARRAYS, written) != written:  # those of an older mlx_nb do not say
        raise CheckpointError(f"{STATE_FILE} is of other arrays than those that are there")
    return state


@dataclass(frozen=True)
class FileEntry:
    """A file as it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`: which checkpoint a folder is, and its files by name."""

    format: int
    save: int
    step: int
    kind: str
    files: dict[str, FileEntry]


def _read_manifest(info: CheckpointInfo) -> Manifest:
    try:
        written = (info.path / MANIFEST_FILE).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{MANIFEST_FILE}: {error.strerror}") from error
    try:
        content = json_object(written)
        content.pop("sha256")
        intact = written == _manifest_bytes(content)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise CheckpointError(f"{MANIFEST_FILE} is not as it was written")
    try:
        manifest: Manifest = read_as(Manifest, content, others=True)
    except WrongJson as error:
        raise CheckpointError(f"{MANIFEST_FILE} does not say what a manifest says ({error})") from None
    foreign = [name for name in manifest.files if name != STATE_FILE and not SAVED_GROUP.fullmatch(name)]
    if foreign or STATE_FILE not in manifest.files:
        named = f"it names {shown(foreign[0])}" if foreign else f"no {STATE_FILE}"
        raise CheckpointError(f"{MANIFEST_FILE} does not say what a manifest says ({named})")
    if manifest.format != FORMAT:
        by = "written by a newer mlx_nb" if manifest.format > FORMAT else "of a format that is no longer read"
        raise CheckpointError(f"{by} (checkpoint format {manifest.format}, this mlx_nb reads {FORMAT})")
    if (manifest.save, manifest.step, manifest.kind) != (info.save, info.step, info.kind):
        raise CheckpointError(f"the folder was renamed: it is save {manifest.save} at step {manifest.step}")
    return manifest
