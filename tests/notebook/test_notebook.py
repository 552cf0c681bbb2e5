"""The magics in an IPython shell without a kernel."""

from __future__ import annotations

import asyncio
import html
import os
from pathlib import Path

import pytest
from IPython.utils.capture import capture_output

import mlx_nb
from mlx_nb import unload_ipython_extension
from mlx_nb.config.run_config import SETTINGS
from mlx_nb.errors import CommandError, DataError
from mlx_nb.notebook import text_output
from mlx_nb.notebook.commands import COMMANDS
from mlx_nb.notebook.lasting_output import Outcome
from mlx_nb.notebook.magics import FinetuneMagics
from mlx_nb.notebook.queued_cells import CellNotRun
from mlx_nb.notebook.templating import fill
from mlx_nb.view.curves.shown_figure import ShownFigure
from tiny import tiny_rows


@pytest.fixture
def trained(shell, tiny_folder):
    """The shell after a paused cell has made the run `tiny`."""
    shell.user_ns["my_rows"] = tiny_rows()
    run_cell(
        shell,
        f"%%finetune --name tiny -o run --paused\nmodel: {tiny_folder}\ndata: my_rows\niters: 4\nlearning_rate: 1e-2",
    )
    return shell


def run_cell(shell, source):
    result = shell.run_cell(source)
    result.raise_error()
    return result.result


def error_of(shell, source):
    result = shell.run_cell(source)
    error = result.error_in_exec
    assert error is not None, source
    return error


def test_a_cell_trains_and_binds_its_run(shell, tiny_folder, capsys):
    shell.user_ns["my_rows"] = tiny_rows()
    run_cell(shell, f"%%finetune --name pirate -o run\nmodel: {tiny_folder}\ndata: my_rows\niters: 3")
    assert shell.user_ns["run"].finished
    assert Path("adapters/pirate/adapters.safetensors").exists()
    assert "finished after update 3" in capsys.readouterr().out


def test_paused_builds_and_steps_do_exactly_n(trained):
    run = trained.user_ns["run"]
    assert run.step_count == 0
    run_cell(trained, "%finetune step")
    assert run.step_count == 1
    run_cell(trained, "%finetune step 2")
    assert run.step_count == 3
    run_cell(trained, "%finetune run")
    assert run.finished


def test_every_subcommand_answers(trained, tmp_path):
    run_cell(trained, "%finetune step")
    assert "1 of 4" in str(run_cell(trained, "%finetune status"))
    assert "valid loss" in str(run_cell(trained, "%finetune eval"))
    assert isinstance(str(run_cell(trained, '%finetune generate "say red" --max-tokens 3')), str)
    assert isinstance(str(run_cell(trained, '%finetune generate "say red" --base --max-tokens 3')), str)
    assert "5e-5" in str(run_cell(trained, "%finetune set learning_rate=5e-5"))
    assert run_cell(trained, "%finetune plot").axes
    assert "saved" in str(run_cell(trained, f"%finetune save {tmp_path / 'mine'}"))
    assert (tmp_path / "mine" / "adapters.safetensors").exists()
    assert "tiny" in str(run_cell(trained, "%finetune runs"))
    assert "rows in train" in str(run_cell(trained, "%finetune rows"))
    assert "say" in repr(run_cell(trained, "%finetune row 0"))
    assert "<span" in run_cell(trained, "%finetune row 0")._repr_html_()
    assert "nats" in run_cell(trained, "%finetune row 0 --loss")._repr_html_()
    assert "base" in run_cell(trained, "%finetune row 0 --compare base")._repr_html_()
    assert "generate" in str(run_cell(trained, "%finetune help"))
    assert "--base" in str(run_cell(trained, "%finetune help generate"))
    run_cell(trained, "%finetune use tiny")
    assert trained.user_ns["run"].step().learning_rate < 1e-4


def rows_without_an_answer():
    return [*tiny_rows(), {"messages": [{"role": "user", "content": "hi"}]}]


@pytest.mark.long
def test_the_outcome_of_a_background_run_names_the_rows_that_are_left_out(shell, tiny_folder):
    run = mlx_nb.Run(
        mlx_nb.RunConfig(model=str(tiny_folder), data="rows", iters=2, val_set_size=0),
        name="holes",
        namespace={"rows": rows_without_an_answer()},
    )
    with capture_output() as captured:
        outcome = Outcome(run)
        run.step()
        while_it_runs = captured.outputs[-1].data
        run.run()
        outcome.publish()
        at_the_end = [output.data for output in captured.outputs if "text/html" in output.data][-1]
    number = len(tiny_rows())
    said = f"Left out of train: 1 row. row {number}: no token is trained with loss_on='assistant'."
    assert "the result appears here" in while_it_runs["text/plain"]
    assert "finished after update 2" in at_the_end["text/plain"]
    for data in (while_it_runs, at_the_end):
        assert data["text/plain"].count(said) == 1
        assert data["text/html"].count(html.escape(said)) == 1


def test_rows_says_which_are_left_out_or_that_it_is_not_known_yet(shell, tiny_folder):
    shell.user_ns["holes"] = rows_without_an_answer()
    run_cell(shell, f"%%finetune --name holes -o run --paused\nmodel: {tiny_folder}\ndata: holes\nval_set_size: 0")
    unknown = "Rows are left out when they are tokenized. `%finetune check` lists these rows now."
    assert unknown in str(run_cell(shell, "%finetune rows"))
    run_cell(shell, "%finetune step")
    reported = str(run_cell(shell, "%finetune rows"))
    assert unknown not in reported
    assert f"row {len(tiny_rows())}: no token is trained" in reported


def test_status_says_why_a_run_failed_before_its_first_update(shell, tiny_folder):
    Path("nowhere.jsonl").touch()
    run_cell(shell, f"%%finetune --name nowhere -o run --paused\nmodel: {tiny_folder}\ndata: ./nowhere.jsonl")
    Path("nowhere.jsonl").unlink()

    async def in_the_background():
        shell.user_ns["run"].start()
        await shell.user_ns["run"]

    with pytest.raises(DataError, match="no such file"):
        asyncio.run(in_the_background())
    reported = str(run_cell(shell, "%finetune status"))
    assert reported.startswith("nowhere: failed before its first update. DataError: no such file or folder: ./nowhere")


def test_running_a_cell_twice_is_harmless(trained, tiny_folder):
    cell = f"%%finetune --name again -o run\nmodel: {tiny_folder}\ndata: my_rows\niters: 2"
    run_cell(trained, cell)
    first = trained.user_ns["run"].adapter_bytes()
    run_cell(trained, cell)
    assert trained.user_ns["run"].adapter_bytes() == first
    assert len(os.listdir("adapters")) == 2


BAD_COMMANDS = {
    "%finetune stepp": "Did you mean 'step'",
    "%finetune step two": "two",
    "%finetune step 0": "at least 1",
    "%finetune generate": "prompt",
    '%finetune generate "open': "quotation",
    "%finetune set learning_rate": "key=value",
    "%finetune set batch_size=2": "cannot change during a run",
    "%finetune set lerning_rate=1": "learning_rate",
    "%finetune row 999": "no row 999",
    "%finetune eval tests": "tests",
    "%finetune status --name tyni": "Did you mean 'tiny'",
    "%finetune use nothing": "nothing",
    "%finetune help stepp": "Did you mean 'step'",
    "%finetune help lerning_rate": "Did you mean 'learning_rate'",
    "%%finetune --nmae x\nmodel: a": "--nmae",
    "%%finetune --name a/b\nmodel: a": "letters",
    "%%finetune -o 1x\nmodel: a": "variable name",
    "%%finetune -o class\nmodel: a": "variable name",
    "%%finetune\nmodel: {undefined_name}": "undefined_name",
    "%%finetune\nmodle: x": "Did you mean 'model'",
}


@pytest.mark.parametrize("command", BAD_COMMANDS)
@pytest.mark.matrix(every=2)
def test_a_bad_command_is_one_line_that_fails_the_cell(trained, command):
    trained.user_ns["run"].step()
    error = error_of(trained, command)
    assert BAD_COMMANDS[command] in str(error)
    shown = error._render_traceback_()
    assert len(shown) == 1
    assert "\n" not in shown[0]


def test_a_notebook_shows_error_lines_that_break_between_words(trained, monkeypatch):
    error = error_of(trained, "%finetune set learning_rte=1e-4 itres=3 --now-or-never")
    (whole,) = error._render_traceback_()
    monkeypatch.setattr(text_output, "has_rich_display", lambda: True)
    shown = error._render_traceback_()
    assert len(shown) > 1
    assert all(len(line) <= text_output.WIDTH for line in shown)
    assert " ".join(line.strip() for line in shown) == whole
    assert CommandError("short")._render_traceback_() == ["CommandError: short"]
    waited = CellNotRun(" ".join(["word"] * 30))._render_traceback_()
    assert all(len(line) <= text_output.WIDTH for line in waited)
    assert CommandError("x" * 200)._render_traceback_() == ["CommandError:", f"  {'x' * 200}"]
    unload_ipython_extension(trained)
    assert error._render_traceback_() == [whole]


def test_a_command_without_a_run_says_what_to_do(shell):
    assert "%%finetune" in str(error_of(shell, "%finetune step"))


def test_help_of_the_cell_magic_lists_the_settings(shell, capsys):
    shell.run_line_magic("pinfo", "%%finetune")
    shown = capsys.readouterr().out
    assert "lora_parameters.rank" in shown
    assert "--paused" in shown
    places = [shown.index(text) for text in ("%%finetune --name bees", "Most common", "Other settings", "With")]
    assert places == sorted(places)
    assert max(map(len, (FinetuneMagics.finetune_cell.__doc__ or "").split("\n"))) <= 66
    assert all(f"{name.partition('.')[0]}" in shown for name in SETTINGS)


def test_help_fits_a_narrow_notebook_with_a_line_for_each_command(shell):
    lines = str(run_cell(shell, "%finetune help")).split("\n")
    assert max(map(len, lines)) <= 66
    assert all(sum(line.split()[:1] == [name] and line.startswith("  ") for line in lines) == 1 for name in COMMANDS)
    assert len(lines) < len(COMMANDS) + 25
    for name in COMMANDS:
        reported = str(run_cell(shell, f"%finetune help {name}"))
        assert max(map(len, reported.split("\n"))) <= 70, name
        assert f"%finetune {name}" in reported
    assert "learning_rate" in str(run_cell(shell, "%finetune help set"))


def test_help_tells_all_about_a_setting(shell):
    reported = str(run_cell(shell, "%finetune help loss_spike"))
    assert reported.startswith("loss_spike: 10.0\n")
    assert " ".join(SETTINGS["loss_spike"].metadata["help"].split()) in " ".join(reported.split())


def test_tab_completes_commands_options_and_settings(trained):
    def completions(line):
        return set(trained.complete(line.split(" ")[-1], line, len(line))[1])

    assert "generate" in completions("%finetune gen")
    assert "--base" in completions("%finetune generate --b")
    assert "learning_rate=" in completions("%finetune set lea")
    assert "tiny" in completions("%finetune status --name ti")
    assert "--paused" in completions("%%finetune --pa")


def test_config_finetune_lists_what_holds_for_all_runs_and_cells_follow_it(shell, tiny_folder, capsys):
    before = os.environ.get("MLX_NB_CACHE")
    shell.run_line_magic("config", "Finetune")
    assert "Finetune.wait" in capsys.readouterr().out
    shell.run_line_magic("config", "Finetune.cache_folder = '/elsewhere'")
    assert os.environ["MLX_NB_CACHE"] == "/elsewhere"
    shell.run_line_magic("config", "Finetune.cache_folder = ''")
    assert os.environ.get("MLX_NB_CACHE") == before
    shell.run_line_magic("config", "Finetune.snapshot_memory = 7")
    shell.user_ns["my_rows"] = tiny_rows()
    body = f"model: {tiny_folder}\ndata: my_rows\niters: 2"
    run_cell(shell, f"%%finetune --paused -o run\n{body}")
    assert shell.user_ns["run"].config.snapshot_memory == 7
    run_cell(shell, f"%%finetune --paused -o run\n{body}\nsnapshot_memory: 9")
    assert shell.user_ns["run"].config.snapshot_memory == 9


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("%finetune generate What is honey?", "generate What is honey?"),
        ("%finetune generate What's honey??", "generate What's honey??"),
        ("answer = %finetune generate Why?", "generate Why?"),
        ("if True:\n    %finetune generate Why?", "generate Why?"),
        ("%finetune set?", "help set"),
        ("%finetune ?", "help"),
    ],
)
def test_a_question_mark_belongs_to_the_command(shell, typed, words):
    assert shell.transform_cell(typed).endswith(f"get_ipython().run_line_magic('finetune', {words!r})\n")


@pytest.mark.parametrize("typed", ["text = '''\n%finetune generate Why?\n'''\n", "print(1)\n"])
def test_other_code_is_left_as_it_is(shell, typed):
    assert shell.transform_cell(typed) == typed


def test_help_on_the_magics_stays(shell):
    assert "pinfo" in shell.transform_cell("%finetune?")
    assert "pinfo" in shell.transform_cell("%%finetune?")


def test_unloading_removes_every_trace(shell):
    figure = ShownFigure("curves", (4, 3))
    before = shell.display_formatter.format(figure)[0]
    shell.run_line_magic("unload_ext", "mlx_nb")
    for formatter in (shell.display_formatter.mimebundle_formatter, shell.display_formatter.formatters["image/png"]):
        assert ShownFigure not in formatter
    assert shell.display_formatter.format(figure)[0].keys() == before.keys() >= {"image/png", "text/plain"}
    assert "finetune" not in shell.magics_manager.magics["line"]
    assert "finetune" not in shell.magics_manager.magics["cell"]
    assert not [configurable for configurable in shell.configurables if "Finetune" in type(configurable).__name__]
    assert "%finetune" not in shell.strdispatchers["complete_command"].strs
    assert "pinfo" in shell.transform_cell("%finetune generate What is honey?")
    shell.run_line_magic("load_ext", "mlx_nb")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("iters: {n}", "iters: 3"),
        ("learning_rate: {rate}", "learning_rate: 1e-05"),
        ("adapter_path: out/{word}/x", "adapter_path: out/pirate/x"),
        ("test: {flag}", "test: true"),
        ("target_modules: {names}", 'target_modules: ["q_proj"]'),
        ("lora_parameters: {rank: 4}", "lora_parameters: {rank: 4}"),
        ("model: {{word}}", "model: {word}"),
        ("rewards: [{length: {max: 80}}]", "rewards: [{length: {max: 80}}]"),
    ],
)
def test_names_in_braces_become_values(body, expected):
    namespace = {"n": 3, "rate": 1e-5, "word": "pirate", "flag": True, "names": ["q_proj"]}
    assert fill(body, namespace) == expected


def test_a_value_without_text_form_is_refused():
    with pytest.raises(CommandError, match="data: rows"):
        fill("data: {rows}", {"rows": object()})
