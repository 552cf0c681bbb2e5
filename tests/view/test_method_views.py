"""What a person sees of pairs, labels, prompts and rollouts: rows, batches, checks."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mlx_nb.cli import main
from mlx_nb.errors import DataError
from mlx_nb.notebook.commands import run_line
from mlx_nb.notebook.session import Session
from mlx_nb.view.rows.batch import BatchDisplay, line_names
from tiny import tiny_labels, tiny_pairs, tiny_prompts

# Batches


def test_each_line_of_a_batch_of_pairs_says_which_answer_it_is(make_run):
    run = make_run("dpo")
    (batch,) = run.trainer.next_batches()
    first, second = batch.rows
    names = [f"row {row} {answer}" for answer in ("chosen", "rejected") for row in (first, second)]
    assert line_names(batch) == names
    shown = BatchDisplay([batch], run.tokenizer)
    assert [line.split(":")[0].strip() for line in repr(shown).splitlines()[1:]] == names
    html = shown._repr_html_()
    assert all(f"<b>{name}</b>" in html for name in names)
    weighted = batch._replace(row_values={"weight": np.array([2.0, 1.0]), "margin": np.array([0.0, 0.5])})
    assert line_names(weighted)[:2] == [f"row {first} chosen, weight 2", f"row {second} chosen, margin 0.5"]


def test_the_constants_of_a_batch_are_reported_with_the_tokens_that_count(make_run):
    run = make_run("dpo")
    (batch,) = run.trainer.next_batches()
    at = int(np.flatnonzero(batch.loss_mask_BT[0])[0])
    reference = batch.token_values["reference"][0, at]
    html = BatchDisplay([batch], run.tokenizer)._repr_html_()
    assert f"weight 1 · reference {reference:.4g}" in html
    assert html.count("· reference") == np.count_nonzero(batch.loss_mask_BT)


def test_each_line_of_a_batch_of_labeled_answers_says_its_label(make_run):
    (batch,) = make_run("kto").trainer.next_batches()
    assert line_names(batch) == [f"row {row}, label: {'good' if row % 2 else 'bad'}" for row in batch.rows]


def test_a_batch_of_completions_is_there_once_they_are_sampled(make_run):
    run = make_run("grpo", updates_per_rollout=2, mask_truncated_completions=True)
    session = Session()
    session.add(run)
    assert "no completions have been sampled yet" in repr(run_line(session, "batch"))
    assert "no completions have been sampled yet" in run_line(session, "batch")._repr_html_()
    run.step()
    (batch,) = run.trainer.next_batches()
    names = line_names(batch)
    assert [name.split(",")[0] for name in names] == [
        f"row {row} completion {number}" for row in dict.fromkeys(batch.rows) for number in (0, 1, 2)
    ]
    for name, advantage, counts in zip(names, batch.row_values["advantage"], batch.row_values["counts"]):
        assert f"advantage {advantage:+.3f}" in name
        assert name.endswith("cut and not trained") == (counts == 0)
    assert repr(run_line(session, "batch")).count("completion") == 6


def test_skipping_before_a_rollout_names_the_prompts_it_would_have_used(make_run):
    session = Session()
    run = make_run("grpo")
    session.add(run)
    rows = ", ".join(map(str, run.trainer.next_rows()))
    assert f"leave out the batch with rows {rows}." in run_line(session, "skip")


# The data check


@pytest.mark.parametrize(("method", "kind"), [("dpo", "pairs"), ("kto", "labels"), ("grpo", "prompts")])
def test_the_check_of_a_run_knows_the_rows_of_its_method(make_run, method, kind):
    check = make_run(method).check()
    assert check.kind == kind
    assert check.ok
    assert check.splits[0].trainable == check.splits[0].rows


def test_rows_are_printed_with_both_answers_and_labels(tiny_folder, tmp_path, capsys):
    def records(rows, method):
        path = tmp_path / f"{method}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert main(["check", str(path), "--model", str(tiny_folder), "--rows", "val_set_size=0", *method.split()]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    pair = records(tiny_pairs(3), "method=dpo")[0]
    assert set(pair["rejected"]) == {"tokens", "loss_mask", "spans"}
    assert pair["rejected"]["tokens"] != pair["tokens"]
    assert [record["label"] for record in records(tiny_labels(3), "method=kto")] == [False, True, False]
    prompt = records(tiny_prompts(3), "method=grpo rewards=[number_match]")[0]
    assert prompt["tokens"]
    assert set(prompt["loss_mask"]) == {0}


# Rows


def test_a_row_of_a_pair_shows_both_answers(make_run):
    run = make_run("dpo")
    row = run.rows()[1]
    assert "✓ chosen" in repr(row)
    assert "✗ rejected" in repr(row)
    html = row._repr_html_()
    assert "blue" in tiny_pairs()[1]["rejected"]
    assert html.index("✓ chosen") < html.index("greengreen") < html.index("✗ rejected") < html.index(">blue")
    weighted = make_run("dpo", data=[{**pair, "margin": 0.5} for pair in tiny_pairs()]).rows()[0]
    assert "margin: 0.5" in weighted._repr_html_()
    assert "margin: 0.5" in repr(weighted)


def test_losses_of_both_answers_are_measured_and_shown(make_run):
    run = make_run("dpo")
    run.step(2)
    session = Session()
    session.add(run)
    row = run.rows()[1]
    chosen, rejected = run.token_losses(row), run.token_losses(row, rejected=True)
    assert len(rejected) == len(row.rejected.tokens)
    means = [
        float(np.mean(losses[said.loss_mask != 0]))
        for losses, said in ((chosen, row.conversation), (rejected, row.rejected))
    ]
    html = run_line(session, "row 1 --loss")._repr_html_()
    for mean in means:
        assert f"mean loss of the trained tokens {mean:.3f} nats" in html
    assert run_line(session, "row 1 --compare base")._repr_html_().count("base model") > 2
    browser = run.browse()
    browser.color.value = "loss now"
    assert browser.view.value.count("mean loss of the trained tokens") == 2
    with pytest.raises(DataError, match="row 1 is not a pair"):
        make_run("kto").token_losses(make_run("kto").rows()[1], rejected=True)


def test_a_labeled_row_says_its_label(make_run):
    rows = make_run("kto").rows()
    for row, said in ((0, "✗ label: bad"), (1, "✓ label: good")):
        assert said in rows[row]._repr_html_()
        assert said in repr(rows[row])


def test_a_prompt_shows_what_its_rewards_are_given(make_run):
    run = make_run("grpo", data=[{"prompt": "say <b>", "answer": "<i>x</i>", "hint": {"a": 1}}] * 12)
    row = run.rows()[0]
    html, text = row._repr_html_(), repr(row)
    assert "&lt;i&gt;x&lt;/i&gt;" in html
    assert "<i>" not in html
    assert "answer: <i>x</i>" in text
    assert "hint: {'a': 1}" in text
    assert "0 trained" in text
