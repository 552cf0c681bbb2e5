"""What Python shows of a run, an update, a check, a history and a report."""

from __future__ import annotations

import pandas
import pytest
import yaml

from mlx_nb import Run, RunConfig
from tiny import tiny_rows


@pytest.fixture
def run(shell, tiny_folder, tmp_path):
    config = RunConfig(model=str(tiny_folder), data="rows", iters=4, learning_rate=1e-5, lora_parameters={"rank": 4})
    shell.user_ns["run"] = Run(config, name="bees", namespace={"rows": tiny_rows()})
    return shell.user_ns["run"]


def shown(shell, value) -> dict:
    return shell.display_formatter.format(value)[0]


def test_a_run_is_a_card_before_and_after_its_updates(shell, run):
    assert "no update done yet" in shown(shell, run)["text/plain"]
    run.step(2)
    card = shown(shell, run)
    assert "2 of 4" in card["text/plain"]
    assert "<table" in card["text/html"]
    assert repr(run).startswith("Run('bees'")


def test_an_update_is_one_line(shell, run):
    step = run.step()
    assert shown(shell, step)["text/plain"].startswith(f"update 1: loss {step.loss:.4f}, learning rate")
    assert "\n" not in shown(shell, step)["text/plain"]


def test_a_check_is_its_report(shell, run):
    display = shown(shell, run.check())
    assert set(display) >= {"text/plain", "text/html"}
    assert "train" in display["text/plain"]
    assert len(display["text/plain"].splitlines()) > 3


def test_a_history_is_a_data_frame_of_its_updates(run):
    run.step(3)
    frame = pandas.DataFrame(run.history)
    assert list(frame["step"]) == [1, 2, 3]
    assert list(frame["loss"]) == run.history["loss"]


def test_settings_as_yaml_are_the_body_of_a_cell_that_makes_them_again(run):
    text = run.config.to_yaml()
    assert RunConfig.from_yaml(text).to_dict() == run.config.to_dict()
    assert "learning_rate" in yaml.safe_load(text)
    rows = RunConfig(data=tiny_rows(), iters=3).to_yaml()
    assert rows.startswith("# data: rows in memory")
    assert RunConfig.from_yaml(rows).iters == 3


@pytest.mark.long
def test_a_report_is_a_link_and_still_a_path(shell, run, tmp_path):
    run.step()
    report = run.report()
    assert report.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert 'href="adapters/bees/report.html"' in shown(shell, report)["text/html"]


@pytest.mark.parametrize("text", ["say red", "what's red", '"say red"'])
def test_generate_takes_text_without_quotation_marks(shell, run, text):
    shell.run_cell("%finetune runs")
    shell.magics_manager.registry["FinetuneMagics"].session.add(run)
    asked = []
    run.generate = lambda prompt, **options: asked.append(prompt) or "red"
    result = shell.run_cell(f"%finetune generate {text} --max-tokens 3")
    assert str(result.result) == "red"
    assert asked == [text.strip('"')]


@pytest.mark.long
def test_config_report_compare_and_load_are_commands_too(shell, run, tmp_path):
    session = shell.magics_manager.registry["FinetuneMagics"].session
    session.add(run)
    run.run()
    other = run.fork(name="other", iters=6, learning_rate=2e-5)
    session.add(other)

    def ask(line):
        result = shell.run_cell(f"%finetune {line}")
        assert result.success, line
        return result.result

    assert RunConfig.from_yaml(str(ask("config --name bees"))).to_dict() == run.config.to_dict()
    assert ask("report --name bees").name == "report.html"
    lines = [line.strip() for line in str(ask("compare bees")).splitlines()]
    assert lines[1:3] == ["learning_rate: 2e-05 → 1e-05", "iters: 6 → 4"]
    assert lines[3] == "bees minus other: 0 on every row. They are the same."
    assert "batch_size" not in str(lines)
    assert str(ask("compare other bees")) == str(ask("compare bees"))
    assert "mine.generate" in str(ask("load bees -o mine"))
    assert shell.user_ns["mine"].generate("say red", max_tokens=5) == run.generate("say red", max_tokens=5)


def test_a_row_has_its_text_tokens_mask_spans_messages_and_problems(run):
    row = run.rows("train")[3]
    assert [one["role"] for one in row.messages] == ["user", "assistant"]
    assert row.text == row.conversation.text
    assert row.text.count(row.messages[1]["content"]) >= 1
    assert len(row.tokens) == len(row.loss_mask) > 0
    assert {span.role for span in row.spans} == {"user", "assistant"}
    assert row.problems == []
    broken = Run(RunConfig(model=run.config.model, data=[{"text": ""}] * 2, val_set_size=0)).rows("train")[0]
    assert (broken.text, len(broken.tokens), broken.spans, broken.messages) == ("", 0, (), [])
    assert broken.problems
