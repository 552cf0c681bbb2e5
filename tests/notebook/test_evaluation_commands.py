"""The commands about whether it helped: eval with metrics, compare, lr_find."""

from __future__ import annotations

import pytest

from mlx_nb.errors import CommandError, ConfigError
from tiny import tiny_rows


@pytest.fixture
def trained(shell, tiny_folder, tmp_path, monkeypatch):
    """The shell with two runs, `slow` and `fast`, the current one."""
    monkeypatch.setenv("MLX_NB_CACHE", str(tmp_path / "cache"))
    shell.user_ns["my_rows"] = tiny_rows()
    shell.run_cell("def polite(completion, reference):\n    return 'please' in completion").raise_error()
    for name, rate in (("slow", 1e-4), ("fast", 1e-2)):
        body = f"model: {tiny_folder}\ndata: my_rows\niters: 4\nlearning_rate: {rate}\nval_set_size: 6"
        shell.run_cell(f"%%finetune --name {name}\n{body}").raise_error()
    return shell


def answer(shell, source):
    result = shell.run_cell(source)
    result.raise_error()
    return result.result


@pytest.mark.long
def test_eval_takes_metrics_of_the_notebook_and_built_in_ones_with_values(trained):
    text = str(answer(trained, "%finetune eval --metrics exact_match,polite --max-tokens 3"))
    assert text.startswith("valid, 6 rows, update 4\n")
    assert "polite           0.0000   95% interval 0.0000 to 0.3903" in text
    text = str(answer(trained, "%finetune eval train --all --metrics '[{regex: .}]' --max-tokens 3"))
    assert text.startswith("train, 18 rows")
    assert "regex" in text
    error = trained.run_cell("%finetune eval --metrics polit").error_in_exec
    assert isinstance(error, ConfigError)
    assert "Did you mean 'polite'?" in str(error)


@pytest.mark.long
def test_compare_shows_two_runs_row_by_row_and_the_base(trained):
    text = repr(answer(trained, "%finetune compare slow fast --answers 0"))
    assert "learning_rate: 0.0001 → 0.01" in text
    assert "fast minus slow:\n  loss" in text
    text = repr(answer(trained, "%finetune compare fast base --metrics polite --max-tokens 3 -o found"))
    assert "fast minus base:" in text
    assert trained.user_ns["found"].names == ["base", "fast"]
    text = repr(answer(trained, "%finetune compare fast base --rows general --answers 0"))
    assert "loss, arithmetic" in text
    assert "0 on every row" in repr(answer(trained, "%finetune compare fast fast --answers 0"))
    assert "equal" in repr(answer(trained, "%finetune compare slow fast --blind --metrics polite --max-tokens 8"))


@pytest.mark.long
def test_compare_of_three_runs_or_of_one_that_has_not_begun_is_a_table(trained, tiny_folder):
    body = f"model: {tiny_folder}\ndata: my_rows"
    trained.run_cell(f"%%finetune --name third --paused\n{body}").raise_error()
    for command in ("%finetune compare", "%finetune compare slow third"):
        text = str(answer(trained, command))
        assert "best validation" in text
        assert "not started" in text


@pytest.mark.long
def test_compare_of_one_run_says_what_to_name(trained):
    error = trained.run_cell("%finetune compare fast").error_in_exec
    assert isinstance(error, CommandError)
    assert "name two runs, or a run and base, as in `%finetune compare fast base`" in str(error)


@pytest.mark.long
def test_lr_find_shows_a_suggestion_and_leaves_the_run(trained):
    before = trained.run_cell("%finetune status").result
    found = answer(trained, "%finetune lr_find --updates 20 --lowest 1e-5")
    assert len(found.learning_rates) <= 20
    assert found._repr_mimebundle_()["image/png"]
    assert str(trained.run_cell("%finetune status").result) == str(before)
