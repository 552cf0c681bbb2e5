"""SIGINT in a process: a pause at a boundary, a dropped update, and nothing else."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time

import pytest

from every_line import interrupted_at, lines_of, places_of
from mlx_nb import Run
from mlx_nb.errors import CommandError
from mlx_nb.events import EvaluationCompleted, Pause, Progress, RunPaused, RunStarted, StepCompleted
from mlx_nb.process import turns as turns_module
from mlx_nb.process.turns import Turns
from mlx_nb.run.inputs import RunInputs
from mlx_nb.train.interrupts import Interrupts
from runs import arrays_of, happened, rows_run, trainer_for
from tiny import tiny_rows


def interrupt(times=1):
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)


def test_the_first_asks_the_second_drops_and_the_handler_is_given_back():
    asked, said = [], []
    before = signal.getsignal(signal.SIGINT)
    with Interrupts(asked.append, lambda: said.append(1)):
        with Interrupts(lambda pause: pytest.fail("the inner one does nothing")):
            interrupt()
        interrupt(2)
    assert [pause.at_once for pause in asked] == [False, True, True]
    assert len(said) == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_nothing_is_installed():
    seen = []

    def inside():
        with Interrupts(lambda pause: None):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


# Of an update of three micro-batches each place is met once, and the next attempt goes through.
PLACES = {
    "first forward pass": (1, 5),
    "second micro-batch": (2, 6),
    "update that is computed": (4, 8),
    "validation": (1, 4),
    "save": (1, 4),
}


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.matrix(every=15)
def test_an_interrupt_at_any_place_loses_and_repeats_nothing(tmp_path, where, times):
    """Interrupted at every such place, the run says and computes the same as one that never was."""
    whole = trainer_for(tmp_path, "whole", save_every=5, iters=12)
    expected = list(whole.events())
    trainer = trainer_for(tmp_path, "broken", save_every=5, iters=12)
    calls = 0

    def poll():
        nonlocal calls
        calls += 1
        place, every = PLACES[where]
        if calls % every == place % every:
            for _ in range(times):
                trainer.request(Pause("interrupted", at_once=_ > 0))
        original()

    original, trainer.stepper.poll = trainer.stepper.poll, poll
    if where == "validation":
        trainer._poll, trainer.stepper.poll = poll, original
    if where == "save":
        real, trainer.stepper.poll = trainer._save, original

        def save(kind):
            for _ in range(times):
                trainer.request(Pause("interrupted", at_once=_ > 0))
            return real(kind)

        trainer._save = save
    events, pauses = [], 0
    for _ in range(200):
        part = list(trainer.events())
        pauses += isinstance(part[-1], RunPaused)
        events += part
        if trainer.finished:
            break
    assert pauses >= 2
    assert happened(events) == happened(expected)
    assert [type(event) for event in events if not isinstance(event, RunPaused | Progress)] == [
        type(one) for one in expected if not isinstance(one, Progress)
    ]
    assert arrays_of(trainer) == arrays_of(whole)


def test_a_real_signal_while_run_computes_pauses_it(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, iters=8, steps_per_eval=-1)
    run.step()
    real = run.trainer.stepper._gradients

    def gradients(*arguments):
        interrupt()
        return real(*arguments)

    run.trainer.stepper._gradients = gradients
    with pytest.raises(KeyboardInterrupt, match="paused after update 2"):
        run.run()
    ended = run.history.events[-1]
    assert isinstance(ended, RunPaused)
    assert (ended.reason, run.step_count, run.unsaved_updates) == ("interrupted", 2, 0)
    run.request(Pause("interrupted"))
    with pytest.raises(CommandError, match="paused before its next update: interrupted"):
        run.step()
    run.trainer.stepper._gradients = real
    run.run()
    whole = rows_run(tmp_path, tiny_folder, iters=8, steps_per_eval=-1, adapter_path=str(tmp_path / "whole"))
    whole.run()
    assert run.adapter_bytes() == whole.adapter_bytes()


def test_a_second_interrupt_while_the_only_pass_of_an_update_is_computed_drops_the_update(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, iters=4, steps_per_eval=-1)
    run.step()
    real = run.trainer.stepper._gradients

    def gradients(*arguments):
        interrupt(2)
        return real(*arguments)

    before = run.adapter_bytes()
    run.trainer.stepper._gradients = gradients
    with pytest.raises(KeyboardInterrupt, match="paused after update 1"):
        run.run()
    assert run.adapter_bytes() == before
    run.trainer.stepper._gradients = real
    run.run()
    whole = rows_run(tmp_path, tiny_folder, iters=4, steps_per_eval=-1, adapter_path=str(tmp_path / "whole"))
    whole.run()
    assert run.history["loss"] == whole.history["loss"]
    assert run.adapter_bytes() == whole.adapter_bytes()


@pytest.mark.long
def test_an_interrupt_while_loading_is_kept_and_a_second_gives_up(tmp_path, tiny_folder, monkeypatch):
    """Where the trainer is made nothing is broken off; the rows may be read by code that never ends."""
    place, times = "mlx_nb.run.run.Run._prepare", 1
    real = Run._prepare

    def interrupted(self, *arguments):
        interrupt(times)
        return real(self, *arguments)

    def paused(run):
        with monkeypatch.context() as changed:
            changed.setattr(place, interrupted)
            return [type(event) for event in run.events() if not isinstance(event, Progress)]

    for times in (1, 2, 3):
        run = rows_run(tmp_path, tiny_folder, adapter_path=str(tmp_path / str(times)))
        assert paused(run) == [RunPaused]
        kinds = [type(event) for event in run.events() if not isinstance(event, Progress)]
        assert kinds[:2] == [RunStarted, EvaluationCompleted]
        assert kinds.count(StepCompleted) == 6
    place, real, times = "mlx_nb.run.inputs.RunInputs.check", RunInputs.check, 2
    run = rows_run(tmp_path, tiny_folder, adapter_path=str(tmp_path / "rows"))
    with pytest.raises(KeyboardInterrupt):
        paused(run)
    assert not run.prepared
    kinds = [type(event) for event in run.events() if not isinstance(event, Progress)]
    assert kinds.count(StepCompleted) == 6


def test_a_failed_start_leaves_the_model_as_it_was_loaded(tmp_path, tiny_folder, monkeypatch):
    run = rows_run(tmp_path, tiny_folder)
    names = {name for name, _ in run.model.named_modules()}
    monkeypatch.setattr(
        "mlx_nb.train.trainer.TargetScorer", lambda *_of, **_as: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        _ = run.trainer
    assert {name for name, _ in run.model.named_modules()} == names
    monkeypatch.undo()
    run.run()
    whole = rows_run(tmp_path, tiny_folder, adapter_path=str(tmp_path / "whole"))
    whole.run()
    assert run.adapter_bytes() == whole.adapter_bytes()


class Endless(list):
    """A data set of a person's own may wait for a network; nothing but a signal ends that."""

    waits = True

    def __iter__(self):
        if self.waits:
            interrupt(2)
            pytest.fail("the second one did not strike here")
        return super().__iter__()


@pytest.mark.parametrize("where", ["in the foreground", "in the background"])
def test_rows_that_never_come_are_broken_off_by_a_second_interrupt(tmp_path, tiny_folder, where):
    rows = Endless(tiny_rows())
    run = Run.from_yaml(
        f"model: {tiny_folder}\ndata: rows\niters: 2\nadapter_path: {tmp_path / 'a'}", namespace={"rows": rows}
    )

    async def moved():
        run.start()
        await run

    def move():
        asyncio.run(moved()) if where == "in the background" else list(run.events())

    if where == "in the background":
        move()
    else:
        with pytest.raises(KeyboardInterrupt):
            move()
    assert not run.home.held
    assert run.state == "paused"
    rows.waits = False
    move()
    assert run.state == "finished"


def test_a_turn_that_was_broken_off_holds_up_neither_its_own_thread_nor_others():
    turns = Turns()
    for place in places_of(lines_of(lambda: take(turns), turns_module.__file__)):
        interrupted_at(place, lambda: take(turns), turns_module.__file__)
    begun = time.monotonic()
    turns.give_way()
    assert time.monotonic() - begun < turns_module.LONGEST_PAUSE
    other = threading.Thread(target=take, args=(turns,), daemon=True)
    other.start()
    other.join(30)
    assert not other.is_alive()


def take(turns):
    with turns.turn():
        pass


def test_one_that_waits_gets_its_turn_from_one_that_takes_one_after_another():
    turns, had, done = Turns(), [], threading.Event()

    def other():
        with turns.turn():
            had.append(rounds)
        done.set()

    rounds = 0
    thread = threading.Thread(target=other)
    while not done.is_set():
        with turns.turn():
            rounds += 1
            if rounds == 10:
                thread.start()
                time.sleep(0.05)  # it waits by now
        turns.give_way()
        assert rounds < 1000
    thread.join()
    assert had == [10]
