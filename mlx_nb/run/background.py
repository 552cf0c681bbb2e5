"""Training as one task on the kernel's main loop: a step at a time, and in between everything else gets its turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Iterator
from typing import Protocol

from mlx_nb.errors import CommandError
from mlx_nb.events import Event, Pause, Request
from mlx_nb.process.ipython import shell
from mlx_nb.train.interrupts import Interrupts

# One sleep(0) lets a click wait for three or four steps: a click takes several turns of the loop to arrive.
SECONDS_BETWEEN_EVENTS = 0.001


class Runnable(Protocol):
    """What the background needs of a run."""

    name: str

    def drive(self, updates: int | None = None) -> Iterator[Event]:
        """Move by `updates` updates, or to the end."""

    def request(self, request: Request) -> None:
        """Ask for something at the next boundary."""


_active: list[Runnable] = []
_interrupts: Interrupts | None = None


def _follow_request() -> None:
    """From the end of this request on, be it a cell or a click, SIGINT pauses all runs that move."""
    global _interrupts
    if _interrupts is None:
        _interrupts = Interrupts(_pause_all)
        _interrupts.follow_request()
        if (ipython := shell()) is not None:
            # What the kernel does between the last line of a cell and the end of its request cannot be interrupted.
            ipython.events.register("post_execute", hold_interrupts)


def hold_interrupts() -> None:
    """While any run moves, SIGINT pauses all that do. Between cells the kernel itself would ignore it.

    Said again at each event, because what was set in a cell is undone when the cell ends. Said in a cell, it is for
    the rest of that.
    """
    if _interrupts is not None:
        _interrupts.__enter__()
        _interrupts.renew()


def _pause_all(pause: Pause) -> None:
    for run in _active:
        run.request(pause)


def _left(run: Runnable) -> None:
    global _interrupts
    if run in _active:
        _active.remove(run)
    if not _active and _interrupts is not None:
        _interrupts.__exit__(None, None, None)
        _interrupts = None
        if (ipython := shell()) is not None:
            ipython.events.unregister("post_execute", hold_interrupts)


class Background:
    """The task that moves one run, if there is one. Everything happens on the thread of the loop."""

    def __init__(self, run: Runnable) -> None:
        self._run = run
        self._task: asyncio.Task[None] | None = None
        self._updates: int | None = None
        self._then: list[int | None] = []  # updates to move by, once what was asked is carried out
        self.in_cell = False  # whether a cell that waits moves it
        self._events: Iterator[Event] | None = None
        self._ended: Callable[[BaseException | None], None] = lambda error: None

    @property
    def active(self) -> bool:
        """Whether it moves the run now."""
        return any(one is self._run for one in _active)

    @property
    def trains(self) -> bool:
        """Whether it moves the run by updates, and not only to carry out what was asked."""
        return self.active and (self._updates != 0 or bool(self._then))

    def start(self, updates: int | None = None, *, ended: Callable[[BaseException | None], None]) -> None:
        """Begin to move the run by `updates` updates, or to its end; returns at once.

        A run that only carries out what was asked does so first. `ended` is called when it stops, with the error if
        there was one. Raises CommandError without a running event loop, and when the run trains already.
        """
        if self.active and not self.trains:
            self._then += [updates] if updates != 0 else []
            return
        if self.active:
            raise CommandError(f"{self._run.name} is running. `%finetune pause` stops it after this update.")
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise CommandError(
                f"{self._run.name} cannot train in the background here: no event loop is running. Use run.run()."
            ) from None
        _active.append(self._run)
        _follow_request()
        self._updates, self._ended = updates, ended
        self._task = loop.create_task(self._pump(), name=f"mlx_nb {self._run.name}")

    async def _pump(self) -> None:
        me = asyncio.current_task()
        try:
            # Let the cell that started it end first, and its output with it.
            await asyncio.sleep(SECONDS_BETWEEN_EVENTS)
            while self._task is me and self._advance() is not None:
                await asyncio.sleep(SECONDS_BETWEEN_EVENTS)
        except asyncio.CancelledError as error:
            if self._task is me:
                self._end(error)
            raise

    def _advance(self) -> Event | None:
        """The next event; None when the run stands still, which whoever started it has been told then."""
        try:
            hold_interrupts()
            if self._events is None:
                self._events = self._run.drive(self._updates)
            event = next(self._events, None)
            if event is None and self._then:
                self._updates = self._then.pop()
                self._events = self._run.drive(self._updates)
                event = next(self._events, None)
        except BaseException as error:
            self._end(error)
            if isinstance(error, asyncio.CancelledError | SystemExit):
                raise
            return None
        if event is None:
            self._end(None)
        return event

    def _end(self, error: BaseException | None) -> None:
        self._events = self._task = None
        self._then.clear()
        _left(self._run)
        # An interrupt that broke off the reading of rows is a pause: nothing has begun.
        self._ended(None if isinstance(error, SystemExit | KeyboardInterrupt) else error)

    def drive_in_cell(self) -> Iterator[Event]:
        """Move the run on in a cell that waits for it, in place of the task, until it stands still.

        While a cell is executed the loop has no turn. The first interrupt pauses the run, as between cells.
        """
        self.in_cell = True
        try:
            while self.active and (event := self._advance()) is not None:
                yield event
        finally:
            self.in_cell = False

    def stop(self) -> None:
        """Stop at the boundary where the run is, without waiting for another; it is active no more.

        Raises CommandError from inside of what the run is doing, such as a reward function.
        """
        if not self.active:
            return
        try:
            if isinstance(self._events, Generator):
                self._events.close()
        except ValueError:
            raise CommandError(f"{self._run.name} is in the middle of an update, so it cannot end here.") from None
        self._end(None)

    async def wait(self) -> None:
        """Until the run stops moving. An interrupt or a cancellation here asks the run to pause, and waits no more."""
        task = self._task
        if task is None:
            return
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            self._run.request(Pause("interrupted"))
            raise
