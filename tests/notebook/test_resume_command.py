"""Commands that make a run: `-o`, `resume` without a name or in a new kernel, and options written in full."""

from __future__ import annotations

import pytest

from mlx_nb.errors import CheckpointError
from mlx_nb.run.run import Run
from tiny import tiny_rows


def run_cell(shell, source):
    result = shell.run_cell(source)
    result.raise_error()
    return str(result.result)


def refused(shell, source):
    result = shell.run_cell(source)
    error = result.error_in_exec
    assert error is not None, source
    (line,) = error._render_traceback_()
    return line


def trained(shell, tiny_folder, name="bees", updates=2, rows="hive"):
    shell.user_ns[rows] = tiny_rows()
    settings = f"model: {tiny_folder}\ndata: {rows}\niters: 4\nlora_parameters: {{rank: 4}}"
    run_cell(shell, f"%%finetune --name {name} -o {name} --paused\n{settings}")
    run_cell(shell, f"%finetune step {updates}")
    run_cell(shell, "%finetune save")
    shell.user_ns[name].checkpoint()
    return shell.user_ns[name]


@pytest.mark.parametrize(("command", "made"), [("resume bees -o again", "bees"), ("fork --as other -o again", "other")])
def test_every_command_that_makes_a_run_binds_it(shell, tiny_folder, command, made):
    trained(shell, tiny_folder)
    run_cell(shell, f"%finetune {command}")
    run = shell.user_ns["again"]
    assert (run.name, run.step_count) == (made, 2)
    assert shell.user_ns["_"] is not run
    assert "variable name" in refused(shell, f"%finetune {command.replace('-o again', '-o 1x')}")


def test_a_variable_of_a_run_that_was_replaced_is_named_and_says_what_it_is_when_it_is_used(shell, tiny_folder):
    old = trained(shell, tiny_folder)
    said = run_cell(shell, "%finetune resume bees")
    assert "The variable bees still holds the replaced run. `-o bees` stores the new one in it." in said
    assert "resumed in this process after update 2" in repr(old)
    line = refused(shell, "bees.step()")
    assert "resumed in this process after update 2" in line
    assert "variable" not in run_cell(shell, "%finetune resume bees -o bees")
    assert shell.user_ns["bees"] is not old


def test_resume_without_a_name_takes_the_only_run_or_lists_them(shell, tiny_folder):
    assert "no run in" in refused(shell, "%finetune resume")
    trained(shell, tiny_folder)
    assert "2 of 4 updates" in run_cell(shell, "%finetune resume")
    trained(shell, tiny_folder, "wasps", 1)
    assert "There are bees (update 2), wasps (update 1)." in refused(shell, "%finetune resume")
    assert "1 of 4 updates" in run_cell(shell, "%finetune resume wasps")


def test_a_run_of_a_variable_that_is_not_there_yet_says_which_cell_comes_first(shell, tiny_folder):
    run = trained(shell, tiny_folder)
    del shell.user_ns["hive"]
    assert "run the cell that defines `hive` first" in refused(shell, "%finetune resume bees")
    with pytest.raises(CheckpointError, match="give `namespace=globals\\(\\)`"):
        Run.resume(run.folder)
    shell.user_ns["hive"] = tiny_rows()
    assert "2 of 4 updates" in run_cell(shell, "%finetune resume bees")


SHORTENED = {
    "%finetune status --nam bees": "Did you mean --name?",
    "%finetune status -name bees": "Did you mean --name?",
    "%finetune generate x --temp=0.5": "Did you mean --temperature?",
    "%finetune run --wai": "Did you mean --wait?",
    "%finetune resume bees --allow data": "Did you mean --allow-changed?",
    "%%finetune --paus\nmodel: x": "Did you mean --paused?",
    "%%finetune --na x\nmodel: x": "Did you mean --name?",
}


@pytest.mark.parametrize("command", SHORTENED)
def test_the_beginning_of_an_option_is_refused_with_the_whole_one(shell, tiny_folder, command):
    assert SHORTENED[command] in refused(shell, command)


def test_a_bare_run_is_not_taken_for_a_file_and_a_file_still_is(shell, tmp_path):
    for line in ("run", "run 40", "run --wait", "%run"):
        assert "is IPython's %run, which executes a file. To train, write `%finetune run" in refused(shell, line)
    (tmp_path / "40.py").write_text("mine = 40")
    (tmp_path / "script.py").write_text("import sys\nargument = sys.argv[1]")
    run_cell(shell, "run 40")
    run_cell(shell, "run script.py here")
    assert (shell.user_ns["mine"], shell.user_ns["argument"]) == (40, "here")
    before = shell.magics_manager.magics["line"]["run"]
    shell.run_line_magic("unload_ext", "mlx_nb")
    assert shell.magics_manager.magics["line"]["run"] is not before
    assert shell.magics_manager.magics["line"]["run"].__module__ != "mlx_nb.notebook.bare_run"
    shell.run_line_magic("load_ext", "mlx_nb")
