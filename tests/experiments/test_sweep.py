"""Sweeps: every run as it would be alone, on one base; halving, failures, interrupts and resume; what is shown."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_nb import Run, RunConfig, sweep
from mlx_nb.errors import CheckpointError, CommandError, ConfigError
from mlx_nb.events import StepCompleted
from mlx_nb.experiments.sweep_space import axes_of, points_of, settings_at
from mlx_nb.model.trees import held_arrays
from places import SUPPORT
from tiny import tiny_rows


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_NB_CACHE", str(tmp_path / "cache"))


def settings_of(folder, **settings):
    return {
        "model": str(folder),
        "data": tiny_rows(24),
        "iters": 4,
        "batch_size": 4,
        "val_set_size": 8,
        "steps_per_eval": 2,
        "learning_rate": [1e-4, 1e-2],
        "lora_parameters.rank": [2, 4],
        **settings,
    }


def test_a_list_that_is_no_value_of_a_setting_is_swept():
    axes, fixed = axes_of(
        {
            "learning_rate": [1e-5, 1e-4],
            "lora_parameters": {"rank": [8, 32], "keys": ["q_proj"]},
            "lora_parameters.scale": [10, 20],
            "metrics": ["exact_match"],
            "target_modules": [["q_proj"], ["v_proj"]],
            "iters": 3,
        }
    )
    assert axes == {
        "learning_rate": [1e-5, 1e-4],
        "lora_parameters.rank": [8, 32],
        "lora_parameters.scale": [10, 20],
        "target_modules": [["q_proj"], ["v_proj"]],
    }
    assert fixed == {"lora_parameters": {"keys": ["q_proj"]}, "metrics": ["exact_match"], "iters": 3}
    points = points_of(axes, None, 0)
    assert len(points) == 16
    assert settings_at(fixed, points[-1])["lora_parameters"] == {"keys": ["q_proj"], "rank": 32, "scale": 20}
    some = points_of(axes, 5, seed=1)
    assert len(some) == 5
    assert [one for one in points if one in some] == some
    assert some == points_of(axes, 5, seed=1) != points_of(axes, 5, seed=2)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"learning_rate": 1e-4}, ConfigError, "needs a setting with several values"),
        ({"learning_rate": []}, ConfigError, "has no values to try"),
        ({"learning_rate": [1e-4, 1e-4]}, ConfigError, "twice"),
        ({"learning_rate": [1e-4, "fast"]}, ConfigError, "learning_rate"),
        ({"learning_rat": [1e-4, 1e-3]}, ConfigError, "learning_rate"),
        ({"seed": list(range(300))}, ConfigError, "300 runs, more than 256"),
        ({"max_seq_length": [64, 128]}, CommandError, "not comparable"),
        ({"batch_size": [2, 4]}, CommandError, "`val_batches: -1`"),
        ({"fine_tune_type": "full", "learning_rate": [1e-4, 1e-3]}, CommandError, "Use lora or dora"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_loaded(settings, error, words):
    with pytest.raises(error, match=words):
        sweep(settings)


def test_runs_are_those_that_they_would_be_alone_bit_for_bit_on_one_base(tmp_path, tiny_folder):
    settings = settings_of(tiny_folder)
    found = sweep(settings, name="rates").run()
    assert [run.name for run in found.runs] == [f"rates-{number}" for number in (1, 2, 3, 4)]
    assert found.finished
    for trial in found.trials:
        values = {**settings, **trial.values, "lora_parameters": {"rank": trial.values["lora_parameters.rank"]}}
        del values["lora_parameters.rank"]
        alone = Run(RunConfig.from_dict({**values, "adapter_path": str(tmp_path / "alone")}), name="alone")
        alone.run()
        assert trial.run.history["loss"] == alone.history["loss"]
        assert trial.run.adapter_bytes() == alone.adapter_bytes()
        alone.release()
    frozen = [{id(array) for array in held_arrays(run.inputs.base_model)} for run in found.runs]
    assert all(one == frozen[0] for one in frozen)
    assert all(run.inputs.examples is found.runs[0].inputs.examples for run in found.runs)


@pytest.mark.long
def test_they_train_in_turns_and_the_best_by_validation_comes_first(tiny_folder):
    order = []
    found = sweep(settings_of(tiny_folder), name="rates")
    listened = {run.name: order.append for run in found.runs}
    for run in found.runs:
        run.listen(
            lambda event, name=run.name: (
                listened[name]((name, event.step)) if isinstance(event, StepCompleted) else None
            )
        )
    found.run()
    assert order == [(f"rates-{number}", step) for step in (1, 2, 3, 4) for number in (1, 2, 3, 4)]
    best = [min(row["loss"] for row in trial.run.history.evaluations("valid")) for trial in found.ranked]
    assert best == sorted(best)
    assert found.best is found.ranked[0].run
    assert found.best.config.learning_rate == 1e-2


@pytest.mark.long
def test_a_run_of_another_rendering_reads_its_own_rows(tiny_folder):
    settings = settings_of(tiny_folder, loss_on=["final", "assistant"], metrics=["exact_match"], metric_tokens=2)
    del settings["lora_parameters.rank"], settings["learning_rate"]
    found = sweep({**settings, "best_by": "exact_match", "iters": 1}).run()
    one, other = (run.inputs.examples for run in found.runs)
    assert one is not other


@pytest.mark.long
def test_halving_ends_the_worse_half_at_each_rung_and_says_its_budget_before(tiny_folder):
    settings = settings_of(tiny_folder, iters=8, learning_rate=[1e-5, 1e-4, 1e-3, 1e-2])
    del settings["lora_parameters.rank"]
    found = sweep(settings, name="rates", halving=True)
    assert found.rungs == [2, 4]
    assert found.budget == "rates: 4 runs on one base model, 16 updates; the worse half ends at update 2 and 4."
    found.run()
    assert sum(run.step_count for run in found.runs) == found.planned_updates == 16
    assert [trial.dropped_at for trial in found.trials] == [2, 2, 4, None]
    assert found.trials[-1].run.finished
    assert found.best is found.runs[-1]
    assert "dropped at 2" in repr(found)
    found.run()  # nothing is left
    assert sum(run.step_count for run in found.runs) == 16


def test_a_run_that_fails_is_left_out_with_its_reason(tiny_folder):
    settings = settings_of(tiny_folder, learning_rate=[1e-3, 1e30], loss_spike=None)
    del settings["lora_parameters.rank"]
    found = sweep(settings, name="rates").run()
    good, bad = found.trials
    assert good.run.finished
    assert bad.failure
    assert found.best is good.run
    assert math.isinf(bad.score())
    assert "failed: " in repr(found)


def interrupting(found, at):
    """A listener that sends SIGINT when `at` updates of all runs are done."""

    def listen(event):
        if isinstance(event, StepCompleted) and sum(run.step_count for run in found.runs) == at:
            os.kill(os.getpid(), signal.SIGINT)

    return listen


@pytest.mark.long
@pytest.mark.parametrize("at", [1, 6, 13])
def test_an_interrupt_saves_every_run_and_it_continues_here_or_from_the_folders(tiny_folder, at):
    settings = settings_of(tiny_folder)
    whole = sweep(settings, name="whole").run()
    found = sweep(settings, name="rates")
    with pytest.raises(KeyboardInterrupt, match="rates is paused, and saved"):
        found.run(interrupting(found, at))
    assert sum(run.step_count for run in found.runs) == at
    assert all(run.unsaved_updates <= 0 for run in found.runs if run.prepared)
    if at == 6:
        found.run()
    else:
        for run in found.runs:
            run.release()
        found = sweep(settings, name="rates", resume=True)
        assert sum(run.step_count for run in found.runs) == at
        found.run()
    assert [run.history["loss"] for run in found.runs] == [run.history["loss"] for run in whole.runs]
    assert [run.adapter_bytes() for run in found.runs] == [run.adapter_bytes() for run in whole.runs]
    assert [trial.best() for trial in found.trials] == [trial.best() for trial in whole.trials]


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
from mlx_nb import sweep
from mlx_nb.events import StepCompleted
from test_sweep import settings_of

found = sweep(settings_of({folder!r}, save_every=1), name="rates")

def listen(event):
    if isinstance(event, StepCompleted) and sum(run.step_count for run in found.runs) == 6:
        os.kill(os.getpid(), signal.SIGKILL)

found.run(listen)
"""


@pytest.mark.long
def test_a_killed_sweep_resumed_in_another_process_ends_bit_for_bit_the_same(tiny_folder):
    code = KILLED.format(path=[str(Path(__file__).parent), str(SUPPORT)], folder=str(tiny_folder))
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    whole = sweep(settings_of(tiny_folder, save_every=1), name="whole").run()
    found = sweep(settings_of(tiny_folder, save_every=1), name="rates", resume=True)
    assert 0 < sum(run.step_count for run in found.runs) <= 6
    found.run()
    assert [run.history["loss"] for run in found.runs] == [run.history["loss"] for run in whole.runs]
    assert [run.adapter_bytes() for run in found.runs] == [run.adapter_bytes() for run in whole.runs]


@pytest.mark.long
def test_a_resumed_halving_drops_the_same_runs(tiny_folder):
    settings = settings_of(tiny_folder, iters=8, learning_rate=[1e-5, 1e-4, 1e-3, 1e-2])
    del settings["lora_parameters.rank"]
    found = sweep(settings, name="rates", halving=True)
    with pytest.raises(KeyboardInterrupt):
        found.run(interrupting(found, 11))  # after the first rung
    for run in found.runs:
        run.release()
    found = sweep(settings, name="rates", halving=True, resume=True).run()
    assert [trial.dropped_at for trial in found.trials] == [2, 2, 4, None]
    assert [run.step_count for run in found.runs] == [2, 2, 4, 8]


@pytest.mark.long
def test_a_sweep_with_other_values_does_not_continue_the_runs_of_another(tiny_folder):
    for run in sweep(settings_of(tiny_folder), name="rates").run().runs:
        run.release()
    with pytest.raises(CheckpointError, match="learning_rate"):
        sweep(settings_of(tiny_folder, learning_rate=[1e-3, 1e-2]), name="rates", resume=True)


@pytest.mark.long
def test_seeds_repeat_each_point_and_the_mean_decides(tiny_folder):
    settings = settings_of(tiny_folder, seed=[0, 1], learning_rate=[1e-4, 1e-2])
    del settings["lora_parameters.rank"]
    found = sweep(settings, name="rates").run()
    assert [trial.values["learning_rate"] for trial in found.ranked] == [1e-2, 1e-2, 1e-4, 1e-4]
    assert "mean over seeds" in repr(found)
    assert " ± " in repr(found)


def test_without_validation_rows_nothing_is_trained(tiny_folder):
    settings = settings_of(tiny_folder, val_set_size=0)
    del settings["steps_per_eval"]
    found = sweep(settings, name="rates")
    with pytest.raises(CommandError, match="rates-1 has no validation rows"):
        found.run()


@pytest.mark.long
def test_it_shows_a_table_curves_a_heat_map_and_the_winner_as_a_cell(tiny_folder):
    found = sweep(settings_of(tiny_folder), name="rates")
    assert repr(found).splitlines()[0].split() == [
        "run",
        "learning_rate",
        "rank",
        "update",
        "training",
        "loss",
        "best",
        "validation",
        "loss",
        "state",
    ]
    with pytest.raises(CommandError, match="no run of rates has a validation yet"):
        _ = found.best
    found.run()
    lines = repr(found).splitlines()
    assert lines[1].startswith(found.best.name)
    assert lines[-1].startswith(f"best: {found.best.name} (learning_rate 0.01, rank ")
    assert "<img " in found._repr_mimebundle_()["text/html"]
    figure = found.plot()
    assert [axes.get_title() for axes in figure.axes[:2]] == ["rank 2", "rank 4"]
    assert [len(axes.get_lines()) for axes in figure.axes] == [2, 2, 2, 2]
    (axes,) = found.heat_map().axes
    assert {text.get_text() for text in axes.texts} == {f"{trial.best()[0]:.4f}" for trial in found.trials}
    cell = found.cell()
    assert cell.startswith("%%finetune --name rates-best\n")
    assert RunConfig.from_yaml(cell.partition("\n")[2]).learning_rate == 1e-2
    one = sweep(settings_of(tiny_folder, learning_rate=1e-3), name="ranks")
    with pytest.raises(CommandError, match="a heat map is of two settings"):
        one.heat_map()
