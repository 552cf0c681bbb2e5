"""Calls from a run into user code: listeners, rewards, losses. A listener that raises never stops the run."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mlx_nb.errors import CommandError
from mlx_nb.events import Event, Question

LISTENER, USER_FUNCTION = "a listener", "a reward, a loss or another function of yours"


class UserCalls:
    """The listeners of the run called `name`, and which threads are inside user code now."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._listeners: list[Callable[[Event], None]] = []
        self._reported: list[Callable[..., object]] = []  # listeners whose error was printed
        self._calls: dict[int, str] = {}  # thread id -> the kind of user code it is inside

    @contextmanager
    def calling(self, function: str) -> Iterator[None]:
        """A context in which this thread runs user code."""
        me = threading.get_ident()
        before = self._calls.get(me)
        self._calls[me] = function
        try:
            yield
        finally:
            if before is None:
                self._calls.pop(me, None)
            else:
                self._calls[me] = before

    def refuse_inside(self, what: str) -> None:
        """Raise CommandError if this thread is inside user code that calls back into the run."""
        function = self._calls.get(threading.get_ident())
        if function is not None:
            raise CommandError(
                f"{self._name} cannot {what} from inside {function}. There you can read it (history, status, plot) or "
                f"make a request for the next boundary: {self._name}.request(Pause()), Stop(), Save(), Evaluate()."
            )

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Add a listener; it is called with every event."""
        self._listeners.append(listener)

    def unlisten(self, listener: Callable[[Event], None]) -> None:
        """Remove a listener."""
        for listeners in (self._listeners, self._reported):
            if listener in listeners:
                listeners.remove(listener)

    def notify(self, event: Event) -> None:
        """Call the listeners with `event`. The first error of each is printed to stderr."""
        for listener in list(self._listeners):
            try:
                with self.calling(LISTENER):
                    listener(event)
            except Exception as error:
                self._report(listener, error)

    def send_text(self, question: Question, text: str, complete: bool) -> bool:
        """Pass text of an answer to the callback of `question`. Returns whether the callback wants no more.

        An error in the callback is printed and does not affect training.
        """
        with self.calling(LISTENER):
            try:
                return bool(question.on_text(text, complete))
            except Exception as error:
                self._report(question.on_text, error)
        return False

    def _report(self, listener: Callable[..., object], error: Exception) -> None:
        if listener in self._reported:
            return
        self._reported.append(listener)
        where = traceback.extract_tb(error.__traceback__)[-1]
        print(
            f"{self._name}: the listener {getattr(listener, '__qualname__', repr(listener))} raised "
            f"{type(error).__name__}: {error} (line {where.lineno} of {where.name}). Training continues, and the "
            "listener is called again at the next event; further errors of it are not printed.",
            file=sys.stderr,
        )
