"""The queue of pending requests of a run, in order of arrival."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import UnionType
from typing import Any, TypeVar

from mlx_nb.events import KEPT_REQUESTS, Request

Kind = TypeVar("Kind", bound=Request)


class Inbox:
    """Requests from any thread and from signal handlers, taken by the thread that trains.

    Adding, copying and removing are each one atomic operation of the interpreter, so no lock is needed. A lock could
    deadlock: a signal handler may interrupt the very code that holds it.
    """

    def __init__(self) -> None:
        self._requests: dict[int, Request] = {}
        self._number = itertools.count()

    def put(self, request: Request) -> None:
        """Append a request."""
        self._requests[next(self._number)] = request

    def take(self, kind: UnionType) -> Iterator[Any]:
        """Remove and yield the requests of these kinds until none is left."""
        while (found := next((number for number, one in self._all() if isinstance(one, kind)), None)) is not None:
            request = self._requests.pop(found, None)
            if request is not None:  # not dropped by another thread meanwhile
                yield request

    def drop(self, kind: type[Kind]) -> list[Kind]:
        """Remove and return the requests of a kind."""
        dropped = [(number, request) for number, request in self._all() if isinstance(request, kind)]
        for number, _ in dropped:
            self._requests.pop(number, None)
        return [request for _, request in dropped]

    def _all(self) -> list[tuple[int, Request]]:
        return list(self._requests.copy().items())

    def kept(self) -> list[str]:
        """The pending requests that a checkpoint stores, as JSON lines. They stay in the queue."""
        return [request.to_json() for _, request in self._all() if isinstance(request, KEPT_REQUESTS)]

    def __contains__(self, kind: type[Request]) -> bool:
        return any(isinstance(request, kind) for _, request in self._all())
