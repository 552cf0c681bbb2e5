"""Saving at process exit: every run with unsaved updates writes a checkpoint first, however the process ends.

A normal exit is handled by `atexit`. SIGTERM and SIGHUP, which a scheduler, container or kernel manager sends some
seconds before it kills, pause the active runs. Once those are saved (at once if none is active) the others are saved
too, and the signal then has its usual effect. If an update takes longer than the time that may be left, another thread
meanwhile saves the last boundary from memory. A user function that catches even interrupts cannot be ended: the last
boundary is saved and the process exits from inside that function.

The signal handlers are installed when a run is created on the main thread (only that thread may do so), and restored
when every run is gone, or has ended and is saved.
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
# Time to reach a boundary; Jupyter kills a kernel 2.5 s after SIGTERM.
PATIENCE_SECONDS = 0.5
# Time for an update on another thread to end when the process exits normally.
LONGEST_WAIT_SECONDS = 30.0
THREAD_END_SECONDS = 0.1  # time for a thread that has nothing left to do to end


class Unsaved(Protocol):
    """The interface of a run that saving at exit needs."""

    name: str

    @property
    def prepared(self) -> bool:
        """Whether model and rows are loaded."""

    @property
    def stuck(self) -> bool:
        """Whether a user function is still running although it was interrupted."""

    def request(self, request: Request) -> None:
        """Put a request; it is handled at the next boundary."""

    def save_unsaved(self) -> bool:
        """Write a checkpoint if there are updates since the last one. Returns whether it did."""

    def save_last_boundary(self) -> bool:
        """Save the last boundary from memory while an update is being computed.

        Returns whether there was anything to save.
        """

    @property
    def needs_saving(self) -> bool:
        """Whether something would be lost if the process ended now or one update later."""

    @property
    def turns(self) -> Turns:
        """The turns of the threads that work with the run."""


_runs: weakref.WeakSet[Unsaved] = weakref.WeakSet()
_computing: list[Unsaved] = []
_driving: list[tuple[int, Unsaved]] = []  # thread, run
_driver_threads: set[int] = set()  # threads other than the main one that have driven a run
_before: dict[int, Any] = {}
_ending_signals: list[int] = []  # the signal that ends the process, once one has come
_saving: list[bool] = []  # not empty while all runs are being saved at exit
_watches: list[SignalWatch] = []  # at most one


def register(run: Unsaved) -> None:
    """Register a new run. It is held by a weak reference."""
    _runs.add(run)
    weakref.finalize(run, restore_signals).atexit = False
    _install_handlers()


def _install_handlers(reinstall: bool = False) -> None:
    """Install our handlers for signals that have no user handler now; with `reinstall`, for all of them.

    Ignored ones stay ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        now = signal.getsignal(number)
        # asyncio restores the default handler when it releases a signal, whoever had it before.
        others = now not in (signal.SIG_IGN, None, _handle)
        if now is signal.SIG_DFL or (others and (reinstall or number not in _before)):
            _before[number] = signal.signal(number, _handle)
    if _before and not _watches:
        _watches.append(SignalWatch(_save_meanwhile))
    for watch in _watches:
        watch.renew()


def live_runs() -> list[Any]:
    """The runs that are still referenced."""
    return list(_runs)


@contextmanager
def driving(run: Unsaved) -> Iterator[None]:
    """A context in which this thread drives the run, or has control between two of its steps."""
    end_if_requested()
    _install_handlers(reinstall=True)
    entry = (threading.get_ident(), run)
    _driving.append(entry)
    if threading.current_thread() is not threading.main_thread():
        _driver_threads.add(entry[0])
    try:
        yield
    finally:
        with suppress(ValueError):  # a child process forked by the run's code has cleared it
            _driving.remove(entry)
    end_if_requested()
    restore_signals()


@contextmanager
def computing(run: Unsaved) -> Iterator[None]:
    """A context in which the run is between two boundaries; a signal then makes it pause at the next one."""
    _install_handlers()
    _computing.append(run)
    try:
        yield
    finally:
        with suppress(ValueError):
            _computing.remove(run)


def save_all(ending: bool = True) -> None:
    """Write a checkpoint of every run that has updates since its last one. Failures are reported on stderr.

    With `ending`, no other thread works with a run after it is saved. A signal that arrives meanwhile requests what is
    already being done; an interrupt ends the wait for other threads.
    """
    _saving.append(True)
    try:
        for run in _driven_elsewhere():
            run.request(Pause("the process ends", at_once=True))
            _save(run, run.save_last_boundary)
        until = time.monotonic() + LONGEST_WAIT_SECONDS
        for run in live_runs():
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
    """Let threads that drove a run end before the interpreter does.

    A thread that frees mlx arrays while the interpreter shuts down aborts the process. Python itself does not wait for
    that, nor for a thread whose `join` was interrupted. A thread that waits for a turn stays blocked.
    """
    until = time.monotonic() + PATIENCE_SECONDS
    ending = set(_driver_threads)
    while time.monotonic() < until:
        ending = _driver_threads - {thread for thread, run in list(_driving) if run.turns.awaited_by(thread)}
        if not ending & sys._current_frames().keys():
            break
        time.sleep(THREAD_END_SECONDS)
    if ending:
        time.sleep(THREAD_END_SECONDS)  # once it has no frame left, its last arrays are freed


def _driven_elsewhere() -> list[Unsaved]:
    """The runs that other threads drive."""
    return [run for thread, run in list(_driving) if thread != threading.get_ident() and run.prepared]


def _save(run: Unsaved, save: Callable[[], bool]) -> None:
    try:
        with _without_interrupts():
            save()
    except Exception as error:  # whatever it is, the other runs still have to be saved
        reason = error if isinstance(error, MlxNbError) else f"{type(error).__name__}: {error}"
        print(f"{run.name}: {reason}", file=sys.stderr)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """A context in which SIGINT has no effect on the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        if before is not None:  # it is None for a handler that was not installed from Python
            signal.signal(signal.SIGINT, before)


def _save_meanwhile(number: int) -> None:
    """On the watch thread: save the last boundary if no other is reached in time."""
    if number not in SIGNALS or signal.getsignal(number) is not _handle:
        return
    time.sleep(PATIENCE_SECONDS)
    for run in live_runs():
        _save(run, run.save_last_boundary)
    if any(run.stuck for run in list(_computing)):
        signal.pthread_kill(threading.main_thread().ident or 0, number)  # whose handler ends the process


def end_if_requested() -> None:
    """Called at a boundary: end the process if a signal requested it. Raises SystemExit(128 + signal).

    IPython catches SystemExit in a cell, so there the signal is sent again, with everything saved and no handler left.
    On another thread it is sent again to the main thread, which may be waiting.
    """
    if not _ending_signals:
        return
    number = _ending_signals[0]
    if threading.current_thread() is not threading.main_thread():
        if not _computing and not _driving:
            signal.pthread_kill(threading.main_thread().ident or 0, number)
        return
    if callable(_before.get(number)):
        _pass_on(number)
    elif in_ipython():
        _end()
    else:
        raise SystemExit(128 + number)


def _pass_on(number: int) -> None:
    """Save all, then call the previous handler, which may call this one again as it would have before."""
    before = _before.pop(number)
    _ending_signals.clear()
    save_all(ending=False)
    try:
        before(number, None)
    finally:
        _before.setdefault(number, before)


def _handle(number: int, frame: FrameType | None) -> None:
    if _saving:
        return
    again = bool(_ending_signals)
    _ending_signals[:] = [number]
    training = list(dict.fromkeys([*(run for run in _computing if run.prepared), *_driven_elsewhere()]))
    for run in _computing:
        if run not in training:  # it has nothing to save, so nothing waits for it
            run.request(Pause(signal.Signals(number).name))
    if training and not again:
        for run in training:
            run.request(Pause(signal.Signals(number).name, at_once=True))
    elif training:
        if any(run.stuck for run in training):
            end_stuck(number)
    elif again or callable(_before.get(number)):
        end_if_requested()
    elif in_ipython() and not _is_ours(frame):
        _end()
    else:
        if (loop := _running_loop()) is not None:
            loop.call_soon(_end)  # a cell would catch the SystemExit
        raise SystemExit(128 + number)


def end_stuck(number: int = signal.SIGINT) -> None:
    """End the process from inside a function that suppresses every exception, with the last boundary saved."""
    print(
        "A user-defined function catches every interrupt, so this process ends here. What was done until the last "
        "update is saved.",
        file=sys.stderr,
    )
    for run in live_runs():
        _save(run, run.save_last_boundary)
    _end_by(number)


def _end() -> None:
    save_all()
    _end_by(_ending_signals[0])


def _end_by(number: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _is_ours(frame: FrameType | None) -> bool:
    """Whether code of this package is running, which may have the model in a temporary state."""
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


def restore_signals() -> None:
    """Restore the signal handlers once no run is left that has something to lose."""
    if _ending_signals or _driving or threading.current_thread() is not threading.main_thread():
        return
    if any(run.needs_saving for run in live_runs()):
        return
    for number, before in list(_before.items()):
        if signal.getsignal(number) is _handle:
            signal.signal(number, before)
    _before.clear()
    while _watches:
        _watches.pop().close()


def _in_child() -> None:
    """In a forked child: the runs belong to the parent, which saves them itself."""
    for left in (_runs, _computing, _driving, _driver_threads, _ending_signals):
        left.clear()
    restore_signals()


atexit.register(save_all)
os.register_at_fork(after_in_child=_in_child)
