"""The format of one checkpoint: a folder of safetensors and JSON files, checked byte for byte when it is read.

save-0008-step-0000120-best/      the eighth save of its run, at step 120, of the kind `best`
  parameters.safetensors          one file for each group of arrays
  optimizer.safetensors
  state.json
  manifest.json                   format, save, step, kind; size and SHA-256 of every file; its own SHA-256
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_nb.errors import CheckpointError, shown
from mlx_nb.files.typed_json import WrongJson, json_object, read_as
from mlx_nb.files.whole_files import HashedFile, sync, sync_folder

FORMAT = 1
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
ARRAYS = "arrays"  # the key in the state with the digests of the array files
SAVED_GROUP = re.compile(r"[a-z][a-z_]*\.safetensors")
FOLDER_NAME = re.compile(r"save-(\d{4,})-step-(\d{7,})-([a-z][a-z_]*)")


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint. Arrays are read back with the same dtype, shape and bits, sorted by name.

    arrays   group -> name -> array of any dtype but float64; each group is a file
    state    JSON with string keys; floats come back bit for bit, infinities too, NaN as NaN; tuples as lists
    path     the folder it was read from; None for a snapshot that was not
    """

    step: int
    arrays: dict[str, dict[str, mx.array]]
    state: dict[str, Any]
    path: Path | None = None


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint in a listing. `save` is its number in the order of saves, `time` is in seconds since 1970."""

    save: int
    step: int
    kind: str
    time: float
    bytes: int
    path: Path


@dataclass(frozen=True)
class FileEntry:
    """Size and digest of a file as it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`: the identity of a checkpoint, and its files by name."""

    format: int
    save: int
    step: int
    kind: str
    files: dict[str, FileEntry]


def folder_info(path: Path) -> CheckpointInfo | None:
    """Describe a checkpoint folder by its name and file sizes; None if it does not exist."""
    match = FOLDER_NAME.fullmatch(path.name)
    try:
        sizes = [entry.stat().st_size for entry in os.scandir(path)]
        time = path.stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:  # such as a link to itself; listed, so that reading it reports the error
        sizes, time = [], 0.0
    assert match is not None
    return CheckpointInfo(int(match[1]), int(match[2]), match[3], time, sum(sizes), path)


def foreign_files(folder: Path) -> list[Path]:
    """The files in a checkpoint folder that mlx_nb did not write."""
    own = {MANIFEST_FILE, STATE_FILE}
    return [path for path in folder.glob("*") if path.name not in own and path.suffix != ".safetensors"]


def write_folder(
    folder: Path, identity: dict[str, Any], arrays: dict[str, dict[str, mx.array]], state: dict[str, Any]
) -> None:
    """Write a checkpoint to a new folder, flushed. `identity` has save, step and kind. Raises OSError."""
    folder.mkdir()
    files = {f"{group}.safetensors": write_file(folder / f"{group}.safetensors", arrays[group]) for group in arrays}
    digests = {name: file["sha256"] for name, file in files.items()}
    files[STATE_FILE] = write_file(folder / STATE_FILE, state_bytes({**state, ARRAYS: digests}))
    write_file(folder / MANIFEST_FILE, manifest_bytes({"format": FORMAT, **identity, "files": files}))
    sync_folder(folder)


def write_file(path: Path, content: bytes | dict[str, mx.array]) -> dict[str, Any]:
    """Write and flush bytes, or arrays as safetensors. Returns the size and SHA-256 for the manifest."""
    with HashedFile(path) as file:
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


def manifest_bytes(content: dict[str, Any]) -> bytes:
    """The bytes of a manifest. The encoding is unique, so a file with other bytes has been altered."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, sort_keys=True, indent=2).encode()


def state_bytes(state: dict[str, Any]) -> bytes:
    """The state as JSON. Raises CheckpointError if it cannot be written as JSON."""
    try:
        _require_string_keys(state)
        return json.dumps(state).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the state cannot be saved as JSON: {error}.") from error


def _require_string_keys(value: Any) -> None:
    """Raise TypeError for other keys, which JSON would silently turn into strings."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} is not a string")
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            _require_string_keys(item)


def read_folder(info: CheckpointInfo) -> Checkpoint:
    """Read and verify the checkpoint in a folder. Raises CheckpointError that names the problem."""
    files = _read_manifest(info).files
    for name, expected in files.items():
        try:
            with open(info.path / name, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != expected.bytes:
                    raise CheckpointError(f"{name} has {size} bytes of {expected.bytes}")
                if hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
                    raise CheckpointError(f"{name} was changed after it was written (SHA-256 differs)")
        except OSError as error:
            raise CheckpointError(f"{name}: {error.strerror}") from error
    arrays = {}
    for name in sorted(set(files) - {STATE_FILE}):
        try:
            loaded = typing.cast(dict[str, mx.array], mx.load(str(info.path / name)))
            # mx.load is lazy, and the file may be deleted before the arrays are used.
            mx.eval(loaded)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{name} holds no arrays: {' '.join(str(error).split())}") from error
        arrays[name.removesuffix(".safetensors")] = dict(sorted(loaded.items()))
    return Checkpoint(info.step, arrays, _read_state(info, files), info.path)


def _read_state(info: CheckpointInfo, files: dict[str, FileEntry]) -> dict[str, Any]:
    """Read the state, and verify that it belongs to the array files beside it."""
    try:
        state: dict[str, Any] = read_as(dict[str, Any], json_object((info.path / STATE_FILE).read_bytes()))
    except WrongJson as error:
        raise CheckpointError(f"{STATE_FILE}: {error}") from None
    written = {name: entry.sha256 for name, entry in files.items() if name != STATE_FILE}
    if state.pop(ARRAYS, written) != written:  # older versions did not store the digests
        raise CheckpointError(f"{STATE_FILE} does not belong to the array files beside it")
    return state


def _read_manifest(info: CheckpointInfo) -> Manifest:
    try:
        written = (info.path / MANIFEST_FILE).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{MANIFEST_FILE}: {error.strerror}") from error
    try:
        content = json_object(written)
        content.pop("sha256")
        intact = written == manifest_bytes(content)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise CheckpointError(f"{MANIFEST_FILE} was changed after it was written")
    try:
        manifest: Manifest = read_as(Manifest, content, others=True)
    except WrongJson as error:
        raise CheckpointError(f"{MANIFEST_FILE} is not a valid manifest ({error})") from None
    foreign = [name for name in manifest.files if name != STATE_FILE and not SAVED_GROUP.fullmatch(name)]
    if foreign or STATE_FILE not in manifest.files:
        named = f"it names {shown(foreign[0])}" if foreign else f"no {STATE_FILE}"
        raise CheckpointError(f"{MANIFEST_FILE} is not a valid manifest ({named})")
    if manifest.format != FORMAT:
        by = "written by a newer mlx_nb" if manifest.format > FORMAT else "in a format that is no longer supported"
        raise CheckpointError(f"{by} (checkpoint format {manifest.format}, this mlx_nb reads {FORMAT})")
    if (manifest.save, manifest.step, manifest.kind) != (info.save, info.step, info.kind):
        raise CheckpointError(f"the folder was renamed: it is save {manifest.save} at step {manifest.step}")
    return manifest
