"""Heartbeats from the kernel, so that a page notices when the kernel has died.

A thread sends them, so an update that takes minutes does not delay them.
"""

from __future__ import annotations

import threading
import time
import weakref
from typing import Any, Protocol

SECONDS_BETWEEN_BEATS = 3.0


class Receiver(Protocol):
    """A widget that sends messages to its page."""

    def send(self, content: Any, buffers: Any = None) -> None:
        """Send a message to the page."""


_receivers: weakref.WeakSet[Any] = weakref.WeakSet()
_lock = threading.Lock()
_thread: threading.Thread | None = None


def start_beats(receiver: Receiver) -> None:
    """Send `{"kind": "beat"}` to the receiver every few seconds, until it is garbage-collected or `stop_beats`."""
    global _thread
    with _lock:
        _receivers.add(receiver)
        if _thread is None:
            _thread = threading.Thread(target=_run, name="mlx_nb heartbeat", daemon=True)
            _thread.start()


def stop_beats(receiver: Receiver) -> None:
    """Stop sending heartbeats to the receiver."""
    with _lock:
        _receivers.discard(receiver)


def _run() -> None:
    global _thread
    while True:
        time.sleep(SECONDS_BETWEEN_BEATS)
        with _lock:
            if not _receivers:
                _thread = None
                return
        _beat()


def _beat() -> None:
    """Send one heartbeat to each receiver. A function of its own, so the sleeping loop keeps no receiver alive."""
    with _lock:
        receivers = list(_receivers)
    for receiver in receivers:
        try:
            receiver.send({"kind": "beat", "seconds": SECONDS_BETWEEN_BEATS})
        except Exception:  # a display that fails never stops anything else
            stop_beats(receiver)
