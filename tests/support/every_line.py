"""Runs a piece of work and calls a function at a chosen line of the package, such as an interrupt or a deletion."""

from __future__ import annotations

import gc
import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import mlx_nb

PACKAGE = str(Path(mlx_nb.__file__).parent)


@contextmanager
def _tracing(at_line: Callable[[FrameType], None], where: str) -> Iterator[None]:
    """`at_line` is called before each line that this thread runs in files whose path begins with `where`.

    Not at the end of a `with`, which is traced as its first line once more: there Python looks for no signal, so that
    a lock is always given back. Garbage of earlier work is collected before, and none is during it: its finalizers
    would run lines that the next time are not there.
    """

    def trace(frame: FrameType, event: str, _: object):
        if not frame.f_code.co_filename.startswith(where):
            return None
        if event == "line" and not _ends_a_with(frame):
            at_line(frame)
        return trace

    before = sys.gettrace()
    gc.collect()
    gc.disable()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
        gc.enable()


def _ends_a_with(frame: FrameType) -> bool:
    code, line = frame.f_code, frame.f_lineno
    of_with = linecache.getline(code.co_filename, line).lstrip().startswith("with ")
    return of_with and frame.f_lasti > min(start for start, _, of_line in code.co_lines() if of_line == line)


def lines_of(work: Callable[[], object], where: str = PACKAGE) -> list[tuple[str, int]]:
    """Do `work`, and return (file, line) of each executed line in order."""
    lines: list[tuple[str, int]] = []
    with _tracing(lambda frame: lines.append((frame.f_code.co_filename, frame.f_lineno)), where):
        work()
    return lines


def places_of(lines: list[tuple[str, int]]) -> list[int]:
    """The numbers, from 1, of the first and the last visit to each different line."""
    first = {line: number for number, line in reversed(list(enumerate(lines, 1)))}
    last = {line: number for number, line in enumerate(lines, 1)}
    return sorted({*first.values(), *last.values()})


def at_line(number: int, act: Callable[[], object], work: Callable[[], object], where: str = PACKAGE) -> bool:
    """Do `work`, and call `act` before the executed line `number`. Returns whether it was reached."""
    reached = 0

    def count(_: FrameType) -> None:
        nonlocal reached
        reached += 1
        if reached == number:
            act()

    with _tracing(count, where):
        work()
    return reached >= number


def interrupted_at(number: int, work: Callable[[], object], where: str = PACKAGE) -> bool:
    """Do `work` until KeyboardInterrupt is raised before line `number`. Returns whether it was, and came out."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    try:
        at_line(number, interrupt, work, where)
    except KeyboardInterrupt:
        return True
    return False
