"""Stores the results of slow checks of a model in the cache folder, so that later processes need not repeat them.

A result is one small JSON file, named by the digest of everything that it depends on: the model's files, the code of
its modules and of this package, the versions of mlx and mlx-lm, and the device. Without a writable cache folder, each
process computes its own.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import platform
import sys
from collections.abc import Hashable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

import mlx_nb
from mlx_nb.errors import ModelError
from mlx_nb.files.cache_folder import cache_folder
from mlx_nb.files.whole_files import write_whole

_MOST_FILES = 500  # of about 200 bytes; the oldest are removed


def stored_file(model: nn.Module, files: Hashable, check: str, arguments: tuple[Any, ...]) -> Path | None:
    """The file of the result of a check of a model that was loaded from `files`; None without a cache folder."""
    about = (check, arguments, files, _code_of(model), _environment(), str(mx.default_device()))
    try:
        return cache_folder() / "checks" / f"{hashlib.sha256(repr(about).encode()).hexdigest()}.json"
    except ModelError:
        return None


def read_result(file: Path) -> dict[str, Any] | None:
    """The contents of the file, as `{"result": ...}`; None if it is missing or damaged."""
    try:
        written = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return written if isinstance(written, dict) and "result" in written else None


def write_result(file: Path, result: Any) -> None:
    """Write a result that JSON can hold. Does nothing if the folder cannot be written."""
    text = json.dumps({"result": result}).encode()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda handle: handle.write(text))
        oldest_first = sorted(file.parent.glob("*.json"), key=lambda one: one.stat().st_mtime)
        for old in oldest_first[:-_MOST_FILES]:
            old.unlink(missing_ok=True)
    except OSError:
        return


@functools.cache
def _environment() -> tuple[str, ...]:
    """Versions, the machine, and a digest of this package's code."""
    digest = hashlib.sha256()
    for file in sorted(Path(mlx_nb.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return (version("mlx"), version("mlx-lm"), platform.machine(), sys.platform, digest.hexdigest())


def _code_of(model: nn.Module) -> tuple[tuple[str, str, int, str], ...]:
    """Name, file, line and digest of each function of the model's classes and of their Python modules.

    They change if user code replaces a function.
    """
    found = set()
    for kind in {type(module) for module in model.modules()}:
        for owner in (kind, sys.modules.get(kind.__module__)):
            for name, value in vars(owner).items() if owner is not None else ():
                code = getattr(inspect.unwrap(value) if callable(value) else None, "__code__", None)
                if code is not None:
                    found.add((f"{kind.__module__}.{name}", code.co_filename, code.co_firstlineno, _digest_of(code)))
    return tuple(sorted(found))


def _digest_of(code: Any) -> str:
    return hashlib.sha256(code.co_code + repr(code.co_names).encode()).hexdigest()
