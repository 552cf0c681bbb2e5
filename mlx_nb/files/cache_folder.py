"""The cache of fetched and converted models; each entry is complete or absent."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_nb.errors import ModelError, shown
from mlx_nb.files.places import path_problem
from mlx_nb.files.whole_files import sync_folder, sync_tree

SIZES_FILE = "mlx_nb_files.json"  # name and size of each file, written with the folder
_WORK = re.compile(r"\..+\.work")
_EARLIER_WORK = re.compile(r"\..+-[0-9a-f]{8}")  # temporary folders of versions without locks
_EARLIER_WORK_SECONDS = 3600.0
_OF_MODELS = {".safetensors", ".json", ".jinja", ".gguf", ".whl"}
_TRIES = 1000
_HEADER_BYTES, _LARGEST_HEADER = 8, 100 * 1024**2

_remade: dict[Path, str] = {}


def cache_folder() -> Path:
    """The cache folder: `MLX_NB_CACHE`, or `mlx_nb` in the user's cache folder.

    Raises ModelError if it cannot be a folder.
    """
    named = os.environ.get("MLX_NB_CACHE")
    try:
        if named:
            folder = Path(named).expanduser().absolute()
        elif sys.platform == "darwin":
            folder = Path.home() / "Library" / "Caches" / "mlx_nb"
        else:
            above = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            folder = above.expanduser().absolute() / "mlx_nb"
        problem = path_problem(folder)
    except (OSError, RuntimeError) as error:
        problem = str(error).rstrip(".")
    if problem is not None:
        raise ModelError(f"the cache cannot be in {shown(named)}: {problem}. Set MLX_NB_CACHE to another folder.")
    return folder


def make_once(folder: Path, make: Callable[[Path], Path]) -> Path:
    """The model in `folder`, made first if it is missing or damaged.

    `make` gets an empty folder to work in, on the same disk, and returns the model's folder inside it. If several
    processes need the same model, one makes it and the others wait. Raises OSError if it cannot be written, and
    whatever `make` raises; an existing folder is then left unchanged.
    """
    _sweep(folder.parent)
    if folder.is_dir() and damage(folder) is None:
        return folder
    with _work_on(folder) as work:
        reason = damage(folder) if folder.is_dir() else None
        if folder.is_dir() and reason is None:
            return folder
        made = make(work)
        sizes = {file.name: file.stat().st_size for file in sorted(made.iterdir())}
        (made / SIZES_FILE).write_text(json.dumps(sizes), encoding="utf-8")
        sync_tree(made)
        if reason is not None:
            damaged = work / "damaged"
            os.rename(folder, damaged)
            _remade[folder] = reason
        os.rename(made, folder)
        if reason is not None:
            _keep_foreign(damaged, folder)
        sync_folder(folder.parent)
    return folder


def _keep_foreign(damaged: Path, folder: Path) -> None:
    """Move files that are not part of a model, such as notes, from a damaged folder to its replacement."""
    for entry in damaged.iterdir():
        if entry.suffix not in _OF_MODELS and not (folder / entry.name).exists():
            os.rename(entry, folder / entry.name)


def repair_note(folder: Path) -> str | None:
    """A note that the model in `folder` was damaged and remade by this process; None otherwise."""
    reason = _remade.get(folder)
    return None if reason is None else f"The cached model in {folder} was damaged ({reason}) and was made again."


@contextmanager
def _work_on(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that only this process works in; removed afterwards.

    The folder is its own lock: nothing else can be left behind, and a folder that was left behind belongs to nobody.
    """
    work = folder.with_name(f".{folder.name}.work")
    missing = [parent for parent in (folder.parent, *folder.parent.parents) if not parent.exists()]
    descriptor = _locked(work)
    try:
        for entry in work.iterdir():
            _remove(entry)
        yield work
    except OSError:
        missing.clear()  # a folder that could not be written stays for inspection
        raise
    finally:
        _remove(work)
        os.close(descriptor)
        for parent in missing:  # after a failure these are empty
            try:
                parent.rmdir()
            except OSError:
                break


def _locked(work: Path) -> int:
    """Create the folder and lock it, waiting for its current holder. Returns the descriptor to close."""
    left = _TRIES
    while True:
        try:
            work.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # its holder removed it in between, or nothing can be created there
            if not (left := left - 1):
                raise
            continue
        try:
            _lock(descriptor, wait=True)
            if os.path.samestat(os.fstat(descriptor), os.stat(work)):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Lock a descriptor. Returns False if another process holds it. On a disk without locks everyone succeeds."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return wait
    return True


def _sweep(parent: Path) -> None:
    """Remove what killed processes left in a cache folder; folders that a live process works in stay."""
    try:
        left = [entry for entry in parent.iterdir() if entry.name.startswith(".") and entry.is_dir()]
    except OSError:
        return
    for entry in filter(_holds_models_alone, left):
        if _WORK.fullmatch(entry.name):
            _remove_unless_locked(entry)
        elif _EARLIER_WORK.fullmatch(entry.name) and time.time() - entry.stat().st_mtime > _EARLIER_WORK_SECONDS:
            _remove(entry)


def _holds_models_alone(folder: Path) -> bool:
    """Whether every file in a folder is of a kind that models consist of.

    A user's own folder may have the same name.
    """
    return all(Path(name).suffix in _OF_MODELS for _, _, files in os.walk(folder) for name in files)


def _remove_unless_locked(work: Path) -> None:
    try:
        descriptor = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        if _lock(descriptor, wait=False):
            _remove(work)
    finally:
        os.close(descriptor)


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)


_intact: dict[Path, list[tuple[str, int, int]]] = {}  # name, size and time of the files of folders found intact


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a model folder, by name; None if they are intact. Reads no weights.

    Files that were intact and have not changed since are not read again: a tokenizer is megabytes of JSON.
    """
    try:
        files = sorted((one.name, one.stat().st_size, one.stat().st_mtime_ns) for one in folder.iterdir())
        if _intact.get(folder) == files:
            return None
        found = _damage(folder)
    except OSError as error:
        return f"{Path(str(error.filename or folder)).name}: {error.strerror or error}"
    except ValueError as error:
        return str(error)
    if found is None:
        _intact[folder] = files
    return found


def _damage(folder: Path) -> str | None:
    sizes = _json_of(folder / SIZES_FILE) if (folder / SIZES_FILE).exists() else {}
    for name, size in sizes.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (there := (folder / name).stat().st_size) != size:
            return f"{name} has {there:,} bytes of {size:,}"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"):
        if name == "config.json" or (folder / name).exists():
            _json_of(folder / name)
    shards = sorted(folder.glob("model*.safetensors"))
    if not shards:
        return "it has no model*.safetensors weights"
    for shard in shards:
        _check_safetensors(shard)
    return _missing_shard(folder)


def _json_of(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not whole JSON")
    return content


def _check_safetensors(path: Path) -> None:
    """Raise ValueError if the file's size differs from what its header states."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_HEADER_BYTES), "little")
        if size < _HEADER_BYTES or length > min(size - _HEADER_BYTES, _LARGEST_HEADER):
            raise ValueError(f"{path.name} is cut short, or not a safetensors file")
        try:
            header = json.loads(file.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            whole = _HEADER_BYTES + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ValueError(f"the header of {path.name} is damaged") from None
    if not ends:
        raise ValueError(f"{path.name} holds no weights")
    if size != whole:
        raise ValueError(f"{path.name} has {size:,} bytes of {whole:,}")


def _missing_shard(folder: Path) -> str | None:
    index = folder / "model.safetensors.index.json"
    named = set(_json_of(index).get("weight_map", {}).values()) if index.exists() else set()
    missing = sorted(name for name in named if not (folder / name).exists())
    return f"{missing[0]} is missing" if missing else None
