"""The numbers of a run arrive at trackers under mlx-lm's names; the real packages read them, if installed."""

from __future__ import annotations

import sys
import time

import pytest

from mlx_nb import Run, RunConfig
from mlx_nb.errors import ConfigError
from mlx_nb.events import EvaluationCompleted, StepCompleted
from runs import rows_run

# A package in the place of wandb or trackio, which writes down what it is given.
RECORDER = """
CALLS = []
def init(**given):
    CALLS.append(("init", given))
    return sys.modules[__name__]
def log(numbers, step):
    CALLS.append((step, numbers))
def finish(status=None):
    CALLS.append(("finish", status))
import sys
"""


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    """Installs packages of these names that record what they are given, and returns the modules."""
    packages = tmp_path / "packages"
    packages.mkdir()
    monkeypatch.syspath_prepend(str(packages))

    def install(*names):
        for name in names:
            (packages / f"{name}.py").write_text(RECORDER)
            monkeypatch.delitem(sys.modules, name, raising=False)
        return [__import__(name) for name in names]

    yield install
    for name in ("wandb", "trackio"):
        if str(packages) in str(getattr(sys.modules.get(name), "__file__", "")):
            monkeypatch.delitem(sys.modules, name)


def test_each_update_and_validation_is_reported_under_the_names_of_mlx_lm(tmp_path, tiny_folder, recorder):
    wandb, trackio = recorder("wandb", "trackio")
    run = rows_run(tmp_path, tiny_folder, iters=3, report_to=["wandb", "trackio"], project_name="bees")
    run.run(until=2)
    run.rewind(1)
    run.run()
    (_, given), *calls, end = wandb.CALLS
    assert (given["project"], given["name"], given["config"]["iters"]) == ("bees", run.name, 3)
    assert given["id"] == run.home.run_id
    assert end == ("finish", 0)
    assert [step for step, _ in trackio.CALLS[1:-1]] == [step for step, _ in calls]
    trained = [(step, numbers) for step, numbers in calls if "train_loss" in numbers]
    steps = [event for event in run.history.events if isinstance(event, StepCompleted)]
    assert [(step, numbers["train_loss"]) for step, numbers in trained] == [(one.step, one.loss) for one in steps]
    assert [step for step, _ in trained] == [1, 2, 2, 3]
    mlx_lm = "train_loss learning_rate iterations_per_second tokens_per_second trained_tokens peak_memory"
    assert set(mlx_lm.split()) <= set(trained[0][1])
    assert trained[1][1]["trained_tokens"] == trained[2][1]["trained_tokens"]  # the update that was done again
    measured = [numbers["val_loss"] for _, numbers in calls if "val_loss" in numbers]
    assert measured == [one.loss for one in run.history.events if isinstance(one, EvaluationCompleted)]


def test_a_resumed_run_continues_its_report_and_its_count_of_tokens(tmp_path, tiny_folder, recorder):
    (wandb,) = recorder("wandb")
    run = rows_run(tmp_path, tiny_folder, iters=4, report_to="wandb")
    run.run(until=2)
    run.release()
    again = Run.resume(run.folder, config=run.config.replace(project_name="other"))
    again.run()
    first, second = [given for what, given in wandb.CALLS if what == "init"]
    assert first["id"] == second["id"]
    tokens = [numbers["trained_tokens"] for _, numbers in wandb.CALLS if "trained_tokens" in (numbers or ())]
    assert tokens == sorted(tokens)
    assert tokens[-1] == sum(again.history["target_tokens"])


def test_a_failing_tracker_does_not_stop_training_and_a_missing_one_is_named(
    tmp_path, tiny_folder, recorder, capsys, monkeypatch
):
    (wandb,) = recorder("wandb")
    wandb.log = lambda numbers, step: 1 / 0
    plain = rows_run(tmp_path, tiny_folder, iters=2, adapter_path=str(tmp_path / "plain"))
    plain.run()
    run = rows_run(tmp_path, tiny_folder, iters=2, report_to="wandb")
    run.run()
    assert run.adapter_bytes() == plain.adapter_bytes()
    assert "ZeroDivisionError" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "swanlab", None)  # as if it were not installed
    missing = rows_run(tmp_path, tiny_folder, iters=2, report_to="swanlab", adapter_path=str(tmp_path / "b"))
    with pytest.raises(ConfigError, match="needs a package that is not installed: `pip install swanlab`"):
        missing.run()
    with pytest.raises(ConfigError, match="Did you mean 'wandb'"):
        RunConfig(report_to="wanbd")
    with pytest.raises(ConfigError, match="`project_name` has no effect without `report_to`"):
        RunConfig(project_name="bees")


def test_a_callback_of_mlx_lms_shape_is_called_as_there(tmp_path, tiny_folder):
    from mlx_lm.tuner.callbacks import TrainingCallback

    class Seen(TrainingCallback):
        def __init__(self):
            self.train, self.val = [], []

        def on_train_loss_report(self, train_info):
            self.train.append(train_info)

        def on_val_loss_report(self, val_info):
            self.val.append(val_info)

    seen, run = Seen(), rows_run(tmp_path, tiny_folder, iters=3)
    run.listen(seen)
    run.run(until=2)
    run.unlisten(seen)
    run.run()
    assert [one["iteration"] for one in seen.train] == [1, 2]
    assert [one["train_loss"] for one in seen.train] == list(run.history["loss"])[:2]
    assert [one["iteration"] for one in seen.val] == [0, 2]


@pytest.mark.long
def test_tensorboard_reads_the_curves(tmp_path, tiny_folder, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    run = rows_run(tmp_path, tiny_folder, iters=3, report_to="tensorboard")
    run.run()
    read = EventAccumulator(str(tmp_path / "runs" / "mlx_nb" / run.name), size_guidance={"tensors": 0})
    read.Reload()
    import numpy as np
    from tensorboard.util.tensor_util import make_ndarray

    losses = [float(make_ndarray(one.tensor_proto)) for one in read.Tensors("train_loss")]
    np.testing.assert_allclose(losses, run.history["loss"], rtol=1e-6)


@pytest.mark.long
def test_mlflow_reads_the_curves_and_settings(tmp_path, tiny_folder, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    run = rows_run(tmp_path, tiny_folder, iters=3, report_to="mlflow", project_name="bees")
    run.run()
    client = mlflow.MlflowClient()
    (there,) = client.search_runs([client.get_experiment_by_name("bees").experiment_id])
    assert (there.info.run_name, there.info.status, there.data.params["iters"]) == (run.name, "FINISHED", "3")
    assert [one.value for one in client.get_metric_history(there.info.run_id, "train_loss")] == list(
        run.history["loss"]
    )


@pytest.mark.long
def test_wandb_takes_a_run_offline(tmp_path, tiny_folder, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = rows_run(tmp_path, tiny_folder, iters=3, report_to="wandb")
    run.run()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    for _ in range(100):  # a process of wandb's writes it
        if b"train_loss" in file.read_bytes():
            return
        time.sleep(0.1)
    raise AssertionError("wandb wrote no loss")
