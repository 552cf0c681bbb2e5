"""The learning-rate finder suggests a rate at which the loss falls, and leaves no trace, whenever it is interrupted."""

from __future__ import annotations

import math
import os
import random
import signal
import threading
import time

import numpy as np
import pytest

from mlx_nb.errors import CommandError
from mlx_nb.events import Progress
from mlx_nb.view.curves.rate_range import RateRange
from tiny import tiny_pairs, tiny_prompts
from traceless_runs import everything, rest_of, run_of


@pytest.mark.long
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.matrix(every=2)
def test_the_run_is_as_it_was_and_continues_with_the_same_bits(tmp_path, tiny_folder, kind):
    settings = {"fine_tune_type": kind} | ({"lora_parameters": {}} if kind == "full" else {})
    plain = run_of(tmp_path / "plain", tiny_folder, **settings)
    plain.step(2)
    expected = rest_of(plain)
    run = run_of(tmp_path / "found", tiny_folder, **settings)
    run.step(2)
    before = everything(run)
    found = run.lr_find(updates=25, lowest=1e-5)
    assert everything(run) == before
    assert found.suggestion is not None
    assert rest_of(run) == expected
    assert run.adapter_bytes() == plain.adapter_bytes()


@pytest.mark.parametrize("moment", range(10))
@pytest.mark.matrix(every=5)
def test_an_interrupt_at_any_moment_restores_everything(tmp_path, tiny_folder, moment):
    run = run_of(tmp_path, tiny_folder)
    run.step()
    before = everything(run)
    moments = random.Random(moment)
    # Moment 0 is before the first update, while the rows are measured; the others are at or inside one of the updates.
    at, seconds = (moments.randrange(1, 40) if moment else 0), moments.random() * 0.03
    begun = threading.Event()

    def on_event(event):
        if isinstance(event, Progress) and event.what == "learning rates" and event.done == at:
            begun.set()

    def interrupt():
        begun.wait()
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGINT)

    run.listen(on_event)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run.lr_find(updates=100, highest=1e-3)
    thread.join()
    assert everything(run) == before


@pytest.mark.long
def test_an_error_inside_the_ramp_restores_everything(tmp_path, tiny_folder, monkeypatch):
    run = run_of(tmp_path, tiny_folder)
    run.step()
    before = everything(run)
    original, calls = run.trainer.stepper.update, []

    def fails_at_the_fifth(*args, **options):
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError
        return original(*args, **options)

    monkeypatch.setattr(run.trainer.stepper, "update", fails_at_the_fifth)
    with pytest.raises(MemoryError):
        run.lr_find()
    assert everything(run) == before


@pytest.mark.long
def test_a_rate_far_too_high_ends_the_ramp(tmp_path, tiny_folder):
    found = run_of(tmp_path, tiny_folder).lr_find(lowest=1e-3, highest=1e6, updates=40)
    assert found.diverged
    assert len(found.changes) < 40
    assert "where the loss diverged" in found.words


@pytest.mark.long
def test_pairs_have_a_rate_too(tmp_path, tiny_folder):
    found = run_of(tmp_path, tiny_folder, method="dpo", data=tiny_pairs(24)).lr_find(updates=12, lowest=1e-4)
    assert len(found.changes) <= 12
    assert found.changes[0] == pytest.approx(0.0, abs=0.05)


@pytest.mark.long
def test_the_suggested_rate_trains_better_than_one_far_below_it(tmp_path, tiny_folder):
    run = run_of(tmp_path / "a", tiny_folder, lora_parameters={"rank": 4})
    rate = run.lr_find().suggestion
    losses = []
    for number, chosen in enumerate((rate, rate / 100)):
        other = run_of(tmp_path / str(number), tiny_folder, lora_parameters={"rank": 4}, learning_rate=chosen, iters=20)
        other.run()
        losses.append(other.evaluate().loss)
    assert losses[0] < losses[1] - 0.2


def test_a_method_that_samples_is_refused(tmp_path, tiny_folder):
    settings = {"method": "grpo", "data": tiny_prompts(12), "rewards": ["exact_match"], "lora_parameters": {"rank": 4}}
    run = run_of(tmp_path, tiny_folder, max_completion_length=3, **settings)
    with pytest.raises(CommandError, match="compares losses of rows"):
        run.lr_find()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lowest": 0}, "lowest must be a learning rate above 0"),
        ({"highest": "big"}, "highest must be a learning rate above 0"),
        ({"lowest": 1e-3, "highest": 1e-4}, "must be below highest"),
        ({"updates": 3}, "10 or more"),
    ],
)
def test_rates_that_make_no_ramp_are_refused(tmp_path, tiny_folder, arguments, words):
    with pytest.raises(CommandError, match=words):
        run_of(tmp_path, tiny_folder).lr_find(**arguments)


def test_the_suggestion_is_a_tenth_of_the_rate_of_the_lowest_loss():
    rates = [10 ** (k / 10 - 6) for k in range(61)]
    changes = [-math.exp(-(((k - 40) / 10) ** 2)) for k in range(61)]
    found = RateRange(rates, changes, False)
    assert found.best == 40
    assert found.suggestion == pytest.approx(1e-3)
    figure = found.figure()
    assert figure.axes[0].get_title(loc="right") == "suggested: 0.001"
    assert found._repr_mimebundle_()["image/png"][:4] == b"\x89PNG"


def test_a_loss_that_does_not_fall_suggests_nothing():
    noise = np.random.default_rng(0).normal(0, 0.1, 40).tolist()
    found = RateRange([10 ** (k / 10 - 6) for k in range(40)], [abs(one) for one in noise], False)
    assert found.suggestion is None
    assert "did not fall" in found.words
    assert RateRange([1e-6], [math.nan], True).suggestion is None
