"""Computes each check of a model once: results are kept by model, by the files it was loaded from, and on disk."""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import mlx.nn as nn

from mlx_nb.model.stored_checks import read_result, stored_file, write_result
from mlx_nb.model.trees import trained_arrays_of

_WORTH_STORING_SECONDS = 0.2
_MISSING = object()

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def once_per_model(
    good: Callable[[Any], bool], from_json: Callable[[Any], Any]
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Decorate a function of a model to cache its result by model and arguments, for the lifetime of the model.

    A `good` result also holds for every other model loaded from the same files (`register_files`), in this process
    and, if it took long to compute, in later ones (`stored_checks`): `from_json` makes it from what JSON gives back.
    Other results are computed again for such a model, because lack of memory may have caused them.
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        results: dict[tuple[Any, ...], tuple[weakref.ref[nn.Module], Result]] = {}
        of_files: dict[tuple[Any, ...], Result] = {}

        def cached(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            model: Any = args[0]
            key, files = (id(model), *args[1:]), _files_of(model)
            if key in results:
                return results[key][1]
            if files is not None and (files, *args[1:]) in of_files:
                return of_files[files, *args[1:]]
            name = f"{function.__module__}.{function.__qualname__}"
            stored = None if files is None else stored_file(model, files, name, args[1:])
            answer: Any = _MISSING if stored is None else _from_file(stored, good, from_json)
            if answer is _MISSING:
                begun = time.monotonic()
                with evaluating(model.modules()):
                    answer = function(*args, **kwargs)
                if stored is not None and good(answer) and time.monotonic() - begun > _WORTH_STORING_SECONDS:
                    write_result(stored, answer)
            results[key] = (weakref.ref(model, lambda _gone: results.pop(key, None)), answer)
            if files is not None and good(answer):
                of_files[files, *args[1:]] = answer
            result: Result = answer
            return result

        return cached

    return decorate


def _from_file(file: Path, good: Callable[[Any], bool], from_json: Callable[[Any], Any]) -> Any:
    """The result in a file, or `_MISSING`. A result that is not of the right form, or not good, counts as missing."""
    written = read_result(file)
    if written is None:
        return _MISSING
    try:
        answer = from_json(written["result"])
        is_of_its_form = json.loads(json.dumps(answer)) == written["result"]
        return answer if is_of_its_form and good(answer) else _MISSING
    except Exception:  # it may be anything
        return _MISSING


_files: dict[int, tuple[weakref.ref[nn.Module], Hashable]] = {}


def register_files(model: nn.Module, files: Hashable) -> None:
    """Register the files that a model was loaded from, and how. Models with equal `files` share cached results."""
    number = id(model)
    _files[number] = (weakref.ref(model, lambda _gone: _files.pop(number, None)), files)


def register_same_files(model: nn.Module, other: nn.Module) -> None:
    """Register that a model was loaded from the same files as `other`."""
    if (files := _files_of(other)) is not None:
        register_files(model, files)


def _files_of(model: nn.Module) -> Hashable | None:
    return _files[id(model)][1] if id(model) in _files else None


def trained_shapes(model: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Name and shape of each trained array."""
    return tuple((name, tuple(array.shape)) for name, array in trained_arrays_of(model))


@contextmanager
def evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """A context in which modules are in evaluation mode; each module's mode is restored afterwards."""
    training = [module for module in modules if module.training]
    for module in training:
        module._set_training_mode(False)
    try:
        yield
    finally:
        for module in training:
            module._set_training_mode(True)
