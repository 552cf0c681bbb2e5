"""Rows are looked at, tried with other words, chosen and written before there is a run; what was chosen is trained."""

from __future__ import annotations

import json

import numpy as np
import pytest

import mlx_nb
from mlx_nb import Run, RunConfig
from mlx_nb.errors import CommandError, ConfigError, DataError
from mlx_nb.notebook.commands import run_line
from runs import rows_run
from tiny import tiny_labels, tiny_pairs, tiny_rows


def test_rows_of_no_run_are_those_that_a_run_trains(tmp_path, tiny_folder):
    rows = mlx_nb.rows(tiny_rows(), model=str(tiny_folder), val_set_size=0)
    run = rows_run(tmp_path, tiny_folder, data=tiny_rows(), val_set_size=0)
    assert len(rows) == 24
    for mine, its in zip(rows, run.rows("train"), strict=True):
        assert np.array_equal(mine.conversation.tokens, its.conversation.tokens)
        assert np.array_equal(mine.conversation.loss_mask, its.conversation.loss_mask)
    assert "loaded" not in run.inputs.__dict__  # the tokenizer alone


def test_a_row_is_tried_with_other_words_and_stays_as_it_is(tiny_folder):
    data = [{"prompt": "say red", "completion": "redred"} for _ in range(4)]
    rows = mlx_nb.rows(data, model=str(tiny_folder), val_set_size=0)
    other = mlx_nb.rows([{"prompt": "say red", "completion": "blue"}] * 4, model=str(tiny_folder), val_set_size=0)
    edited = rows.edited(2, completion="blue")
    assert edited.row == 2
    assert np.array_equal(edited.conversation.tokens, other[2].conversation.tokens)
    assert not np.array_equal(edited.conversation.tokens, rows[2].conversation.tokens)
    assert data[2] == {"prompt": "say red", "completion": "redred"}
    assert "`completion`" in rows.edited(1, completion=3).error


@pytest.mark.parametrize(("method", "data"), [("sft", tiny_rows()), ("dpo", tiny_pairs()), ("kto", tiny_labels())])
@pytest.mark.matrix(every=3)
def test_rows_that_are_left_out_are_not_trained_and_the_others_as_without_them(tmp_path, tiny_folder, method, data):
    out = (3, 17, 5)
    run = rows_run(
        tmp_path,
        tiny_folder,
        data=data,
        method=method,
        val_set_size=0,
        epochs=1,
        iters=None,
        leave_out=out,
        steps_per_eval=None,
    )
    run.run()
    trained = {row for event in run.history.events for row in getattr(event, "rows", ()) if hasattr(event, "loss")}
    assert trained == set(range(len(data))) - set(out)
    assert [one.row for one in run.left_out["train"]] == sorted(out)
    assert all("left out by `leave_out`" in one.reason for one in run.left_out["train"])
    assert tuple(Run.resume(run.folder, data=data).config.leave_out) == out


def test_a_row_that_is_not_there_cannot_be_left_out(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, data=tiny_rows(), val_set_size=0, leave_out=[99], steps_per_eval=None)
    with pytest.raises(DataError, match=r"`leave_out`: there is no row 99. The training rows are 0 to 23."):
        run.step()


def test_down_weighted_rows_count_as_their_messages_with_that_weight(tmp_path, tiny_folder):
    rows = [
        {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}]}
        for word in ["red", "green", "blue"] * 4
    ]
    lighter = [
        {"messages": [row["messages"][0], {**row["messages"][1], "weight": 0.25}]} if number in (1, 5) else row
        for number, row in enumerate(rows)
    ]
    data = {"train": rows, "valid": rows[:2]}
    numbers = {"down_weight": [1, 5], "down_weight_factor": 0.25}
    chosen = rows_run(tmp_path, tiny_folder, data=data, adapter_path=str(tmp_path / "a"), **numbers)
    written = rows_run(tmp_path, tiny_folder, data={**data, "train": lighter}, adapter_path=str(tmp_path / "b"))
    plain = rows_run(tmp_path, tiny_folder, data=data, adapter_path=str(tmp_path / "c"))
    for run in (chosen, written, plain):
        run.step(3)
    assert chosen.history["loss"] == written.history["loss"] != plain.history["loss"]
    assert chosen.adapter_bytes() == written.adapter_bytes()
    view = chosen.rows("train")[1]
    assert set(view.loss_mask) == {0.0, 0.25}
    assert "it is down-weighted: it counts 0.25." in view.problems
    assert set(chosen.rows("valid")[1].loss_mask) == {0.0, 1.0}
    chosen.checkpoint()
    assert Run.resume(chosen.folder, data=data).config.down_weight == (1, 5)


@pytest.mark.parametrize(
    ("settings", "reported"),
    [
        ({"down_weight": [99]}, r"`down_weight`: there is no row 99. The training rows are 0 to 23."),
        ({"down_weight": [3], "leave_out": [3]}, "`down_weight` has row 3, which `leave_out` leaves out"),
        ({"down_weight_factor": 0.1}, "`down_weight_factor` has no effect without `down_weight`"),
        ({"down_weight": [3], "down_weight_factor": 1.0}, "`down_weight_factor` must be below 1"),
        ({"down_weight": [3], "method": "kto"}, "`down_weight` has no effect with `method: kto`"),
    ],
)
def test_what_cannot_be_down_weighted_is_one_line(tmp_path, tiny_folder, settings, reported):
    with pytest.raises((ConfigError, DataError), match=reported):
        rows_run(tmp_path, tiny_folder, data=tiny_rows(), val_set_size=0, steps_per_eval=None, **settings).step()


def test_what_was_chosen_is_written_as_rows_and_nothing_is_written_over(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = mlx_nb.rows(tiny_rows(), model=str(tiny_folder), val_set_size=0)
    path = rows.export("good.jsonl", leave_out=[0, 2])
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert written == [row for number, row in enumerate(tiny_rows()) if number not in (0, 2)]
    with pytest.raises(CommandError, match="already exists"):
        rows.export("good.jsonl")


def test_the_row_view_tries_a_row_and_collects_those_to_leave_out(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, data=[{"prompt": "say red", "completion": "red"}] * 6, val_set_size=2)
    browser = run.browse()
    browser.editor.open.value = True
    assert json.loads(browser.editor.text.value) == {"prompt": "say red", "completion": "red"}
    browser.editor.text.value = '{"prompt": "say red", "completion": "blueblue"}'
    browser.editor.try_row()
    assert browser.editor.view.value != browser.view.value
    browser.editor.text.value = "{"
    browser.editor.try_row()
    assert "not valid JSON" in browser.editor.view.value
    for row in (3, 1):
        browser.jump.value = row
        assert not browser.leave.value
        browser.leave.value = True
    assert browser.left_out_rows == [1, 3]
    assert "leave_out: [1, 3]" in browser.setting.value
    assert RunConfig.from_yaml(f"leave_out: {browser.left_out_rows}").leave_out == (1, 3)
    browser.jump.value = 3
    browser.lighter.value = True  # a row is not both
    assert (browser.left_out_rows, browser.down_weighted_rows, browser.leave.value) == ([1], [3], False)
    assert "down_weight: [3]" in browser.setting.value
    browser.split.value = "valid"
    assert browser.leave.disabled
    assert browser.lighter.disabled


def test_the_row_view_writes_the_rows_that_were_found(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = [{"prompt": f"say {word}", "completion": word} for word in ["red", "green", "blue"] * 4]
    run = rows_run(tmp_path, tiny_folder, data=data, val_set_size=0)
    browser = run.browse()
    browser.text.value = "green"
    assert list(browser.search.found) == [1, 4, 7, 10]
    browser.jump.max = 11
    browser.next.click()
    browser.leave.value = True
    browser.write.click()
    assert browser.export_note.value == "3 rows were written to selection.jsonl"
    assert [json.loads(line) for line in (tmp_path / "selection.jsonl").read_text().splitlines()] == [data[1]] * 3
    browser.write.click()
    assert "already exists" in browser.export_note.value


def test_the_command_shows_the_rows_of_a_variable(shell, tiny_folder):
    shell.user_ns["bees"] = tiny_rows()
    session = shell.magics_manager.registry["FinetuneMagics"].session
    browser = run_line(session, f"rows data=bees model={tiny_folder} val_set_size=0")
    plain = browser._repr_mimebundle_()["text/plain"]
    assert plain.startswith("rows of train: 24\n\ntrain row 0 (bees[0])")
    assert "│ <|user|>say red 0<|end|>" in plain
    assert session.runs == {}
    for line, reported in (
        ("rows model=x", "`data` is missing. Example: %finetune rows data=bees"),
        ("rows data=bess", "Did you mean 'bees'?"),
        ("rows data=bees max_length=3", "`max_seq_length=3`"),
        ("rows train valid", "more than one split"),
    ):
        with pytest.raises((CommandError, ConfigError, DataError)) as caught:
            run_line(session, line)
        assert reported in str(caught.value)
