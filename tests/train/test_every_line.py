"""An interrupt at any line: what is done again afterwards is what it would have been."""

from __future__ import annotations

import hashlib
import os
import random
import signal
from contextlib import suppress

import mlx.nn
import pytest

from every_line import at_line, interrupted_at, lines_of, places_of
from lives import KINDS, namespace_of
from mlx_nb import Run
from mlx_nb.model.adapters import adapter_weights
from mlx_nb.model.shared_base import shared_copy
from runs import rows_run

MODULES = mlx.nn.__file__.removesuffix("__init__.py")


def made(kind, folder, model):
    settings = f"model: {model}\ndata: rows\niters: 4\n{KINDS[kind].settings}\nlearning_rate: 5e-3\nloss_spike: null\n"
    often = "grad_accumulation_steps: 2\nsteps_per_eval: 3\nsave_every: 2\n"
    return Run.from_yaml(f"{settings}{often}adapter_path: {folder}", namespace=namespace_of(kind))


def digest(run):
    weights = hashlib.sha256(b"".join(value for _, value in sorted(run.adapter_bytes().items()))).hexdigest()
    return weights, run.history["loss"], [event["loss"] for event in run.history.evaluations()]


def untouched(kind, tmp_path, model):
    run = made(kind, tmp_path / "whole", model)
    run.run()
    return digest(run)


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["lora", "full", "dpo", "grpo"])
def test_an_interrupt_at_any_line_while_a_run_is_made_changes_nothing(tmp_path, tiny_folder, kind):
    expected = untouched(kind, tmp_path, tiny_folder)
    counted = made(kind, tmp_path / "counted", tiny_folder)
    places = places_of(lines_of(lambda: counted.trainer))
    # Rows are read and the model is loaded in the first lines; attaching and taking the folder are the last.
    for place in {*random.Random(kind).sample(places, 12), *places[-400::20]}:
        run = made(kind, tmp_path / str(place), tiny_folder)
        if interrupted_at(place, lambda run=run: run.trainer):
            run.run()
            assert digest(run) == expected, place
            assert not list(tmp_path.glob(f"{place}.*")), "its own files were moved aside"


@pytest.mark.faults
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("kind", ["lora", "full", "grpo"])
def test_a_signal_at_any_line_of_a_run_changes_nothing(tmp_path, tiny_folder, kind, times):
    expected = untouched(kind, tmp_path, tiny_folder)

    def signals():
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)

    counted = made(kind, tmp_path / "counted", tiny_folder)
    places = places_of(lines_of(counted.run))
    for place in random.Random(f"{kind} {times}").sample(places, 20):
        run = made(kind, tmp_path / str(place), tiny_folder)
        with suppress(KeyboardInterrupt):
            reached = at_line(place, signals, run.run)
            assert not reached  # loading takes a line more or less, as the clock has it
        if not run.over:
            run.run()
        assert digest(run) == expected, place


@pytest.mark.long
def test_an_interrupt_at_any_line_of_sharing_a_base_leaves_the_run_that_has_it(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder)
    run.step()
    trained, answer = run.adapter_bytes(), run.generate("say red", base=True, max_tokens=4)
    for place in places_of(lines_of(lambda: shared_copy(run.loaded), MODULES)):
        assert interrupted_at(place, lambda: shared_copy(run.loaded), MODULES)
        assert run.adapter_bytes() == trained, place
    assert adapter_weights(shared_copy(run.loaded).model).keys().isdisjoint(trained)
    assert run.generate("say red", base=True, max_tokens=4) == answer


@pytest.mark.long
def test_an_interrupt_at_any_line_of_asking_the_base_leaves_the_adapter_attached(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder)
    run.step()
    trained = run.adapter_bytes()

    def ask():
        return run.generate("say red", base=True, max_tokens=2)

    answer = ask()
    for place in places_of(lines_of(ask, MODULES)):
        interrupted_at(place, ask, MODULES)
        assert run.adapter_bytes() == trained, place
    assert ask() == answer


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("where", ["mlx_nb.run.inputs.fingerprints", "mlx_nb.files.run_folder.RunFolder.begin"])
@pytest.mark.matrix(every=6)
def test_what_ends_the_making_of_a_run_once_its_adapter_is_attached_leaves_none(
    tmp_path, tiny_folder, monkeypatch, kind, where
):
    """The next one would be attached to it, and nobody would see that from its numbers alone."""
    settings = {"fine_tune_type": kind}
    run = rows_run(tmp_path, tiny_folder, **settings)
    names = {name for name, _ in run.model.named_modules()}

    def interrupted(*_arguments, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as changed:
        changed.setattr(where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            _ = run.trainer
    assert {name for name, _ in run.model.named_modules()} == names
    run.run()
    whole = rows_run(tmp_path, tiny_folder, adapter_path=str(tmp_path / "whole"), **settings)
    whole.run()
    assert run.adapter_bytes() == whole.adapter_bytes()


def test_an_adapter_is_attached_in_place_of_one_that_is_there(tmp_path, tiny_folder):
    from mlx_nb.model.adapters import attach_adapter

    run = rows_run(tmp_path, tiny_folder, lora_parameters={"rank": 2})
    attach_adapter(run.model, run.config)
    once = {name: array.shape for name, array in adapter_weights(run.model).items()}
    attach_adapter(run.model, run.config)
    assert {name: array.shape for name, array in adapter_weights(run.model).items()} == once != {}
