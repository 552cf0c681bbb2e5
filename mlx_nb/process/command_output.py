"""What a command prints: a log that cannot be written ends no training."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class CommandOutput:
    """Standard output of a command; every attribute but these is that of the stream.

    What cannot be written, as on a full disk, is said once on stderr and left out from then on. Where nobody reads any
    more BrokenPipeError is raised as ever. A process that was started without standard output writes nowhere.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or leave it out."""
        if self._stream is not None:
            with self._left_out():
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hand over what is buffered, or leave it out."""
        if self._stream is not None:
            with self._left_out():
                self._stream.flush()

    @contextmanager
    def _left_out(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            discard(self._stream)
            with suppress(OSError, AttributeError):
                print(f"mlx-nb: the output cannot be written ({error.strerror}); it goes on without.", file=sys.stderr)


def discard(*streams: Any) -> None:
    """Discard all further output of the streams, at exit as well."""
    with open(os.devnull, "w") as nowhere:
        for stream in streams:
            with suppress(OSError, ValueError, AttributeError):  # of a stream that is no file
                os.dup2(nowhere.fileno(), stream.fileno())
