"""What commands answer is what one would type next, in plain words, whatever the state of the run."""

from __future__ import annotations

import pytest

from mlx_nb.errors import CommandError, ConfigError
from mlx_nb.events import RunState
from mlx_nb.notebook.commands import run_line
from mlx_nb.view.event_text import STATES, setting_words
from runs import rows_run


@pytest.fixture
def asked(shell, tmp_path, tiny_folder):
    """(ask, run): a run of the shell's session and a function that gives the answer or the error in one text."""
    run = rows_run(tmp_path, tiny_folder, iters=4)
    session = shell.magics_manager.registry["FinetuneMagics"].session
    session.add(run)

    def ask(line):
        try:
            return str(run_line(session, line))
        except (CommandError, ConfigError) as error:
            return str(error)

    return ask, run


@pytest.mark.parametrize(
    ("command", "written"),
    [
        ("set lr=1e-5", "write `learning_rate=1e-05`."),
        ("set max_steps=90", "write `iters=90`."),
        ("fork lr=2e-5", "write `learning_rate=2e-05`."),
        ("fork lora_alpha=16", "`'lora_parameters={scale: ...}'`"),
        ("set num_train_epochs=2", "write `epochs=2`."),
    ],
)
def test_advice_about_a_word_of_a_command_is_written_as_a_word(asked, command, written):
    ask, run = asked
    run.step()
    answer = ask(command)
    assert written in answer
    assert ": 1e-05`" not in answer
    assert "\n" not in answer


def test_a_setting_of_a_run_that_is_over_does_not_act_on_a_next_update(asked):
    ask, run = asked
    run.run()
    assert ask("set learning_rate=5e-5").startswith(
        f"{run.name}: learning_rate: 5e-5, but no update is left; `%finetune run 20` does 20 more"
    )
    assert "from the next update on" not in ask("set grad_clip=2")


@pytest.mark.parametrize(
    ("updates", "command", "said"),
    [
        (0, "rewind 99", "is at update 0: there is no update to undo."),
        (0, "rewind", "is at update 0: there is no update to undo."),
        (3, "rewind 99", "is at update 3 and cannot go back by 99. `%finetune rewind 3`"),
        (3, "rewind 0", "cannot go back by 0 updates. Give a whole number of 1 or more."),
        (3, "rewind --to 7", "is at update 3 and cannot go back to 7."),
    ],
)
def test_going_back_too_far_is_reported_in_the_numbers_that_were_given(asked, updates, command, said):
    ask, run = asked
    run.run(until=updates)
    answer = ask(command)
    assert said in answer
    assert "-" not in answer.replace("--to", "")
    assert run.step_count == updates


def test_every_state_has_words_that_go_behind_a_name(asked):
    ask, run = asked
    assert set(STATES) == set(RunState)
    assert all(words.split()[0] in ("is", "has") for words in STATES.values())
    run.run()
    assert ask("pause") == f"{run.name} has finished, so there is nothing to pause."


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, "null"),
        (True, "true"),
        (("umbrella", "a chair"), "[umbrella, a chair]"),
        (5e-5, "5e-05"),
        ({"rank": 8}, "{rank: 8}"),
    ],
)
def test_the_value_of_a_setting_is_written_as_in_a_cell(value, written):
    assert setting_words(value) == written


@pytest.mark.usefixtures("asked")
def test_text_of_a_command_breaks_between_words_in_a_notebook(shell):
    for line in ("status", "help", "runs"):
        result = shell.run_cell(f"%finetune {line}").result
        bundle = shell.display_formatter.format(result)[0]
        assert bundle["text/plain"] == str(result)
        assert "word-break:normal" in bundle["text/html"]
