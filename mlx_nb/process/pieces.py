"""Work that is done in pieces: a generator gives way after each, so that cells and clicks have their turn."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from typing import Any, TypeVar

SECONDS_BETWEEN_PIECES = 0.04  # other cells of a notebook wait at most a few times this long

Result = TypeVar("Result")


def finished(work: Generator[Any, None, Result]) -> Result:
    """The result of work in pieces, done at once."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: Result = end.value
            return result


def on_thread(function: Callable[[], Result]) -> Generator[None, None, Result]:
    """Call `function` on a thread and give way until it is done; returns or raises what it does.

    Only for what makes no mlx arrays that outlive it: they belong to the thread that made them. When the work is
    dropped the thread goes on, and its result is lost.
    """
    outcome: list[Callable[[], Result]] = []

    def call() -> None:
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
