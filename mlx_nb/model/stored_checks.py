"""Stores the results of slow checks of a model in the cache folder, so that later processes need not compute them.

A result is one small JSON file, named by the digest of everything the result depends on: the files of the model, its
parameters and settings in memory, the code of its classes, this package, mlx, mlx-lm, and the device. Without a
writable cache folder, each process computes its own.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import sys
import types
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_nb.files.cache_folder import cache_folder
from mlx_nb.files.whole_files import write_whole
from mlx_nb.model.trees import named_arrays

_MOST_FILES = 500  # of about 20 bytes; those not used for longest are removed
_DEEPEST = 8  # of what functions close over
_SIMPLE = (bool, int, float, str, bytes, type(None))


def checks_folder() -> Path:
    """The folder of the results. Raises ModelError if the cache cannot be a folder."""
    return cache_folder() / "checks"


def stored_file(model: nn.Module, files: Hashable, check: str, arguments: tuple[Any, ...]) -> Path | None:
    """The file for the result of a check of a model loaded from `files`; None if there can be none."""
    try:
        state = sorted((name, array.shape, str(array.dtype)) for name, array in named_arrays(model.parameters()))
        scalars = [repr(sorted(_scalars_of(module))) for _, module in model.named_modules()]
        about = (check, arguments, files, state, scalars, _code_of(model), _PACKAGE, _environment())
        return checks_folder() / f"{hashlib.sha256(repr(about).encode()).hexdigest()}.json"
    except Exception:  # code of others may hold anything, and the check itself is always possible
        return None


def read_result(file: Path) -> dict[str, Any] | None:
    """What was written to the file, as `{"result": ...}`; None if it is missing or damaged."""
    try:
        written = json.loads(file.read_bytes())
        os.utime(file)
    except (OSError, ValueError, RecursionError):
        return None
    return written if isinstance(written, dict) and "result" in written else None


def write_result(file: Path, result: Any) -> None:
    """Write a result.

    Does nothing if the folder cannot be written, or if the files of this package changed since they were imported.
    """
    try:
        if _package_digest() != _PACKAGE:
            return
        text = json.dumps({"result": result}).encode()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda handle: handle.write(text))
        oldest_first = sorted(file.parent.glob("*.json"), key=lambda one: one.stat().st_mtime)
        for old in oldest_first[:-_MOST_FILES]:
            old.unlink(missing_ok=True)
    except (OSError, TypeError, ValueError):
        return


def _package_digest() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


_PACKAGE = _package_digest()


def _environment() -> tuple[Any, ...]:
    """Versions as they are loaded, the machine, the device, and the variables that mlx reads."""
    variables = sorted((name, value) for name, value in os.environ.items() if name.startswith("MLX_"))
    device = mx.default_device()
    info = mx.device_info(device) if hasattr(mx, "device_info") else {}
    named = str(info.get("device_name") or info.get("architecture") or "")
    return (
        vars(mx).get("__version__"),
        getattr(sys.modules.get("mlx_lm"), "__version__", None),
        platform.machine(),
        sys.platform,
        str(device),
        named,
        variables,
    )


def _scalars_of(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Settings of a module that are no arrays, such as the scale of attention."""
    for name, value in [*vars(module).items(), *module.items()]:
        if name != "_training" and (isinstance(value, _SIMPLE) or name in ("args", "config")):
            yield name, repr(value)


def _code_of(model: nn.Module) -> str:
    """A digest of the code that a pass of the model runs, as it is in memory: functions may have been replaced."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__ if kind is not object}
    names = {kind.__module__ for kind in kinds} | {"mlx_lm.models.base", "mlx_lm.models.cache", "mlx.core.fast"}
    modules = [sys.modules[name] for name in sorted(names) if name in sys.modules]
    kinds |= {value for module in modules for value in list(vars(module).values()) if isinstance(value, type)}
    owners: list[Any] = [*modules, mx, mx.fast, *sorted(kinds, key=lambda kind: (kind.__module__, kind.__qualname__))]
    digest = hashlib.sha256()
    for owner in owners:
        for name, value in sorted(vars(owner).items(), key=lambda item: item[0]):
            digest.update(f"{name}={_digest_of(value, 0)};".encode())
    return digest.hexdigest()


def _digest_of(value: Any, depth: int) -> str:
    """Of a function: its code, defaults and what it closes over. Of other values: their type, and simple values."""
    if isinstance(value, _SIMPLE):
        return repr(value)
    parts: list[str] = [type(value).__name__]
    if depth > _DEEPEST:
        return parts[0]
    if isinstance(value, types.FunctionType):
        parts.append(_digest_of_code(value.__code__))
        parts += [_digest_of(one, depth + 1) for one in value.__defaults__ or ()]
        parts += [f"{name}={_digest_of(one, depth + 1)}" for name, one in (value.__kwdefaults__ or {}).items()]
        parts += [_digest_of(cell.cell_contents, depth + 1) for cell in value.__closure__ or () if _is_filled(cell)]
    elif isinstance(value, property):
        parts += [_digest_of(one, depth + 1) for one in (value.fget, value.fset)]
    elif isinstance(value, classmethod | staticmethod | types.MethodType):
        parts.append(_digest_of(value.__func__, depth + 1))
    elif isinstance(value, functools.partial):
        parts += [_digest_of(one, depth + 1) for one in (value.func, *value.args)]
    elif callable(value) and not isinstance(value, type):
        parts.append(str(getattr(type(value), "__module__", "")))
        inner = vars(value).get("__wrapped__") if hasattr(value, "__dict__") else None
        parts += [_digest_of(inner, depth + 1)] if inner is not None else []
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


@functools.lru_cache(maxsize=20_000)
def _digest_of_code(code: types.CodeType) -> str:
    constants = [
        _digest_of_code(one)
        if isinstance(one, types.CodeType)
        else repr(sorted(map(repr, one)) if isinstance(one, frozenset) else one)
        for one in code.co_consts
    ]
    return hashlib.sha256(code.co_code + repr((code.co_names, constants)).encode()).hexdigest()
