"""Tokenizing says how far it is, lets others have their turn, can be left and gone on with, and is not done twice."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from itertools import pairwise

import numpy as np
import pytest

from mlx_nb import Run, RunConfig
from mlx_nb.data.examples import tokenizing
from mlx_nb.events import Pause, Progress, RunPaused, StepCompleted
from mlx_nb.model import loading, shared_base
from mlx_nb.view.event_text import describe, progress_words
from tiny import tiny_rows


@pytest.fixture(autouse=True)
def a_sign_after_each_row(monkeypatch):
    monkeypatch.setattr(tokenizing, "SECONDS_BETWEEN_PIECES", 0.0)
    monkeypatch.setattr(tokenizing, "_kept", tokenizing.OrderedDict())
    monkeypatch.setattr(shared_base, "_live", {})


def rows_of(name, count=40):
    return [{**row, "source": name} for row in tiny_rows(count)]


def rows_run(folder, tiny_folder, **settings):
    values = {"model": str(tiny_folder), "batch_size": 4, "val_set_size": 0, "adapter_path": str(folder / "a")}
    return Run(RunConfig.from_dict({**values, **settings}))


def tokenizing_signs(events):
    return [event for event in events if isinstance(event, Progress) and event.what.startswith("tokenizing")]


def test_every_row_is_counted_and_the_words_have_the_pace(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, data=rows_of("counted"), iters=1)
    reported = tokenizing_signs(run.events())
    assert [event.done for event in reported if event.what == "tokenizing train"] == list(range(1, 41))
    assert {event.total for event in reported} == {40}
    assert describe(reported[0]) == progress_words(reported[0])
    words = progress_words(Progress(0, "tokenizing train", 12_000, 100_000, 1.5))
    assert words == "tokenizing train rows: 12,000 of 100,000, 8,000 rows a second"


@pytest.mark.parametrize("slow", ["model_folder", "load_tokenizer"])
@pytest.mark.matrix(every=2)
def test_others_have_their_turn_while_the_model_is_fetched_and_loaded(tmp_path, tiny_folder, monkeypatch, slow):
    real, turns, between = getattr(loading, slow), 0, {}

    def slowly(*arguments):
        between["begun"] = turns
        time.sleep(0.5)
        between["done"] = turns
        return real(*arguments)

    monkeypatch.setattr(loading, slow, slowly)
    run = rows_run(tmp_path, tiny_folder, data=rows_of("fetched"), iters=1)
    signs = []

    async def main():
        nonlocal turns
        run.listen(lambda event: signs.append(describe(event)) if isinstance(event, Progress) else None)
        run.start()
        while run.background.active:
            turns += 1
            await asyncio.sleep(0.001)

    asyncio.run(main())
    assert between["done"] - between["begun"] >= 4
    words = {"model_folder": "loading the model: files", "load_tokenizer": "loading the model: tokenizer"}[slow]
    assert signs.count(words) >= 4
    assert run.step_count == 1


def test_a_pause_while_the_model_is_loaded_takes_effect_and_continuing_loads_it(tmp_path, tiny_folder, monkeypatch):
    real = loading.load_tokenizer
    monkeypatch.setattr(loading, "load_tokenizer", lambda folder: time.sleep(0.3) or real(folder))
    run = rows_run(tmp_path, tiny_folder, data=rows_of("paused"), iters=1)
    for event in run.events():
        if isinstance(event, Progress) and event.what != "loading libraries":
            assert event.what == "loading tokenizer"
            run.request(Pause("asked"))
    assert event == RunPaused(0, "asked")
    assert not run.prepared
    assert run.step().step == 1


def test_others_have_their_turn_after_every_sign(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, data=rows_of("turns"), iters=1)
    turns, at_signs = 0, []

    def received(event):
        if isinstance(event, Progress) and event.what == "tokenizing train":
            at_signs.append(turns)

    async def main():
        nonlocal turns
        run.listen(received)
        run.start()
        while run.background.active:
            turns += 1
            await asyncio.sleep(0)

    asyncio.run(main())
    assert len(at_signs) == 40
    assert all(before < after for before, after in pairwise(at_signs))


@pytest.mark.parametrize("how", ["request", "signal"])
def test_a_pause_leaves_after_the_row_and_going_on_repeats_none(tmp_path, tiny_folder, how):
    run = rows_run(tmp_path, tiny_folder, data=rows_of(how), iters=3)
    events = []
    for event in run.events():
        events.append(event)
        if isinstance(event, Progress) and event.done == 7:
            if how == "request":
                run.request(Pause("asked"))
            else:
                with run.interrupts():
                    os.kill(os.getpid(), signal.SIGINT)
    assert isinstance(events[-1], RunPaused)
    assert events[-1].reason == ("asked" if how == "request" else "interrupted")
    assert [event.done for event in tokenizing_signs(events)] == list(range(1, 8))
    assert not run.prepared
    assert run.state == "paused"
    rest = list(run.events())
    assert [event.done for event in tokenizing_signs(rest)] == list(range(8, 41))
    whole = rows_run(tmp_path, tiny_folder, data=rows_of(how), iters=3, adapter_path=str(tmp_path / "whole"))
    whole.run()
    assert run.step_count == whole.step_count == 3
    assert run.adapter_bytes() == whole.adapter_bytes()


@pytest.mark.long
def test_the_same_rows_are_tokenized_once_and_others_again(tmp_path, tiny_folder):
    def signs_of(number, **settings):
        settings = {"data": rows_of("kept"), "iters": 1, **settings}
        run = rows_run(tmp_path, tiny_folder, adapter_path=str(tmp_path / str(number)), **settings)
        return len(tokenizing_signs(run.events())), run.inputs

    first, shared_inputs = signs_of(0)
    again, same = signs_of(1)
    assert (first, again) == (40, 0)
    for one, other in zip(shared_inputs.examples.train, same.examples.train, strict=True):
        assert np.array_equal(one.tokens, other.tokens)
        assert np.array_equal(one.loss_mask, other.loss_mask)
    assert shared_inputs.left_out == same.left_out
    assert signs_of(2, learning_rate=1e-3)[0] == 0
    assert signs_of(3, loss_on="all")[0] == 40
    assert signs_of(4, max_seq_length=30)[0] == 40
    assert signs_of(5, data=[*rows_of("kept", 39), rows_of("another")[0]])[0] == 40


def test_what_is_kept_is_bounded(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setattr(tokenizing, "MOST_KEPT", 1)
    run = rows_run(tmp_path, tiny_folder, data=rows_of("bounded"), iters=1)
    run.run()
    assert len(tokenizing._kept) <= 1
    assert sum(size for _, size in tokenizing._kept.values()) <= 1


@pytest.mark.parametrize("caller", ["trainer", "rows", "evaluate"])
@pytest.mark.matrix(every=3)
def test_who_asks_for_rows_while_they_are_tokenized_gets_them_and_the_run_continues(tmp_path, tiny_folder, caller):
    run = rows_run(tmp_path, tiny_folder, data=rows_of(f"between {caller}"), iters=2, val_set_size=8)
    events = run.events()
    assert isinstance(next(events), Progress)
    found = {
        "trainer": lambda: len(run.trainer.examples.train),
        "rows": lambda: len(run.rows("train")),
        "evaluate": lambda: 32 if run.evaluate().loss > 0 else 0,
    }[caller]()
    assert found == 32
    assert [event.step for event in events if isinstance(event, StepCompleted)] == [1, 2]
    assert run.trainer.examples is run.inputs.examples
