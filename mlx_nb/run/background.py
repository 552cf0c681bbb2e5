"""Background training: an asyncio task on the kernel's event loop that does one step at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Iterator
from typing import Protocol

from mlx_nb.errors import CommandError
from mlx_nb.events import Event, Pause, Request
from mlx_nb.process.ipython import shell
from mlx_nb.train.interrupts import Interrupts

# With sleep(0) a click would wait for three or four steps: it takes several turns of the loop to arrive.
SECONDS_BETWEEN_EVENTS = 0.001


class Runnable(Protocol):
    """The interface of a run that background training needs."""

    name: str

    def drive(self, updates: int | None = None) -> Iterator[Event]:
        """Train for `updates` updates, or to the end, yielding events."""

    def request(self, request: Request) -> None:
        """Queue a request for the next boundary."""


_active: list[Runnable] = []
_interrupts: Interrupts | None = None


def _handle_interrupts() -> None:
    """From the end of the current kernel request on (a cell or a click), SIGINT pauses all active runs."""
    global _interrupts
    if _interrupts is None:
        _interrupts = Interrupts(_pause_active_runs)
        _interrupts.follow_request()
        if (ipython := shell()) is not None:
            # Between the last line of a cell and the end of its request the kernel cannot be interrupted.
            ipython.events.register("post_execute", hold_interrupts)


def hold_interrupts() -> None:
    """While any run is active, make SIGINT pause all active runs. Between cells the kernel would ignore it.

    Called again at each event, because a handler installed in a cell is removed when the cell ends.
    """
    if _interrupts is not None:
        _interrupts.__enter__()
        _interrupts.renew()


def _pause_active_runs(pause: Pause) -> None:
    for run in _active:
        run.request(pause)


def _deactivate(run: Runnable) -> None:
    global _interrupts
    if run in _active:
        _active.remove(run)
    if not _active and _interrupts is not None:
        _interrupts.__exit__(None, None, None)
        _interrupts = None
        if (ipython := shell()) is not None:
            ipython.events.unregister("post_execute", hold_interrupts)


class Background:
    """The background task of one run. Everything happens on the thread of the event loop."""

    def __init__(self, run: Runnable) -> None:
        self._run = run
        self._task: asyncio.Task[None] | None = None
        self._updates: int | None = None
        self._then: list[int | None] = []  # updates to do after the current requests are handled
        self.in_cell = False  # whether a waiting cell drives the run
        self._events: Iterator[Event] | None = None
        self._ended: Callable[[BaseException | None], None] = lambda error: None

    @property
    def active(self) -> bool:
        """Whether the run is active now."""
        return any(one is self._run for one in _active)

    @property
    def trains(self) -> bool:
        """Whether the run does updates, and does not only handle requests."""
        return self.active and (self._updates != 0 or bool(self._then))

    def start(self, updates: int | None = None, *, ended: Callable[[BaseException | None], None]) -> None:
        """Start training for `updates` updates (None = to the end). Returns immediately.

        A run that is handling requests finishes them first. `ended` is called at the end, with the error if there was
        one. Raises CommandError if no event loop is running, or if the run is training already.
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
        _handle_interrupts()
        self._updates, self._ended = updates, ended
        self._task = loop.create_task(self._pump(), name=f"mlx_nb {self._run.name}")

    async def _pump(self) -> None:
        me = asyncio.current_task()
        try:
            # Let the cell that started it finish its output first.
            await asyncio.sleep(SECONDS_BETWEEN_EVENTS)
            while self._task is me and self._advance() is not None:
                await asyncio.sleep(SECONDS_BETWEEN_EVENTS)
        except asyncio.CancelledError as error:
            if self._task is me:
                self._end(error)
            raise

    def _advance(self) -> Event | None:
        """The next event; None at the end, after `ended` has been called."""
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
        _deactivate(self._run)
        # An interrupt while rows were being read is a pause, not an error: training had not started.
        self._ended(None if isinstance(error, SystemExit | KeyboardInterrupt) else error)

    def drive_in_cell(self) -> Iterator[Event]:
        """Drive the run from a cell that waits for it, in place of the task, until the run is no longer active.

        The event loop does not run while a cell is executed. The first interrupt pauses the run, as between cells.
        """
        self.in_cell = True
        try:
            while self.active and (event := self._advance()) is not None:
                yield event
        finally:
            self.in_cell = False

    def stop(self) -> None:
        """Stop at the current boundary; the run is no longer active.

        Raises CommandError inside user code of the run, such as a reward function.
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
        """Wait until the run is no longer active. An interrupt or cancellation requests a pause and stops waiting."""
        task = self._task
        if task is None:
            return
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            self._run.request(Pause("interrupted"))
            raise
