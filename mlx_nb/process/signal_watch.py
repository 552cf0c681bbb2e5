"""A thread that is notified of signals even while the main thread is inside one long computation."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable


class SignalWatch:
    """Calls `on_signal` with the number of each signal that has a Python handler, until it is closed.

    Create and close it on the main thread. Python runs a handler only between two bytecodes of that thread, but writes
    to the wakeup descriptor at once. If something else already uses that descriptor, nothing is reported.
    """

    def __init__(self, on_signal: Callable[[int], None]) -> None:
        self._on_signal = on_signal
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self.renew()
        threading.Thread(target=self._listen, name="mlx_nb signals", daemon=True).start()

    def _listen(self) -> None:
        with self._reader:
            while numbers := self._reader.recv(64):
                for number in numbers:
                    self._on_signal(number)

    def renew(self) -> None:
        """Take the descriptor if it is free: its previous user may have released it."""
        owner = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        if owner not in (-1, self._writer.fileno()):
            signal.set_wakeup_fd(owner)

    def close(self) -> None:
        """Release the descriptor and end the thread."""
        owner = signal.set_wakeup_fd(-1)
        if owner != self._writer.fileno():
            signal.set_wakeup_fd(owner)
        self._writer.close()
