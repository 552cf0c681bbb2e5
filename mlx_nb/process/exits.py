"""The end of the process: a run that did updates since its last checkpoint writes one first, however the end comes.

At a normal end that is done by `atexit`. SIGTERM and SIGHUP, which a scheduler, a container or a kernel's manager sends
some seconds before it kills, pause the runs that move; once those are saved, or at once where none moves, the others
are saved too, and the signal does what it would have done without this. Where an update takes longer than there may be
time for, what was done until the last boundary is saved meanwhile, by another thread and from memory.
A function of the person's own that catches even what an interrupt raises cannot be ended: with that saved, the process
ends out of it.

The signals are taken when a run is made on the main thread, which alone may take them, and are given back when every
run is gone, or ended and saved.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from mlx_nb.errors import MlxNbError
from mlx_nb.events import Pause, Request
from mlx_nb.process.ipython import in_ipython
from mlx_nb.process.signal_watch import SignalWatch
from mlx_nb.process.turns import Turns

_PACKAGE = Path(__file__).parent.parent
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
# Until a boundary is reached; Jupyter kills a kernel 2.5 s after SIGTERM.
PATIENCE_SECONDS = 0.5
# For an update on another thread, when the process ends of itself.
LONGEST_WAIT_SECONDS = 30.0
LAST_BREATH_SECONDS = 0.1  # in which a thread that has nothing left to do ends


class Unsaved(Protocol):
    """What the end of a process needs of a run."""

    name: str

    @property
    def prepared(self) -> bool:
        """Whether model and rows are loaded."""

    @property
    def stuck(self) -> bool:
        """Whether a function of a person's own goes on although an interrupt struck it."""

    def request(self, request: Request) -> None:
        """Ask for something at the next boundary."""

    def save_unsaved(self) -> bool:
        """Write a checkpoint if updates were done since the last one; whether it did."""

    def save_last_boundary(self) -> bool:
        """The same for the last boundary, from memory, while an update is being computed."""

    @property
    def needs_saving(self) -> bool:
        """Whether something would be lost if the process ended now, or an update later."""

    @property
    def turns(self) -> Turns:
        """Which thread works with it."""


_runs: weakref.WeakSet[Unsaved] = weakref.WeakSet()
_computing: list[Unsaved] = []
_moving: list[tuple[int, Unsaved]] = []  # thread, run
_moved_by: set[int] = set()  # threads other than the main one that moved a run
_before: dict[int, Any] = {}
_asked: list[int] = []  # the signal that ends the process, once there was one
_saving: list[bool] = []  # not empty while all are being saved at the end
_watches: list[SignalWatch] = []  # the one there is


def join(run: Unsaved) -> None:
    """Take note of a run that was made. It is held weakly."""
    _runs.add(run)
    weakref.finalize(run, give_back).atexit = False
    _take_signals()


def _take_signals(anew: bool = False) -> None:
    """Take the signals that no handler of a person's answers by now, and `anew` those too. What is ignored stays so."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        now = signal.getsignal(number)
        # asyncio leaves the default behind when it gives up a signal, whoever had that before.
        others = now not in (signal.SIG_IGN, None, _handle)
        if now is signal.SIG_DFL or (others and (anew or number not in _before)):
            _before[number] = signal.signal(number, _handle)
    if _before and not _watches:
        _watches.append(SignalWatch(_save_meanwhile))
    for watch in _watches:
        watch.renew()


def live() -> list[Any]:
    """The runs that are still referred to."""
    return list(_runs)


@contextmanager
def moving(run: Unsaved) -> Iterator[None]:
    """While inside, this thread moves the run, or has control between two moves."""
    go_on_ending()
    _take_signals(anew=True)
    mine = (threading.get_ident(), run)
    _moving.append(mine)
    if threading.current_thread() is not threading.main_thread():
        _moved_by.add(mine[0])
    try:
        yield
    finally:
        with suppress(ValueError):  # a child that the run's code forked has forgotten it
            _moving.remove(mine)
    go_on_ending()
    give_back()


@contextmanager
def computing(run: Unsaved) -> Iterator[None]:
    """While inside, the run is between two boundaries, and a signal has it pause at the next one."""
    _take_signals()
    _computing.append(run)
    try:
        yield
    finally:
        with suppress(ValueError):
            _computing.remove(run)


def save_all(ending: bool = True) -> None:
    """Write a checkpoint of every run that did updates since its last one. What cannot be saved is said on stderr.

    Where the process is `ending`, no other thread works with a run any more once that is saved. A signal that comes
    meanwhile asks for what is being done; an interrupt ends the wait for other threads.
    """
    _saving.append(True)
    try:
        for run in _moved_elsewhere():
            run.request(Pause("the process ends", at_once=True))
            _save(run, run.save_last_boundary)
        until = time.monotonic() + LONGEST_WAIT_SECONDS
        for run in live():
            there = False
            with suppress(KeyboardInterrupt):
                there = run.turns.take(max(0.0, until - time.monotonic()))
            _save(run, run.save_unsaved if there else run.save_last_boundary)
            if there and not ending:
                run.turns.give_back()
        if ending:
            _wait_for_threads()
    finally:
        _saving.pop()


def _wait_for_threads() -> None:
    """Let threads that moved a run end first: one that frees arrays of mlx in an interpreter that is being taken down
    aborts the process. Python itself does not wait for that, nor for a thread whose `join` was interrupted. One that
    waits for a turn stays where it is.
    """
    until = time.monotonic() + PATIENCE_SECONDS
    ending = set(_moved_by)
    while time.monotonic() < until:
        ending = _moved_by - {thread for thread, run in list(_moving) if run.turns.awaited_by(thread)}
        if not ending & sys._current_frames().keys():
            break
        time.sleep(LAST_BREATH_SECONDS)
    if ending:
        time.sleep(LAST_BREATH_SECONDS)  # when it has no frame any more, its last arrays are freed


def _moved_elsewhere() -> list[Unsaved]:
    """The runs that other threads move."""
    return [run for thread, run in list(_moving) if thread != threading.get_ident() and run.prepared]


def _save(run: Unsaved, save: Callable[[], bool]) -> None:
    try:
        with _without_interrupts():
            save()
    except Exception as error:  # whatever it is, the other runs are still to be saved
        reason = error if isinstance(error, MlxNbError) else f"{type(error).__name__}: {error}"
        print(f"{run.name}: {reason}", file=sys.stderr)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """SIGINT has no effect while inside, on the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        if before is not None:  # which it is for a handler that is not Python's
            signal.signal(signal.SIGINT, before)


def _save_meanwhile(number: int) -> None:
    """On the thread of the watch: save what was done until the last boundary where no other is reached in time."""
    if number not in SIGNALS or signal.getsignal(number) is not _handle:
        return
    time.sleep(PATIENCE_SECONDS)
    for run in live():
        _save(run, run.save_last_boundary)
    if any(run.stuck for run in list(_computing)):
        signal.pthread_kill(threading.main_thread().ident or 0, number)  # whose handler ends the process


def go_on_ending() -> None:
    """At a boundary: end the process, if a signal asked for it. Raises SystemExit(128 + signal).

    IPython catches that in a cell, so there the signal is sent once more, with everything saved and nobody to catch it.
    On another thread it is sent once more to the main one, which may be waiting.
    """
    if not _asked:
        return
    number = _asked[0]
    if threading.current_thread() is not threading.main_thread():
        if not _computing and not _moving:
            signal.pthread_kill(threading.main_thread().ident or 0, number)
        return
    if callable(_before.get(number)):
        _pass_on(number)
    elif in_ipython():
        _end()
    else:
        raise SystemExit(128 + number)


def _pass_on(number: int) -> None:
    """Save all, then call who had the signal before; who may call this handler again, as it was there before."""
    before = _before.pop(number)
    _asked.clear()
    save_all(ending=False)
    try:
        before(number, None)
    finally:
        _before.setdefault(number, before)


def _handle(number: int, frame: FrameType | None) -> None:
    if _saving:
        return
    again = bool(_asked)
    _asked[:] = [number]
    training = list(dict.fromkeys([*(run for run in _computing if run.prepared), *_moved_elsewhere()]))
    for run in _computing:
        if run not in training:  # it has nothing to be saved, so nothing waits for it
            run.request(Pause(signal.Signals(number).name))
    if training and not again:
        for run in training:
            run.request(Pause(signal.Signals(number).name, at_once=True))
    elif training:
        if any(run.stuck for run in training):
            end_stuck(number)
    elif again or callable(_before.get(number)):
        go_on_ending()
    elif in_ipython() and not _is_ours(frame):
        _end()
    else:
        if (loop := _running_loop()) is not None:
            loop.call_soon(_end)  # a cell catches the SystemExit
        raise SystemExit(128 + number)


def end_stuck(number: int = signal.SIGINT) -> None:
    """End the process by a signal out of a function that lets no exception end it, saved as of the last boundary."""
    print(
        "A function of your own catches every interrupt, so this process ends here. What was done until the last "
        "update is saved.",
        file=sys.stderr,
    )
    for run in live():
        _save(run, run.save_last_boundary)
    _end_by(number)


def _end() -> None:
    save_all()
    _end_by(_asked[0])


def _end_by(number: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _is_ours(frame: FrameType | None) -> bool:
    """Whether code of this package is being run, which may have the model in a state of its own for a while."""
    while frame is not None:
        if Path(frame.f_code.co_filename).is_relative_to(_PACKAGE):
            return True
        frame = frame.f_back
    return False


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def give_back() -> None:
    """Once no run is left that has something to lose, the signals are as they were."""
    if _asked or _moving or threading.current_thread() is not threading.main_thread():
        return
    if any(run.needs_saving for run in live()):
        return
    for number, before in list(_before.items()):
        if signal.getsignal(number) is _handle:
            signal.signal(number, before)
    _before.clear()
    while _watches:
        _watches.pop().close()


def _in_child() -> None:
    """The runs are those of the process that was forked, which saves them itself."""
    for left in (_runs, _computing, _moving, _moved_by, _asked):
        left.clear()
    give_back()


atexit.register(save_all)
os.register_at_fork(after_in_child=_in_child)
