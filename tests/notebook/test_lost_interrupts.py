"""An interrupt that Python drops in a finalizer is noticed, and the handler of before is given back in every order."""

from __future__ import annotations

import os
import signal

import pytest

from mlx_nb.notebook import lost_interrupts
from mlx_nb.notebook.lost_interrupts import NotingHandler, interrupts_noted, raise_lost_interrupt
from mlx_nb.train.interrupts import Interrupts


@pytest.fixture(autouse=True)
def no_context_is_open(monkeypatch):
    """As in a new process: a test that raises at every line may leave a context open."""
    monkeypatch.setattr(lost_interrupts, "_current", None)


class Garbage:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(1000))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_dropped_in_a_finalizer_is_raised_afterwards_and_only_in_its_context():
    with interrupts_noted():
        raise_lost_interrupt()
        Garbage()
        with pytest.raises(KeyboardInterrupt):
            raise_lost_interrupt()
    raise_lost_interrupt()
    with interrupts_noted():
        raise_lost_interrupt()


def test_the_handler_of_before_is_given_back_whichever_context_ends_last():
    before = signal.getsignal(signal.SIGINT)
    inner = Interrupts(lambda pause: None)
    with interrupts_noted():
        inner.__enter__()  # a run that trains on in the background after the cell
    assert signal.getsignal(signal.SIGINT) == inner._handle
    inner.__exit__(None, None, None)
    assert signal.getsignal(signal.SIGINT) is before
    with interrupts_noted():
        left = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, left)  # as an interrupt in the last lines of the context leaves it
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with inner, interrupts_noted(), interrupts_noted():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            raise_lost_interrupt()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_while_a_context_ends_leaves_none_open(monkeypatch):
    before = signal.getsignal(signal.SIGINT)

    def broken_off(handler):
        raise KeyboardInterrupt

    monkeypatch.setattr(NotingHandler, "end", broken_off)
    context = interrupts_noted()
    context.__enter__()
    try:
        lost_interrupts._current.came = True
        with pytest.raises(KeyboardInterrupt):
            context.__exit__(None, None, None)
        raise_lost_interrupt()  # nothing was lost outside of a context
    finally:
        signal.signal(signal.SIGINT, before)
