"""What a run calls of a person's own: listeners, rewards, losses. The run goes on whatever they do, and obeys none."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mlx_nb.errors import CommandError
from mlx_nb.events import Event, Question

LISTENER, OWN_FUNCTION = "a listener", "a reward, a loss or another function of your own"


class OwnCalls:
    """Those of the run called `name`, from whichever thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._listeners: list[Callable[[Event], None]] = []
        self._reported: list[Callable[..., object]] = []  # listeners that raised
        self._calls: dict[int, str] = {}  # what each thread may be calling, by its number

    @contextmanager
    def calling(self, whom: str) -> Iterator[None]:
        """While inside, this thread is calling what a person wrote."""
        me = threading.get_ident()
        before = self._calls.get(me)
        self._calls[me] = whom
        try:
            yield
        finally:
            if before is None:
                self._calls.pop(me, None)
            else:
                self._calls[me] = before

    def refuse_inside(self, what: str) -> None:
        """Raise CommandError where this thread is calling a function of the person's, which calls the run again."""
        whom = self._calls.get(threading.get_ident())
        if whom is not None:
            raise CommandError(
                f"{self._name} cannot {what} from inside of {whom}. Look at it there (history, status, plot), or ask "
                f"for the next boundary: {self._name}.request(Pause()), Stop(), Save(), Evaluate()."
            )

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Call `listener` with every event from now on."""
        self._listeners.append(listener)

    def unlisten(self, listener: Callable[[Event], None]) -> None:
        """Call it no more."""
        for listeners in (self._listeners, self._reported):
            if listener in listeners:
                listeners.remove(listener)

    def tell(self, event: Event) -> None:
        """Call the listeners. One that raises is named once on stderr."""
        for listener in list(self._listeners):
            try:
                with self.calling(LISTENER):
                    listener(event)
            except Exception as error:
                self._report(listener, error)

    def give_text(self, question: Question, text: str, complete: bool) -> bool:
        """Hand out an answer; returns whether that is enough. What takes it may fail: training does not notice."""
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
            f"{type(error).__name__}: {error} (line {where.lineno} of {where.name}). Training goes on, and it is "
            "called again at the next event; this is said once.",
            file=sys.stderr,
        )
