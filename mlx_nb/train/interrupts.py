"""Turns SIGINT into a pause request, which is handled between two pieces of work and never raised inside one."""

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
    """A context in which the first SIGINT requests a pause, and the second one an immediate pause.

    `request` takes the Pause; `announce` is called at the first SIGINT to print a message. Inside another such context,
    or outside the main thread, it does nothing. The previous handler is restored. `count` is the number of SIGINTs.
    """

    def __init__(self, request: Callable[[Pause], None], announce: Callable[[], None] = lambda: None) -> None:
        self._request = request
        self._announce = announce
        self.count = 0
        self._before: Any = None

    def ignore(self) -> None:
        """Ignore SIGINT from now on: nothing is left to pause, and the output can be finished."""
        self._request, self._announce = lambda pause: None, lambda: None

    def __enter__(self) -> Interrupts:
        owner = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
        # A kernel may reinstall the handler of a context that has ended; such a handler is ignored.
        nested = isinstance(owner, Interrupts) and owner._before is not None
        if self._before is None and not nested and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def follow_request(self) -> None:
        """Install the handler when the kernel's current request ends, by replacing the handler that it will restore.

        Between requests the handler is installed now. Outside a kernel this does nothing.
        """
        kernel = _kernel()
        if kernel is None or self._before is not None:
            return
        if signal.getsignal(signal.SIGINT) == kernel.saved_sigint_handler:
            self.__enter__()
        else:
            self._before, kernel.saved_sigint_handler = kernel.saved_sigint_handler, self._handle

    def renew(self) -> None:
        """Install the handler again if something has replaced it, as a kernel does at the end of a cell."""
        if self._before is not None and signal.getsignal(signal.SIGINT) != self._handle:
            signal.signal(signal.SIGINT, self._handle)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before is not None:
            kernel, before = _kernel(), _in_force(self._before)
            if kernel is not None and kernel.saved_sigint_handler == self._handle:
                kernel.saved_sigint_handler = before
            if signal.getsignal(signal.SIGINT) == self._handle:
                signal.signal(signal.SIGINT, before)
            self._before = None

    def _handle(self, _signal: int, _frame: FrameType | None) -> None:
        if self._before is None:
            return
        self.count += 1
        # The signal may have interrupted a write to the same stream, which raises RuntimeError.
        with suppress(RuntimeError):
            if self.count == 1:
                self._announce()
        self._request(Pause("interrupted", at_once=self.count > 1))


def _in_force(handler: Any) -> Any:
    """The handler, or the one that is `in_place_of` it because the context that installed it has ended."""
    while (other := getattr(handler, "in_place_of", None)) is not None:
        handler = other
    return handler


def _kernel() -> Any:
    """The ipykernel, which installs a SIGINT handler for each request and removes it after; None elsewhere."""
    kernel = getattr(shell(), "kernel", None)
    main = threading.current_thread() is threading.main_thread()
    return kernel if main and hasattr(kernel, "saved_sigint_handler") else None


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """A context for changes in several steps: SIGINT is delayed, and raised as KeyboardInterrupt at its end."""
    with Interrupts(lambda pause: None) as interrupts:
        yield
    if interrupts.count:
        raise KeyboardInterrupt
