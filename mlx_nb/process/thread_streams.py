"""Destroys the mlx streams of a thread when the thread ends. Otherwise mlx may abort the process at exit."""

from __future__ import annotations

import sys
import threading


class _Ends:
    """An object of one thread, which Python collects on that thread when it ends."""

    def __del__(self) -> None:
        mlx = sys.modules.get("mlx.core")
        if mlx is not None and not sys.is_finalizing():
            mlx.clear_streams()


_of_thread = threading.local()


def end_streams_with_thread() -> None:
    """Destroy mlx's streams of the current thread when it ends; not those of the main thread, which mlx destroys.

    A thread that has computed and ended leaves them joinable, and then the process can end with `terminate called
    without an active exception` and status 134.
    """
    if threading.current_thread() is not threading.main_thread() and not hasattr(_of_thread, "ends"):
        _of_thread.ends = _Ends()
