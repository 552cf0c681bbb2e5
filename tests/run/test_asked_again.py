"""What was asked and was not done yet is part of a checkpoint: a resumed run does it, or says that it cannot."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import threading

from history_runs import new_run, resume
from mlx_nb.events import BatchSkipped, ChangeSetting, EvaluationCompleted, Rewind, Rewound, SettingChanged, Skip
from tiny import tiny_rows


def kinds(history):
    return [type(event) for event in history.events]


def test_a_setting_that_was_to_change_changes_after_the_resume_too(tmp_path, tiny_folder):
    run = new_run(tmp_path / "a", tiny_folder, learning_rate=1e-3)
    config = run.config

    async def set_while_it_moves():
        run.start()
        while run.step_count < 2:
            await asyncio.sleep(0.001)
        run.set(learning_rate=1e-2)
        run.checkpoint()
        at = run.step_count
        run.background.stop()
        return at

    at = asyncio.run(set_while_it_moves())
    # The settings that it began with are those of the cell: that is no change.
    shutil.copytree(run.folder, tmp_path / "b")
    resumed = resume(tmp_path / "b", config=config)
    assert resumed.config.learning_rate == 1e-2
    changes = [event for event in resumed.history.events if isinstance(event, SettingChanged)]
    assert [dataclasses.replace(event, note="") for event in changes] == [
        SettingChanged(at, "learning_rate", 1e-3, 1e-2)
    ]
    run.step()
    resumed.step()
    assert resumed.history.last_step.learning_rate == run.history.last_step.learning_rate > 5e-3
    assert resumed.adapter_bytes() == run.adapter_bytes()


def test_a_rewind_that_was_requested_is_done_after_a_resume(tmp_path, tiny_folder):
    run = new_run(tmp_path / "a", tiny_folder)
    run.step(2)
    run.checkpoint()
    run.step(2)
    run.request(Rewind(2))
    run.checkpoint()
    resumed = resume(run.folder)
    resumed.step()
    assert resumed.step_count == 3
    assert [event for event in resumed.history.events if isinstance(event, Rewound)] == [Rewound(2, 4, 3)]


def test_a_rewind_to_an_update_that_is_not_kept_is_named_as_lost(tmp_path, tiny_folder):
    run = new_run(tmp_path / "a", tiny_folder)
    run.step(4)
    run.request(Rewind(2))
    run.checkpoint()
    resumed = resume(run.folder)
    (note,) = [note for note in resumed.trainer.notes if "dropped" in note]
    assert "rewind to update 2: update 2 was not kept" in note
    assert "\n" not in note
    assert resumed.step().step == 5


def test_what_is_asked_during_an_update_is_part_of_what_is_saved_of_the_boundary_before_it(tmp_path, tiny_folder):
    run = new_run(tmp_path / "a", tiny_folder, learning_rate=1e-3)
    config = run.config
    run.step(2)
    real = run.trainer.stepper.update

    def update(*arguments, **options):
        run.request(ChangeSetting("learning_rate", 1e-2))
        run.request(Skip())
        saver = threading.Thread(target=run.save_last_boundary)
        saver.start()
        saver.join()
        return real(*arguments, **options)

    run.trainer.stepper.update = update
    run.step()
    resumed = resume(run.folder, config=config, step=2)
    assert resumed.step().learning_rate > 9e-3
    assert kinds(resumed.history)[-3:-1] == [SettingChanged, BatchSkipped]


def test_a_boundary_is_saved_with_the_settings_and_the_events_of_its_own(tmp_path, tiny_folder):
    run = new_run(tmp_path / "a", tiny_folder, learning_rate=1e-3, val_set_size=4, steps_per_eval=-1)
    run.step(2)
    run.evaluate()
    run.set(learning_rate=1e-2)
    assert run.save_last_boundary()
    assert not run.save_last_boundary()
    resumed = resume(run.folder)
    assert resumed.step_count == 2
    assert resumed.config.learning_rate == 1e-3
    assert kinds(resumed.history) == kinds(run.history)[:-2]
    assert EvaluationCompleted in kinds(run.history)[-2:]


def test_a_cell_that_resumes_says_what_is_lost_and_which_checkpoint_was_passed_over(shell, tiny_folder, capsys):
    shell.user_ns["rows"] = tiny_rows(24)
    cell = f"model: {tiny_folder}\ndata: rows\niters: 9\nval_set_size: 0\nsave_every: -1\n"
    shell.run_cell_magic("finetune", "--paused -o run", cell)
    run = shell.user_ns["run"]
    run.step(3)
    run.request(Rewind(1))
    saved = run.checkpoint()
    shutil.copytree(saved, saved.with_name("save-0009-step-0000009-step"))
    shell.user_ns["run"] = run = None
    capsys.readouterr()
    shell.run_cell_magic("finetune", "--paused --resume -o run", cell)
    shown = capsys.readouterr().out
    assert "run continues from update 3." in shown
    assert "rewind to update 1: update 1 was not kept" in shown
    assert "save-0009-step-0000009-step: the folder was renamed" in shown
