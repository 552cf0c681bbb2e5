"""Signals told on a thread of their own: also while the main thread is inside one long computation."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable


class SignalWatch:
    """Calls `told` with the number of each signal that has a handler in Python, until it is closed.

    To be made and closed on the main thread. Python calls a handler only between two steps of its interpreter there;
    the wakeup descriptor is written to at once. Where another owns that already, nothing is told.
    """

    def __init__(self, told: Callable[[int], None]) -> None:
        self._told = told
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self.renew()
        threading.Thread(target=self._listen, name="mlx_nb signals", daemon=True).start()

    def _listen(self) -> None:
        with self._reader:
            while numbers := self._reader.recv(64):
                for number in numbers:
                    self._told(number)

    def renew(self) -> None:
        """Take the descriptor where nobody has it: who had it instead may have given it up."""
        owner = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        if owner not in (-1, self._writer.fileno()):
            signal.set_wakeup_fd(owner)

    def close(self) -> None:
        """Give the descriptor back, and end the thread."""
        owner = signal.set_wakeup_fd(-1)
        if owner != self._writer.fileno():
            signal.set_wakeup_fd(owner)
        self._writer.close()
