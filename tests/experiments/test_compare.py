"""Comparisons: a run with itself differs by nothing; with another, by the paired difference of the same rows."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_nb import Run, RunConfig, compare
from mlx_nb.errors import CommandError, DataError
from mlx_nb.events import Progress
from mlx_nb.experiments.blind import BlindVote
from tiny import tiny_pairs, tiny_prompts, tiny_rows


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_NB_CACHE", str(tmp_path / "cache"))


def run_of(folder, tiny_folder, name="run", **settings):
    values = {
        "model": str(tiny_folder),
        "data": tiny_rows(24),
        "iters": 6,
        "batch_size": 4,
        "val_set_size": 8,
        "steps_per_eval": 3,
        "save_every": -1,
        "adapter_path": str(folder / name),
    }
    return Run(RunConfig.from_dict({**values, **settings}), name=name)


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_folder):
    """Two trained runs, which no comparison changes."""
    folder = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_NB_CACHE", str(folder / "cache"))
        one = run_of(folder, tiny_folder, "slow", learning_rate=1e-4)
        other = run_of(folder, tiny_folder, "fast", learning_rate=1e-2)
        one.run()
        other.run()
    return one, other


def length(completion):
    return float(len(completion))


def test_a_run_compared_with_itself_differs_by_nothing_and_says_so(pair):
    one, _ = pair
    found = compare(one, one, metrics=["exact_match", length], max_tokens=3)
    (difference,) = found.differences
    assert difference.same
    assert {name: tuple(value) for name, value in difference.estimates.items()} == {
        "loss": (0.0, 0.0, 0.0, 8),
        "exact_match": (0.0, 0.0, 0.0, 8),
        "length": (0.0, 0.0, 0.0, 8),
    }
    assert all(row.change == 0.0 for row in difference.rows)
    assert "slow minus slow: 0 on every row. They are the same." in repr(found)


def test_a_fork_that_has_not_trained_is_the_same_model_too(pair, tmp_path):
    fork = pair[1].fork(name="fork", iters=12, adapter_path=str(tmp_path / "fork"))
    assert compare(pair[1], fork, answers=0).differences[0].same


def test_the_difference_is_that_of_the_same_rows_weighted_by_token(pair):
    one, other = pair
    (difference,) = compare(one, other, answers=0).differences
    evaluated = [dict(run.evaluate().row_losses) for run in pair]
    assert {row.row for row in difference.rows} == set(evaluated[0])
    for row in difference.rows:
        assert row.before == pytest.approx(evaluated[0][row.row], rel=1e-4)
        assert row.after == pytest.approx(evaluated[1][row.row], rel=1e-4)
    change = difference.estimates["loss"]
    assert change.value == pytest.approx(other.evaluate().loss - one.evaluate().loss, abs=1e-4)
    assert change.low < change.value < change.high
    changes = [row.change for row in difference.rows]
    assert changes == sorted(changes, reverse=True)
    worse, better = difference.counts
    assert worse + better == 8


def test_the_paired_interval_is_narrower_than_the_two_apart(pair):
    one, other = pair
    change = compare(one, other, answers=0).differences[0].estimates["loss"]
    apart = sum((high - low) ** 2 for low, high in (run.evaluate().intervals["loss"] for run in pair)) ** 0.5
    assert change.high - change.low < apart


def test_the_base_is_compared_first(pair):
    _, other = pair
    found = compare(other, base=True, answers=1, max_tokens=4)
    assert found.names == ["base", "fast"]
    difference = found.difference("base", "fast")
    assert difference.estimates["loss"].high < 0
    assert "not 0" in repr(found)
    answered = found.answers["base"]
    worst, best = difference.rows[0].row, difference.rows[-1].row
    assert set(answered) == {worst, best}
    prompt = found.prompts[worst]
    assert answered[worst] == other.generate(prompt, base=True, max_tokens=4)
    assert found.answers["fast"][worst] == other.generate(prompt, max_tokens=4)


def test_three_names_give_every_pair(pair):
    found = compare(*pair, base=True, answers=0)
    pairs = [(one.before, one.after) for one in found.differences]
    assert pairs == [("base", "slow"), ("base", "fast"), ("slow", "fast")]
    values = {(one.before, one.after): one.estimates["loss"].value for one in found.differences}
    assert values["base", "fast"] == pytest.approx(values["base", "slow"] + values["slow", "fast"], abs=1e-5)


def test_a_row_shows_the_change_of_each_trained_token(pair):
    one, other = pair
    found = compare(one, other, max_tokens=3)
    worst = found.differences[0].rows[0]
    shown = found.row(worst.row)
    changes = [change for _, change in shown.tokens if not np.isnan(change)]
    assert np.mean(changes) == pytest.approx(worst.change, abs=1e-5)
    assert "title=" in shown._repr_html_()
    assert f"row {worst.row}, fast minus slow" in repr(shown)
    with pytest.raises(CommandError, match="row 999 was not compared"):
        found.row(999)


def test_settings_that_differ_and_curves_are_shown(pair):
    found = compare(*pair, metrics=[length], max_tokens=3)
    bundle = found._repr_mimebundle_()
    assert "learning_rate: 0.0001 → 0.01" in bundle["text/plain"]
    assert "iters" not in bundle["text/plain"]
    assert "data:image/png;base64" in bundle["text/html"]
    assert "answers, rows that became worse first" in bundle["text/html"]
    labels = [line.get_label() for line in found.curves().axes[0].get_lines()]
    assert {"slow", "fast", "slow, validation", "fast, validation"} <= set(labels)


@pytest.mark.long
def test_pairs_are_compared_by_their_chosen_answer_and_prompts_by_a_metric(tmp_path, tiny_folder):
    dpo = run_of(tmp_path, tiny_folder, "dpo", method="dpo", data=tiny_pairs(24))
    dpo.step()
    assert "loss" in compare(dpo, base=True, answers=0).differences[0].estimates
    settings = {"method": "grpo", "data": tiny_prompts(24), "rewards": ["exact_match"], "max_completion_length": 3}
    grpo = run_of(tmp_path, tiny_folder, "grpo", **settings)
    found = compare(grpo, base=True, metrics=[length], max_tokens=3)
    assert list(found.differences[0].estimates) == ["length"]


def test_a_blind_vote_hides_the_names_and_keeps_the_score(pair):
    found = compare(*pair, metrics=[length], max_tokens=6)
    vote = found.blind(seed=1)
    seen = set()
    while not vote.over:
        prompt, first, second = vote.question
        assert not {"slow", "fast"} & set(f"{prompt} {first} {second}".split())
        row = next(row for row, text in found.prompts.items() if text[-1]["content"] == prompt)
        answers = found.answers["slow"][row], found.answers["fast"][row]
        assert (first, second) in (answers, answers[::-1])
        seen.add((first, second) == answers)
        vote.vote(1 if first == answers[1] else 2)
    assert seen == {True, False}
    assert vote.score.startswith(f"slow 0, fast {len(vote.votes)}, equal 0: fast wins 100%")
    with pytest.raises(CommandError, match="the vote is over"):
        vote.vote(1)


def test_a_vote_on_equal_answers_is_refused_and_so_is_a_wrong_number(pair):
    with pytest.raises(CommandError, match="no rows to vote on"):
        compare(pair[0], pair[0], max_tokens=2).blind()
    vote = BlindVote(compare(*pair, metrics=[length], max_tokens=6))
    with pytest.raises(CommandError, match="vote for 1 or 2"):
        vote.vote(3)
    assert vote.vote(0) == "slow 0, fast 0, equal 1"


def test_the_buttons_of_a_vote_count(pair):
    vote = compare(*pair, metrics=[length], max_tokens=6).blind()
    box = vote._widgets()
    text, buttons = box.children
    buttons.children[2].click()
    assert vote.votes == [None]
    assert "1 of" in text.outputs[0]["data"]["text/plain"]


def test_comparing_changes_nothing_and_ends_at_an_interrupt(pair):
    import os
    import signal

    before = [run.adapter_bytes() for run in pair]

    def interrupt(event):
        if isinstance(event, Progress) and event.done == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        compare(*pair, on_progress=interrupt)
    compare(*pair, max_tokens=2)
    assert [run.adapter_bytes() for run in pair] == before


def test_what_cannot_be_compared_is_refused(pair, tmp_path, tiny_folder):
    with pytest.raises(CommandError, match="takes two runs, or one run with base=True"):
        compare(pair[0])
    same_name = run_of(tmp_path / "other", tiny_folder, "slow")
    with pytest.raises(CommandError, match="two of the runs are called slow"):
        compare(pair[0], same_name)


def test_other_rows_are_named(pair, tmp_path, tiny_folder):
    other = run_of(tmp_path, tiny_folder, "other", data=tiny_rows(30))
    other.step()
    assert compare(pair[0], other, answers=0).notes == [
        "these are the valid rows of slow. other has others, and may have trained on some of these."
    ]


def test_what_was_forgotten_is_the_loss_of_general_rows_before_and_after_in_groups(pair):
    one, other = pair
    found = compare(other, base=True, rows="general", answers=0)
    assert len(found.examples) == 48
    assert "base and fast on 48 rows of the general set" in repr(found)
    (difference,) = found.differences
    groups = [name for name in difference.estimates if name != "loss"]
    assert groups == [f"loss, {name}" for name in ("facts", "arithmetic", "code", "prose", "instructions", "languages")]
    assert all(difference.estimates[name].rows == 8 for name in groups)
    targets = {row: float(example.loss_mask[1:].sum()) for row, example in found.examples.items()}
    changes = {row.row: row.change * targets[row.row] for row in difference.rows}
    code = [row for row, group in found.groups.items() if group == "code"]
    expected = sum(changes[row] for row in code) / sum(targets[row] for row in code)
    assert difference.estimates["loss, code"].value == pytest.approx(expected)
    assert difference.estimates["loss"].value == pytest.approx(sum(changes.values()) / sum(targets.values()))
    same = compare(one, one, rows="general", answers=0)
    assert same.differences[0].same


def test_rows_of_ones_own_are_compared_and_answered_too(pair):
    one, other = pair
    own = [*tiny_rows(3), {"messages": [{"role": "user", "content": "no answer"}]}]
    found = compare(one, other, rows=own, metrics=["exact_match"], max_tokens=2)
    assert list(found.examples) == [0, 1, 2]
    assert found.references == {0: "redred", 1: "greengreen", 2: "blueblue"}
    assert found.differences[0].estimates["exact_match"].rows == 3
    with pytest.raises(DataError, match="none of these rows can be measured"):
        compare(one, other, rows=own[3:])
