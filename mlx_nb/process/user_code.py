"""User-defined functions (losses, rewards): their errors in one line, and a digest that shows whether they changed."""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import re
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

from mlx_nb.errors import shortened

_PLAIN = (int, float, complex, str, bytes, bool, type(None), range, re.Pattern)
_WRITES = ("STORE_GLOBAL", "STORE_DEREF", "DELETE_GLOBAL", "DELETE_DEREF")


def describe_error(error: BaseException, function: Callable[..., Any]) -> str:
    """Describe an exception in one line, with the line of `function` that raised it, counted from its `def`."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    try:
        message = " ".join(str(error).split())
    except Exception:
        message = ""
    text = f"{type(error).__name__}: {shortened(message, 200)}" if message else type(error).__name__
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if not _is_ours(frame.f_globals)]
    if not frames:
        return text
    code = getattr(inspect.unwrap(function), "__code__", frames[0][0].f_code)
    in_its_file = [(frame.f_code, line) for frame, line in frames if frame.f_code.co_filename == code.co_filename]
    where, line = (in_its_file or [(frames[0][0].f_code, frames[0][1])])[-1]
    return f"{text} (line {line - where.co_firstlineno + 1} of {where.co_name})"


def _is_ours(variables: dict[str, Any]) -> bool:
    return str(variables.get("__name__", "")).startswith("mlx_nb.")


def is_user_defined(function: Callable[..., Any]) -> bool:
    """Whether the function is user-defined, that is not part of this package."""
    return not str(getattr(inspect.unwrap(function), "__module__", "")).startswith("mlx_nb.")


def code_digest(function: Callable[..., Any]) -> str:
    """SHA-256 of what a function does: its code without line numbers, defaults, and what it closes over or calls.

    Functions and constants (numbers, texts, tuples of them) of its own module that it refers to are included. Globals
    that it assigns (a counter) and mutable values (a list) are not.
    """
    digest = hashlib.sha256()
    for part in _parts(function, set()):
        digest.update(repr(part).encode("utf-8", "backslashreplace") + b"\0")
    return digest.hexdigest()


def _parts(value: Any, seen: set[int]) -> Iterator[Any]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, functools.partial):
        yield from _parts(value.func, seen)
        yield from _constants([*value.args, *value.keywords.items()], seen)
    elif isinstance(value, types.MethodType):
        yield from _parts(value.__func__, seen)
    elif isinstance(value, types.FunctionType):
        yield from _function_parts(value, seen)
    elif isinstance(value, type):
        for member in vars(value).values():
            if isinstance(member, types.FunctionType):
                yield from _parts(member, seen)
    elif callable(value) and not isinstance(value, types.BuiltinFunctionType):
        yield type(value).__qualname__
        yield from _parts(type(value), seen)
        yield from _constants(sorted(getattr(value, "__dict__", {}).items()), seen)
    else:
        yield getattr(value, "__qualname__", type(value).__qualname__)


def _function_parts(function: types.FunctionType, seen: set[int]) -> Iterator[Any]:
    written = {one.argval for one in _instructions(function.__code__) if one.opname in _WRITES}
    yield from _code_parts(function.__code__)
    yield from _constants(function.__defaults__ or (), seen)
    yield from _constants(sorted((function.__kwdefaults__ or {}).items()), seen)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        try:
            content = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
        if name not in written:
            yield from _constants([content], seen)
    for name in sorted(_names(function.__code__)):
        found = function.__globals__.get(name)
        if name in written or found is None:
            continue
        if isinstance(found, types.FunctionType | functools.partial) or _is_plain(found):
            same_module = getattr(found, "__module__", function.__module__) == function.__module__
            yield name
            if same_module or _is_plain(found):
                yield from _constants([found], seen)


def _code_parts(code: types.CodeType) -> Iterator[Any]:
    yield code.co_code
    yield (code.co_names, code.co_varnames, code.co_freevars, code.co_argcount, code.co_kwonlyargcount, code.co_flags)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code_parts(constant)
        else:
            yield sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant


def _instructions(code: types.CodeType) -> Iterator[dis.Instruction]:
    yield from dis.get_instructions(code)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _instructions(constant)


def _names(code: types.CodeType) -> set[str]:
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return {*code.co_names, *(name for names in inner for name in names)}


def _constants(values: Any, seen: set[int]) -> Iterator[Any]:
    for value in values:
        if _is_plain(value):
            yield sorted(map(repr, value)) if isinstance(value, frozenset) else value
        elif isinstance(value, tuple):
            yield from _constants(value, seen)
        elif callable(value):
            yield from _parts(value, seen)
        else:
            yield type(value).__qualname__


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | frozenset):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)
