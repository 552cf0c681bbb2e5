"""Cooperative work: a generator yields after each piece, so that cells and clicks are handled in between."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from mlx_nb.process.thread_streams import end_streams_with_thread

SECONDS_BETWEEN_PIECES = 0.04  # other cells of a notebook wait at most a few times this long

Piece = TypeVar("Piece")
Shown = TypeVar("Shown")
Result = TypeVar("Result")


def finished(work: Generator[Any, None, Result]) -> Result:
    """Run a generator of pieces to its end and return its result."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: Result = end.value
            return result


def relayed(
    work: Generator[Piece, None, Result],
    convert: Callable[[Piece], Shown],
    within: AbstractContextManager[object] | None = None,
) -> Generator[Shown, None, Result]:
    """Do `work`, each piece inside `within`, yielding what `convert` makes of what it yields; returns its result."""
    try:
        while True:
            with within or nullcontext():
                piece = next(work)
            yield convert(piece)
    except StopIteration as end:
        result: Result = end.value
        return result
    finally:
        work.close()


def on_thread(function: Callable[[], Result]) -> Generator[None, None, Result]:
    """Call `function` on a thread and yield until it is done; returns or raises what it does.

    Only for functions that make no mlx arrays that outlive the call: arrays belong to the thread that made them. If the
    generator is closed, the thread runs on and its result is dropped.
    """
    outcome: list[Callable[[], Result]] = []

    def call() -> None:
        end_streams_with_thread()
        try:
            result = function()
        except BaseException as error:
            caught = error

            def give() -> Result:
                raise caught
        else:

            def give() -> Result:
                return result

        outcome.append(give)

    thread = threading.Thread(target=call, name="mlx_nb loading", daemon=True)
    thread.start()
    thread.join(SECONDS_BETWEEN_PIECES)
    while thread.is_alive():
        yield
        thread.join(SECONDS_BETWEEN_PIECES)
    return outcome[0]()
