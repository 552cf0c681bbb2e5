"""SIGINT while a run moves is a request like any other: read between two pieces of work, never raised inside one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

from mlx_nb.events import Pause
from mlx_nb.process.ipython import shell


class Interrupts:
    """While inside, the first SIGINT asks for a pause, and a second one for a pause at once.

    `ask` takes the Pause; `say` is called at the first one, to tell the person. Inside another one, or outside the
    main thread, it does nothing. The handler that was there is put back. `count` says how many came.
    """

    def __init__(self, ask: Callable[[Pause], None], say: Callable[[], None] = lambda: None) -> None:
        self._ask = ask
        self._say = say
        self.count = 0
        self._before: Any = None

    def ignore(self) -> None:
        """From now on SIGINT has no effect: there is nothing left to pause, only an output to finish."""
        self._ask, self._say = lambda pause: None, lambda: None

    def __enter__(self) -> Interrupts:
        owner = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
        # One that has ended may be put back by others, as by a kernel after a cell; it counts for nothing.
        nested = isinstance(owner, Interrupts) and owner._before is not None
        if self._before is None and not nested and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def follow_request(self) -> None:
        """Take the signal at the end of the kernel's request that is executed, where the kernel gives it back.

        Between requests, where a kernel ignores it, that is now. Elsewhere than in a kernel nothing happens.
        """
        kernel = _kernel()
        if kernel is None or self._before is not None:
            return
        if signal.getsignal(signal.SIGINT) == kernel.saved_sigint_handler:
            self.__enter__()
        else:
            self._before, kernel.saved_sigint_handler = kernel.saved_sigint_handler, self._handle

    def renew(self) -> None:
        """Take the signal again where others have taken it since, as a kernel does at the end of a cell."""
        if self._before is not None and signal.getsignal(signal.SIGINT) != self._handle:
            signal.signal(signal.SIGINT, self._handle)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before is not None:
            kernel = _kernel()
            if kernel is not None and kernel.saved_sigint_handler == self._handle:
                kernel.saved_sigint_handler = self._before
            if signal.getsignal(signal.SIGINT) == self._handle:
                signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _handle(self, _signal: int, _frame: FrameType | None) -> None:
        if self._before is None:
            return
        self.count += 1
        # What was being written when the signal came may not be written to now.
        with suppress(RuntimeError):
            if self.count == 1:
                self._say()
        self._ask(Pause("interrupted", at_once=self.count > 1))


def _kernel() -> Any:
    """The ipykernel that gives SIGINT to every request and takes it back at its end; None elsewhere."""
    kernel = getattr(shell(), "kernel", None)
    main = threading.current_thread() is threading.main_thread()
    return kernel if main and hasattr(kernel, "saved_sigint_handler") else None


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """SIGINT waits while inside, where a run is changed in several steps, and is raised as KeyboardInterrupt then."""
    with Interrupts(lambda pause: None) as interrupts:
        yield
    if interrupts.count:
        raise KeyboardInterrupt
