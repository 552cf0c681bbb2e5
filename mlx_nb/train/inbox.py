"""What was asked of a run and is not carried out yet, in the order it was asked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import UnionType
from typing import Any, TypeVar

from mlx_nb.events import KEPT_REQUESTS, Request

Kind = TypeVar("Kind", bound=Request)


class Inbox:
    """Requests from any thread and from signal handlers, taken by the thread that trains.

    One by number, in the order they came. Adding one, a copy of all and removing one are each a single step of the
    interpreter, so no lock is needed, which a signal handler could find taken by the very code that it interrupts; and
    nobody ever finds fewer here than there are.
    """

    def __init__(self) -> None:
        self._requests: dict[int, Request] = {}
        self._number = itertools.count()

    def put(self, request: Request) -> None:
        """Add a request behind all others."""
        self._requests[next(self._number)] = request

    def take(self, kind: UnionType) -> Iterator[Any]:
        """The requests of some kinds, each removed as it is given; ends when there are none."""
        while (found := next((number for number, one in self._all() if isinstance(one, kind)), None)) is not None:
            request = self._requests.pop(found, None)
            if request is not None:  # nobody dropped it meanwhile
                yield request

    def drop(self, kind: type[Kind]) -> list[Kind]:
        """Remove the requests of a kind and return them."""
        dropped = [(number, request) for number, request in self._all() if isinstance(request, kind)]
        for number, _ in dropped:
            self._requests.pop(number, None)
        return [request for _, request in dropped]

    def _all(self) -> list[tuple[int, Request]]:
        return list(self._requests.copy().items())

    def kept(self) -> list[str]:
        """What is here, and stays, of the requests that a checkpoint keeps, as JSON lines."""
        return [request.to_json() for _, request in self._all() if isinstance(request, KEPT_REQUESTS)]

    def __contains__(self, kind: type[Request]) -> bool:
        return any(isinstance(request, kind) for _, request in self._all())
