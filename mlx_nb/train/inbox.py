"""What was asked of a run and is not carried out yet, in the order it was asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from types import UnionType
from typing import Any, TypeVar

from mlx_nb.events import KEPT_REQUESTS, Request

Kind = TypeVar("Kind", bound=Request)


class Inbox:
    """Requests from any thread and from signal handlers, taken by the thread that trains.

    Only `append`, `popleft` and `extendleft` touch the deque: each is one step of the interpreter, so no lock is
    needed, which a signal handler could find taken by the very code that it interrupts.
    """

    def __init__(self) -> None:
        self._requests: deque[Request] = deque()

    def put(self, request: Request) -> None:
        """Add a request behind all others."""
        self._requests.append(request)

    def take(self, kind: UnionType) -> Iterator[Any]:
        """The requests of some kinds, each removed as it is given; ends when there are none."""
        while True:
            asked = self._drained()
            found = next((index for index, request in enumerate(asked) if isinstance(request, kind)), None)
            taken = [] if found is None else [asked.pop(found)]
            self._requests.extendleft(reversed(asked))
            if not taken:
                return
            yield taken[0]

    def drop(self, kind: type[Kind]) -> list[Kind]:
        """Remove the requests of a kind and return them; the others stay in order, before what is asked meanwhile."""
        asked = self._drained()
        self._requests.extendleft(reversed([request for request in asked if not isinstance(request, kind)]))
        return [request for request in asked if isinstance(request, kind)]

    def _drained(self) -> list[Request]:
        asked: list[Request] = []
        while True:
            try:
                asked.append(self._requests.popleft())
            except IndexError:
                return asked

    def kept(self) -> list[str]:
        """What is here, and stays, of the requests that a checkpoint keeps, as JSON lines."""
        return [request.to_json() for request in self._requests.copy() if isinstance(request, KEPT_REQUESTS)]

    def __contains__(self, kind: type[Request]) -> bool:
        return any(isinstance(request, kind) for request in self._requests.copy())
