"""What a cell says to a slip: what was meant, and never something of another meaning."""

from __future__ import annotations

import pytest

from mlx_nb import Run, RunConfig
from mlx_nb.errors import NonFiniteLoss
from mlx_nb.notebook.commands import run_line
from mlx_nb.notebook.session import Session
from mlx_nb.train.tripwires import FIRST_UPDATES, advice
from tiny import tiny_rows


def error_of(shell, source):
    error = shell.run_cell(source).error_in_exec
    assert error is not None, source
    assert len(error._render_traceback_()) == 1
    return str(error)


@pytest.mark.parametrize("options", ["", "--paused", "--background"])
@pytest.mark.parametrize(
    ("body", "reported"),
    [
        ("model: smollm-135m\ndata: rows", "there is no model 'smollm-135m'"),
        ("model: ./nowhere\ndata: rows", "there is no model folder or file './nowhere'"),
        ("data: bees", "If `bees` is a variable, run the cell that defines it first."),
        ("data: ./data", "no such file or folder: ./data. Working folder"),
        ("data: {bees}", "{bees} is not defined in the notebook. Run the cell that defines it first."),
        ("method: ppo\ndata: rows", "mlx_nb has none of that name; `grpo` is the nearest."),
        ("lora_rank: 16\ndata: rows", "`lora_parameters: {rank: 16}`"),
        ("method: grpo\nrewards: [mine]\ndata: rows", "run the cell that defines it first"),
    ],
)
def test_a_slip_fails_the_cell_in_one_line_and_leaves_the_runs_as_they_were(shell, options, body, reported):
    shell.user_ns["rows"] = tiny_rows()
    assert reported in error_of(shell, f"%%finetune {options}\n{body}")
    assert "no runs yet" in str(shell.run_cell("%finetune runs").result)


def test_a_kernel_without_runs_names_those_that_can_be_resumed(shell, tiny_folder):
    new = "no runs yet. A %%finetune cell creates one"
    assert str(shell.run_cell("%finetune runs").result) == f"{new}."
    shell.user_ns["rows"] = tiny_rows()
    shell.run_cell(f"%%finetune --name bees --paused -o bees\nmodel: {tiny_folder}\ndata: rows\nval_set_size: 0")
    shell.user_ns["bees"].step(2)
    shell.run_cell("%reload_ext mlx_nb")
    saved = ", and `%finetune resume NAME` continues one that is saved: bees (update 2)."
    assert str(shell.run_cell("%finetune runs").result) == f"{new}{saved}"
    assert error_of(shell, "%finetune status").endswith(f"there is no run yet. A %%finetune cell creates one{saved}")
    words = error_of(shell, "%finetune resume bee")
    assert "Did you mean 'bees'?" in words
    assert "`%finetune runs --disk` lists" in words


@pytest.mark.parametrize(("command", "meant"), [("stpe", "step"), ("stp 3", "step"), ("rewnid 2", "rewind")])
def test_a_mistyped_command_is_not_taken_for_one_that_ends_the_run(shell, command, meant):
    assert f"Did you mean {meant!r}?" in error_of(shell, f"%finetune {command}")


def test_a_rate_that_is_meant_to_be_small_is_doubted_and_the_small_one_named(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run(
        RunConfig(model=str(tiny_folder), data="rows", iters=4, learning_rate=1e4), namespace={"rows": tiny_rows()}
    )
    (doubt,) = (note for note in run.trainer.notes if "learning_rate" in note)
    assert "Was 1e-4 meant?" in doubt
    session = Session({})
    session.add(run)
    assert "Was 1e-3 meant?" in run_line(session, "set learning_rate=1e3")


def test_a_changed_rate_says_that_it_is_the_peak_and_what_the_next_update_has(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = RunConfig(model=str(tiny_folder), data="rows", iters=20, learning_rate=1e-4, steps_per_eval=-1)
    run = Run(config, namespace={"rows": tiny_rows()})
    run.step(10)
    session = Session({})
    session.add(run)
    reported = str(run_line(session, "set learning_rate=2e-4"))
    rate = run.step().learning_rate
    assert rate < 1.5e-4
    assert f"It is the peak of the schedule (cosine_decay): update 11 runs at {rate:.3g}." in reported


def test_early_nan_suspects_rate_and_base_before_the_rows():
    early, late = advice(NonFiniteLoss, 0, 1e4), advice(NonFiniteLoss, FIRST_UPDATES, 1e-4)
    assert early.index("1e+04") < early.index("--base") < early.index("skip")
    assert "likely cause" in early
    assert "likely cause" not in late
    doubted = advice(NonFiniteLoss, FIRST_UPDATES, 1e4, doubtful=True)
    assert doubted.index("likely cause") < doubted.index("1e+04") < doubted.index("skip")
    assert "early" not in doubted


def test_nan_at_a_doubted_rate_suspects_it_at_any_update(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run(
        RunConfig(model=str(tiny_folder), data="rows", iters=20, learning_rate=1.0, steps_per_eval=-1),
        namespace={"rows": tiny_rows()},
    )
    run.step(6)
    reported = run.trainer._failed(NonFiniteLoss("loss is nan")).error
    assert "The likely cause is the learning rate (1)" in reported
    run.set(learning_rate=1e-4)
    run.step()
    assert "likely cause" not in run.trainer._failed(NonFiniteLoss("loss is nan")).error


def test_rows_are_named_by_their_place_in_the_data_where_some_are_held_out(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = tiny_rows()
    rows[20] = {"messages": [{"role": "user", "content": "hi"}]}
    config = RunConfig(model=str(tiny_folder), data="rows", iters=4, val_set_size=6)
    run = Run(config, name="held", namespace={"rows": rows})
    (note,) = (note for note in run.trainer.notes if "Left out of train" in note)
    assert "(rows[20]): no token is trained" in note
    session = Session({})
    session.add(run)
    place = run.rows("train").examples.source.location
    numbers = run.trainer.next_rows()
    reported = str(run_line(session, "skip"))
    assert all(f"row {row} ({place(row)})" in reported for row in numbers if place(row) != f"rows[{row}]")
    run.step()
    run.step()
    listed = str(run_line(session, "rows --top-loss 3"))
    assert any(place(row) in listed for row in run.row_losses())


@pytest.mark.parametrize(
    ("data", "settings", "reported"),
    [
        (
            [{"product": "umbrella", "slogan": "rain"}] * 4,
            "",
            "`prompt_feature: product` and `completion_feature: slogan`",
        ),
        ([{"text": ""}] * 3, "", "no row of train can be trained. The first: row 0"),
        ([{"prompt": "a", "completion": "b"}] * 3, "method: dpo\n", "no column 'chosen'"),
        ([{"prompt": "a", "completion": "b"}] * 3, "method: kto\n", "no column 'label'"),
        ([{"question": "a"}] * 3, "method: grpo\nrewards: [number_match]\n", "Set prompt_feature: question."),
        ([{"text": "a"}], "train_split: best\n", "train_split"),
        ([], "", "rows"),
    ],
)
def test_a_cell_whose_run_cannot_begin_fails_and_leaves_no_run(shell, tiny_folder, data, settings, reported):
    """Also where it would train in the background, long after the cell has returned."""
    shell.user_ns["bees"] = data
    begun = len(shell.user_ns.get("Out", {}))
    result = shell.run_cell(f"%%finetune --background\nmodel: {tiny_folder}\ndata: bees\niters: 3\n{settings}")
    assert result.error_in_exec is not None
    assert reported in str(result.error_in_exec)
    assert "\n" not in str(result.error_in_exec)
    assert shell.magics_manager.registry["FinetuneMagics"].session.runs == {}
    assert begun == len(shell.user_ns.get("Out", {}))
