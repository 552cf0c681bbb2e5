"""A fork, and a run that was moved, say and write their own folder, however much is left for them to do."""

from __future__ import annotations

import shutil

import pytest

from folder_lives import make
from mlx_nb import Run
from mlx_nb.errors import CommandError
from mlx_nb.events import RunFinished, Stop
from mlx_nb.view.event_text import summary_text
from tiny import tiny_rows


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def finished(run):
    run.run()


def stopped(run):
    run.step(2)
    run.request(Stop())
    run.run()


def stopped_early(run):
    for event in run.events():
        if event.step == 2:
            break
    run.trainer.schedule.add(*run.trainer.planned_measurements.at_the_end("early stopping"))
    run.run()


def paused(run):
    run.step(2)


def shortened(run):
    run.step(2)


BEFORE = {finished: {}, stopped: {"iters": 2}, stopped_early: {"iters": 2}, paused: {"iters": 2}, shortened: {}}


@pytest.mark.parametrize("before", BEFORE, ids=lambda before: before.__name__)
@pytest.mark.matrix(every=5)
def test_a_fork_with_nothing_left_to_do_writes_its_own_adapter_and_names_it(before, here, tiny_folder):
    run = make(tiny_folder)
    before(run)
    files = {path: path.read_bytes() for path in (here / "adapters/run").rglob("*") if path.is_file()}
    fork = run.fork(name="mine", **BEFORE[before])
    ended = fork.run()
    assert isinstance(ended, RunFinished)
    assert ended.path == fork.history.finished.path == str(here / "adapters/mine")
    assert f"{here}/adapters/mine" in summary_text(fork.history, "")
    assert f"{here}/adapters/run" not in summary_text(fork.history, "")
    if before is not shortened:
        assert fork.adapter_bytes() == run.adapter_bytes()
        run.save("saved")
        saved = (here / "saved/adapters.safetensors").read_bytes()
        assert (here / "adapters/mine/adapters.safetensors").read_bytes() == saved
    if run.trainer.state.best_step:
        assert (here / "adapters/mine/best/adapters.safetensors").is_file()
    assert ended.step == fork.step_count
    assert [len(fork.history.evaluations(split)) for split in ("valid", "test")] == [
        len({row["step"] for row in fork.history.evaluations(split)}) for split in ("valid", "test")
    ]
    assert {path: path.read_bytes() for path in files} == files
    again = Run.resume("adapters/mine", data=tiny_rows())
    assert again.run().path == str(here / "adapters/mine")


def test_a_fork_of_a_finished_run_can_be_stepped_to_its_end_only(here, tiny_folder):
    run = make(tiny_folder)
    run.run()
    fork = run.fork()
    with pytest.raises(CommandError, match="no update is left"):
        fork.step()
    assert (here / "adapters/run-fork/adapters.safetensors").is_file()


@pytest.mark.long
def test_a_finished_run_that_was_moved_or_copied_names_the_folder_where_it_is(here, tiny_folder):
    make(tiny_folder, seed=1).run()
    make(tiny_folder, seed=2).run()
    shutil.copytree("adapters/run", "copy")
    for folder in ("adapters/run.previous-1", "copy"):
        run = Run.resume(folder, data=tiny_rows())
        assert run.run().path == str(here / folder)
        assert summary_text(run.history, "").splitlines()[-1].split() == ["adapter", str(here / folder)]


def test_a_run_that_moves_when_it_is_saved_elsewhere_names_that_folder(here, tiny_folder):
    run = make(tiny_folder)
    run.run()
    shutil.rmtree("adapters/run")
    make(tiny_folder, seed=2).run()
    run.save("mine")
    assert run.run().path == str(here / "mine")
    assert f"{here}/mine" in run.status()
