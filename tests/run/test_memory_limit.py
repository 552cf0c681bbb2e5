"""A run that cannot fit is refused before its model is loaded, and an update before it is computed."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

from mlx_nb import Run, cli
from mlx_nb.errors import ModelError, OutOfMemory
from mlx_nb.events import RunFailed, RunState
from runs import rows_run


def test_a_run_that_cannot_fit_is_refused_before_any_weight_is_read(tmp_path, tiny_folder, monkeypatch):
    def refuse(*_arguments, **_settings):
        raise AssertionError("a weight file was opened")

    run = rows_run(tmp_path, tiny_folder, memory_limit="100KB")
    monkeypatch.setattr(mx, "load", refuse)
    with pytest.raises(OutOfMemory, match=r"this run needs .* GB at its peak .* \(memory_limit\).*saves") as caught:
        list(run.load())
    assert "\n" not in str(caught.value)
    with pytest.raises(OutOfMemory, match="this run needs"):
        run.step()
    assert not run.prepared
    assert not (tmp_path / "a" / "checkpoints").exists()


def test_a_run_that_fits_is_not_refused(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, memory_limit="100MB")
    assert run.step().step == 1


def test_an_update_beyond_the_limit_is_refused_and_nothing_is_lost(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder)
    run.step(2)
    before = run.adapter_bytes()
    run.set(memory_limit="100KB")
    with pytest.raises(OutOfMemory, match=r"this update would need .* Its longest row is row \d+, of \d+ tokens"):
        run.step()
    failed = next(event for event in reversed(run.history.events) if isinstance(event, RunFailed))
    assert failed.rows
    assert failed.reason == "out of memory"
    assert run.state == RunState.FAILED
    assert run.adapter_bytes() == before
    run.checkpoint("pause")
    run.set(memory_limit="off")
    resumed = Run.resume(run.folder)
    assert resumed.step_count == 2
    assert resumed.adapter_bytes() == before


def test_without_a_limit_nothing_is_planned(tmp_path, tiny_folder, monkeypatch):
    from mlx_nb.train import memory_plan

    monkeypatch.setattr(memory_plan.MemoryPlanner, "peak", None)
    assert rows_run(tmp_path, tiny_folder, memory_limit="off").step().step == 1


@pytest.mark.long
def test_a_run_has_a_plan(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder)
    plan = run.plan("16GB")
    assert plan.fits
    assert plan.shape.tokens == run.config.max_seq_length
    assert plan.seconds is None
    run.step()
    after = run.plan("16GB")
    assert after.shape.tokens < plan.shape.tokens
    assert after.seconds > 0
    assert "it fits" in str(after)


@pytest.mark.long
def test_the_terminal_prints_a_plan(tmp_path, tiny_folder, capsys):
    assert cli.main(["plan", str(tiny_folder), "max_seq_length=64", "--memory", "16GB"]) == 0
    assert "largest batch_size that fits" in capsys.readouterr().out
    assert cli.main(["plan", str(tiny_folder), "max_seq_length=64", "--memory", "100KB"]) == 1
    assert "IT DOES NOT FIT" in capsys.readouterr().out
    assert cli.main(["plan", str(tiny_folder), "--memory", "lots"]) == 1
    assert "is not a size of memory" in capsys.readouterr().err


@pytest.mark.long
def test_a_plan_needs_only_config_json(tmp_path, tiny_folder, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((tiny_folder / "config.json").read_text())
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert cli.main(["plan", str(folder), "max_seq_length=64"]) == 0
    assert "parameters" in capsys.readouterr().out


def test_a_model_that_cannot_be_planned_is_trained_and_named(tmp_path, tiny_folder, monkeypatch):
    from mlx_nb.train.update_memory import UpdateMemory

    def fails(*_arguments):
        raise ModelError("the memory of this model cannot be planned: no such operation.")

    monkeypatch.setattr(UpdateMemory, "backward", fails)
    run = rows_run(tmp_path, tiny_folder, memory_limit="10KB")
    assert run.step().step == 1
    with pytest.raises(ModelError, match="cannot be planned"):
        run.plan()
