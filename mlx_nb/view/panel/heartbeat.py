"""Signs of life from the kernel, so that a page does not go on saying "running" after the kernel has died.

They come from a thread: an update that takes minutes does not hold them up.
"""

from __future__ import annotations

import threading
import time
import weakref
from typing import Any, Protocol

SECONDS_BETWEEN_BEATS = 3.0


class Hearer(Protocol):
    """A widget whose page listens."""

    def send(self, content: Any, buffers: Any = None) -> None:
        """Send a message to the page."""


_hearers: weakref.WeakSet[Any] = weakref.WeakSet()
_lock = threading.Lock()
_thread: threading.Thread | None = None


def beat_for(hearer: Hearer) -> None:
    """Send it `{"kind": "beat"}` every few seconds, until it is gone or `no_beats_for` it."""
    global _thread
    with _lock:
        _hearers.add(hearer)
        if _thread is None:
            _thread = threading.Thread(target=_go_on, name="mlx_nb heartbeat", daemon=True)
            _thread.start()


def no_beats_for(hearer: Hearer) -> None:
    """Send it nothing any more."""
    with _lock:
        _hearers.discard(hearer)


def _go_on() -> None:
    global _thread
    while True:
        time.sleep(SECONDS_BETWEEN_BEATS)
        with _lock:
            if not _hearers:
                _thread = None
                return
        _beat()


def _beat() -> None:
    """One beat for each. Apart from the loop, so that nobody is kept alive while it waits."""
    with _lock:
        hearers = list(_hearers)
    for hearer in hearers:
        try:
            hearer.send({"kind": "beat", "seconds": SECONDS_BETWEEN_BEATS})
        except Exception:  # a display that fails never stops anything else
            no_beats_for(hearer)
