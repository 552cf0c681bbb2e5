"""Sweeps from cells: lists of values, the table, the winner as the next cell, interrupt and resume."""

from __future__ import annotations

import os
import signal

import pytest

from mlx_nb.errors import CommandError
from mlx_nb.events import StepCompleted
from tiny import tiny_rows


@pytest.fixture
def ready(shell, tiny_folder):
    """The shell with rows, and the body of a sweep over them."""
    shell.user_ns["my_rows"] = tiny_rows()
    rows = "data: my_rows\nval_set_size: 6\nsteps_per_eval: 2\niters: 2"
    return shell, f"model: {tiny_folder}\n{rows}\nlearning_rate: [1e-4, 1e-2]\nlora_parameters.rank: [2, 4]"


def test_a_cell_with_lists_trains_all_and_the_best_becomes_the_current_run(ready, capsys, monkeypatch):
    shell, body = ready
    shell.run_cell(f"%%finetune --sweep --name rates -o rates\n{body}").raise_error()
    said = capsys.readouterr().out
    assert said.startswith("rates: 4 runs on one base model, 8 updates.")
    found = shell.user_ns["rates"]
    assert f"best: {found.best.name} (learning_rate 0.01, rank" in said
    assert found.finished
    lines = str(shell.run_cell("%finetune runs").result).splitlines()
    assert len(lines) == 5
    assert next(line for line in lines if line.startswith("→")).split()[1] == found.best.name
    assert shell.run_cell("%finetune sweep").result is found
    written = []
    monkeypatch.setattr(type(shell), "set_next_input", lambda self, text: written.append(text))
    shell.run_cell("%finetune sweep cell").raise_error()
    assert written == [found.cell()]
    assert "data: my_rows" in written[0]
    shell.run_cell(written[0].replace("rates-best", "again -o again")).raise_error()
    assert shell.user_ns["again"].history["loss"] == found.best.history["loss"]


def test_what_belongs_to_a_single_run_is_refused(ready):
    shell, body = ready
    for options, words in (
        ("--sweep --paused", "--paused is for a single run"),
        ("--sweep --from other", "--from is for a single run"),
        ("--halving", "--halving and --trials are for --sweep"),
    ):
        error = shell.run_cell(f"%%finetune {options}\n{body}").error_in_exec
        assert isinstance(error, CommandError)
        assert words in str(error)
    error = shell.run_cell("%finetune sweep").error_in_exec
    assert "there is no sweep yet" in str(error)


@pytest.mark.long
def test_an_interrupted_sweep_continues_by_command_or_with_resume(ready, capsys, monkeypatch):
    shell, body = ready
    from mlx_nb.notebook.sweep_cell import _LiveTable

    def interrupt(table):
        done = sum(run.step_count for run in table._sweep.runs)
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(_LiveTable, "refresh", interrupt)
        shell.run_cell(f"%%finetune --sweep --name rates -o rates\n{body}").raise_error()
    assert (
        "rates is paused, and saved. `%finetune sweep run` continues, as does its cell with --resume."
        in capsys.readouterr().out
    )
    first = shell.user_ns["rates"]
    assert sum(run.step_count for run in first.runs) == 3
    shell.run_cell(f"%%finetune --sweep --name rates -o rates --resume\n{body}").raise_error()
    found = shell.user_ns["rates"]
    assert found is not first
    assert found.finished
    assert all(len([e for e in run.history.events if isinstance(e, StepCompleted)]) == 2 for run in found.runs)
    assert shell.run_cell("%finetune sweep run").success
