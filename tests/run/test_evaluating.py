"""Evaluations with metrics: what they measure, that they change nothing, and that they go on where they were."""

from __future__ import annotations

import json
import math
import os
import signal

import mlx.core as mx
import numpy as np
import pytest

from mlx_nb import Run, RunConfig
from mlx_nb.cli import main
from mlx_nb.errors import ConfigError, DataError
from mlx_nb.events import EvaluationCompleted, Progress, event_from_json
from mlx_nb.train import answer_metrics
from tiny import tiny_labels, tiny_pairs, tiny_prompts, tiny_rows


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_NB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "answers"


def run_of(folder, tiny_folder, namespace=None, **settings):
    values = {
        "model": str(tiny_folder),
        "data": tiny_rows(24),
        "iters": 4,
        "batch_size": 4,
        "val_set_size": 8,
        "steps_per_eval": 2,
        "save_every": -1,
        "adapter_path": str(folder / "a"),
    }
    return Run(RunConfig.from_dict({**values, **settings}), namespace=namespace)


def evaluations(run):
    return [event for event in run.history.in_effect if isinstance(event, EvaluationCompleted)]


def length(completion):
    return len(completion)


def test_a_metric_gets_the_answer_that_generate_gives_and_the_reference_of_the_row(tmp_path, tiny_folder):
    seen = []

    def note(completion, reference, prompt, row):
        seen.append((completion, reference, prompt, row))
        return True

    run = run_of(tmp_path, tiny_folder)
    result = run.evaluate(metrics=[note], max_tokens=6)
    assert result.metrics == {"note": 1.0}
    rows = {row for row, _ in result.row_losses}
    held_out = {run.rows("valid")[row].content.messages[-1]["content"] for row in rows}
    assert {reference for _, reference, _, _ in seen} == held_out
    for completion, reference, prompt, row in seen:
        assert row["messages"][-1]["content"] == reference
        assert prompt == [{"role": "user", "content": row["messages"][0]["content"]}]
        assert completion == run.generate(prompt, max_tokens=6)


@pytest.mark.parametrize(
    ("method", "rows", "reference"),
    [("dpo", tiny_pairs, "chosen"), ("kto", tiny_labels, "completion"), ("grpo", tiny_prompts, "answer")],
)
def test_rows_of_every_kind_are_compared_with_their_own_good_answer(tmp_path, tiny_folder, method, rows, reference):
    seen = []

    def note(completion, answer, row):
        seen.append((answer, row))
        return 1.0

    rewards = {"rewards": ["exact_match"], "max_completion_length": 4} if method == "grpo" else {}
    run = run_of(tmp_path, tiny_folder, method=method, data=rows(24), **rewards)
    result = run.evaluate("train", metrics=[note], max_tokens=3)
    assert seen
    assert not [problem for problem in result.problems if "not evaluated" in problem]
    for answer, row in seen:
        assert answer == row[reference]
        assert row.get("label", True)


def test_plain_text_asks_nothing_and_says_so(tmp_path, tiny_folder):
    run = run_of(tmp_path, tiny_folder, data=[{"text": f"say {word}"} for word in "abcdefgh"], val_set_size=2)
    with pytest.raises(DataError, match="plain text has no question"):
        run.evaluate(metrics=["exact_match"])


def test_the_loss_of_a_split_is_weighted_by_token_and_so_are_its_bits_per_byte(tmp_path, tiny_folder):
    run = run_of(tmp_path, tiny_folder)
    result = run.evaluate("train", all_rows=True)
    nats = bytes_of_targets = tokens = 0.0
    for row in range(len(run.rows("train"))):
        view = run.rows("train")[row]
        trained = view.example.loss_mask != 0
        nats += float(np.asarray(run.token_losses(view))[trained].sum())
        tokens += int(trained.sum())
        text = run.tokenizer.decode(view.example.tokens[trained].tolist(), skip_special_tokens=True)
        bytes_of_targets += len(text.encode())
    assert result.loss == pytest.approx(nats / tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / bytes_of_targets, rel=1e-5)
    for name in ("loss", "perplexity", "bits_per_byte"):
        low, high = result.intervals[name]
        assert low < getattr(result, name) < high


def test_an_evaluation_survives_the_history_file(tmp_path, tiny_folder):
    result = run_of(tmp_path, tiny_folder).evaluate(metrics=["exact_match"], max_tokens=3)
    again = event_from_json(result.to_json())
    assert again.intervals == result.intervals
    assert again.answer_metrics == ["exact_match"]


def test_metrics_at_validation_change_no_bit_of_the_training(tmp_path, tiny_folder):
    def noisy(completion):
        mx.random.seed(7)
        return float(mx.random.uniform().item())

    plain = run_of(tmp_path / "plain", tiny_folder, lora_parameters={"dropout": 0.3, "rank": 4})
    plain.run()
    judged = run_of(
        tmp_path / "judged",
        tiny_folder,
        {"noisy": noisy},
        lora_parameters={"dropout": 0.3, "rank": 4},
        metrics=["exact_match", "noisy"],
        metric_tokens=5,
    )
    judged.run()
    assert judged.adapter_bytes() == plain.adapter_bytes()
    assert judged.history["loss"] == plain.history["loss"]
    assert [list(one.metrics) for one in evaluations(judged)] == [["exact_match", "noisy"]] * 3


@pytest.mark.long
def test_best_by_metric_keeps_another_adapter_than_best_by_loss(tmp_path, tiny_folder):
    """A metric that is best where it is measured second, whatever the loss, which falls until the end."""
    calls = []

    def second(completions):
        calls.append(1)
        return [1.0 if len(calls) == 2 else 0.0] * len(completions)

    def run_by(name, **more):
        calls.clear()
        settings = {"learning_rate": 1e-2, "metrics": ["second"], "metric_tokens": 2, **more}
        run = run_of(tmp_path / name, tiny_folder, {"second": second}, **settings)
        run.run()
        return run

    by_loss, by_metric = run_by("loss"), run_by("metric", best_by="second")
    assert by_loss.history.best_validation["step"] == 4
    assert by_metric.history.best_validation["step"] == 2
    assert by_metric.history.finished.best_step == 2
    files = [(run.folder / "best" / "adapters.safetensors").read_bytes() for run in (by_loss, by_metric)]
    assert files[0] != files[1]
    assert by_loss.adapter_bytes() == by_metric.adapter_bytes()
    assert "second 1.0000 at update 2" in by_metric.status()


@pytest.mark.long
def test_exact_match_grows_at_validation_on_rows_that_are_held_out(tmp_path, tiny_folder):
    settings = {"data": tiny_rows(120), "iters": 120, "batch_size": 12, "val_set_size": 24, "steps_per_eval": 30}
    judged = {"metrics": ["exact_match"], "metric_tokens": 12, "best_by": "exact_match"}
    run = run_of(tmp_path, tiny_folder, fine_tune_type="full", learning_rate=1e-2, **settings, **judged)
    run.run()
    matches = [one.metrics["exact_match"] for one in evaluations(run)]
    assert matches[0] == 0.0
    assert matches[1] > 0.2
    assert matches[-1] > 0.9
    lows = [one.intervals["loss"][0] for one in evaluations(run)]
    assert min(lows) >= 0.0
    # The first of those that match most, not the one with the lowest loss, which still falls.
    assert run.history.best_validation["step"] == 30 * matches.index(max(matches))


def test_early_stopping_counts_the_metric(tmp_path, tiny_folder):
    settings = {"iters": 8, "steps_per_eval": 1, "early_stopping_patience": 2, "metric_tokens": 2}
    run = run_of(tmp_path, tiny_folder, metrics=["json_valid"], best_by="json_valid", **settings)
    assert run.run().reason == "early stopping"
    assert run.step_count == 2


@pytest.mark.parametrize("kill_at", [1, 3])
@pytest.mark.matrix(every=2)
def test_a_run_that_is_resumed_keeps_its_best_by_metric(tmp_path, tiny_folder, kill_at):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows()))
    settings = {"data": str(rows), "iters": 6, "metrics": ["chars"], "best_by": "chars", "metric_tokens": 4}
    namespace = {"chars": lambda completion: len(completion)}
    whole = run_of(tmp_path / "whole", tiny_folder, namespace, learning_rate=1e-2, **settings)
    whole.run()
    parts = run_of(tmp_path / "parts", tiny_folder, namespace, learning_rate=1e-2, **settings)
    parts.run(until=kill_at) if kill_at > 1 else parts.step()
    parts.release()
    again = Run.resume(parts.folder, namespace=namespace)
    again.run(until=6)
    assert again.adapter_bytes() == whole.adapter_bytes()
    assert again.history.finished.best_step == whole.history.finished.best_step
    assert [one.metrics for one in evaluations(again)][-3:] == [one.metrics for one in evaluations(whole)][-3:]


@pytest.mark.long
def test_a_fork_by_another_metric_finds_its_best_again(tmp_path, tiny_folder):
    run = run_of(tmp_path, tiny_folder, {"length": length}, iters=8, metrics=["length"], metric_tokens=3)
    run.run(until=4)
    fork = run.fork(name="by-length", best_by="length", adapter_path=str(tmp_path / "b"))
    assert fork.trainer.state.best_step is None
    fork.run()
    assert fork.history.finished.best_step > 4


def test_a_data_file_that_is_emptied_later_changes_no_metric(tmp_path, tiny_folder):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows()))
    run = run_of(tmp_path, tiny_folder, {"length": length}, data=str(rows), metrics=["length"], metric_tokens=3)
    run.step()
    rows.write_text("")
    run.run()
    assert [list(one.metrics) for one in evaluations(run)] == [["length"]] * 3


def test_answers_are_kept_by_the_state_of_the_model(tmp_path, tiny_folder, monkeypatch):
    generated = []
    original = answer_metrics.sampling_each
    monkeypatch.setattr(
        answer_metrics, "sampling_each", lambda *args, **options: generated.append(1) or original(*args, **options)
    )
    run = run_of(tmp_path, tiny_folder)
    first = run.evaluate(metrics=["exact_match"], max_tokens=3)
    assert len(generated) == 1
    again = run.evaluate(metrics=["exact_match", length], max_tokens=3)
    assert len(generated) == 1
    assert again.metrics["exact_match"] == first.metrics["exact_match"]
    run.evaluate(metrics=["exact_match"], max_tokens=4)
    assert len(generated) == 2
    run.step()
    run.evaluate(metrics=["exact_match"], max_tokens=3)
    assert len(generated) == 3


@pytest.mark.long
def test_an_interrupted_evaluation_changes_nothing_and_continues(tmp_path, tiny_folder, monkeypatch, cache):
    monkeypatch.setattr(answer_metrics, "ROWS_AT_ONCE", 2)
    run = run_of(tmp_path, tiny_folder)
    run.step()
    before = run.adapter_bytes()

    def stop_in_the_second_batch(event):
        if isinstance(event, Progress) and event.what == "valid answers" and event.done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    run.listen(stop_in_the_second_batch)
    with pytest.raises(KeyboardInterrupt):
        run.evaluate(metrics=["exact_match", length], max_tokens=5)
    run.unlisten(stop_in_the_second_batch)
    assert len(list(cache.glob("*.json"))) == 1
    assert run.adapter_bytes() == before
    resumed = run.evaluate(metrics=["exact_match", length], max_tokens=5)
    for file in cache.iterdir():
        file.unlink()
    assert run.evaluate(metrics=["exact_match", length], max_tokens=5).metrics == resumed.metrics
    run.run()


def test_an_interrupt_ends_a_metric_function_that_never_returns(tmp_path, tiny_folder):
    def endless(completion):
        while True:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_of(tmp_path, tiny_folder).evaluate(metrics=[endless], max_tokens=2)


def test_a_second_interrupt_ends_a_metric_function_in_a_validation_and_pauses_the_run(tmp_path, tiny_folder):
    calls = []

    def endless(completion):
        calls.append(1)
        while len(calls) < 2:
            os.kill(os.getpid(), signal.SIGINT)
        return 1.0

    run = run_of(tmp_path, tiny_folder, {"endless": endless}, metrics=["endless"], metric_tokens=2)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert run.state == "paused"
    assert run.step_count == 0
    run.run()
    assert [one.metrics for one in evaluations(run)] == [{"endless": 1.0}] * 3


def test_a_file_of_answers_that_cannot_be_read_is_made_again(tmp_path, tiny_folder, cache):
    run = run_of(tmp_path, tiny_folder)
    first = run.evaluate(metrics=[length], max_tokens=3)
    for file in cache.glob("*.json"):
        file.write_text("{}")
    assert run.evaluate(metrics=[length], max_tokens=3).metrics == first.metrics


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (
            ["exact_mach"],
            "metric 'exact_mach' is neither a function of yours nor built in. Did you mean 'exact_match'?",
        ),
        (["regex"], "metric regex needs a value"),
        ([], "`metrics` is empty"),
        ([lambda text: 1.0], "requires parameter `text`"),
        (["exact_match", "exact_match"], "`metrics` has exact_match twice"),
    ],
)
def test_a_metric_that_cannot_be_called_is_refused_before_anything_is_generated(tmp_path, tiny_folder, metrics, words):
    with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
        run_of(tmp_path, tiny_folder).evaluate(metrics=metrics)


def test_a_metric_named_like_a_number_of_every_evaluation_is_refused(tmp_path, tiny_folder):
    def loss(completion):
        return 1.0

    with pytest.raises(ConfigError, match="`metrics`: loss is a metric already"):
        run_of(tmp_path, tiny_folder).evaluate(metrics=[loss])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"best_by": "exact_match"}, "`best_by` cannot be 'exact_match'"),
        ({"metrics": ["exact_match"], "best_by": "exact_mach"}, "Did you mean 'exact_match'"),
        ({"metrics": ["exact_match"], "steps_per_eval": -1}, "`metrics` has no effect"),
        ({"metric_tokens": 5}, "`metric_tokens` has no effect without `metrics`"),
        ({"metrics": []}, "`metrics` is empty"),
    ],
)
def test_settings_of_metrics_without_effect_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        RunConfig.from_dict(settings)


def test_a_column_that_no_row_has_is_named_before_the_training(tmp_path, tiny_folder):
    def judged(completion, difficulty):
        return 1.0

    run = run_of(tmp_path, tiny_folder, {"judged": judged}, metrics=["judged"])
    with pytest.raises(ConfigError, match="metric judged requires parameter `difficulty`"):
        run.step()


def test_a_metric_that_fails_on_some_rows_is_the_mean_of_the_others(tmp_path, tiny_folder):
    def picky(completion, reference):
        if reference.startswith("r"):
            raise ValueError("not this one")
        return 1.0

    result = run_of(tmp_path, tiny_folder).evaluate("train", metrics=[picky], max_tokens=2)
    assert result.metrics["picky"] == 1.0
    assert "metric picky: completion 0 of row" in result.problems[0]
    assert "not this one" in result.problems[0]


def test_the_panel_draws_metrics_of_answers_as_curves_of_their_own(tmp_path, tiny_folder):
    from mlx_nb.view.curves.curves import SeriesBuilder

    run = run_of(tmp_path, tiny_folder, {"length": length}, metrics=["length"], metric_tokens=3, best_by="length")
    run.run()
    series = SeriesBuilder(run.history).series(4)
    assert series["shown"][:2] == ["loss", "length"]
    (group,) = [group for group in series["groups"] if group["name"] == "length"]
    (line,) = group["lines"]
    assert (line["role"], line["step"]) == ("valid", [0, 2, 4])
    assert line["value"] == [pytest.approx(one.metrics["length"]) for one in evaluations(run)]
    assert series["best"]["group"] == "length"
    titles = [axes.get_title(loc="left") for axes in run.plot().axes]
    assert "length" in titles


def test_a_saved_adapter_is_evaluated_in_a_terminal_and_left_as_it_is(tmp_path, tiny_folder, capsys, cache):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows()))
    run = run_of(tmp_path, tiny_folder, data=str(rows), learning_rate=1e-2)
    run.run()
    expected = run.evaluate(metrics=["exact_match", {"regex": "e"}], max_tokens=4)
    base = run_of(tmp_path / "base", tiny_folder, data=str(rows)).evaluate()
    run.release()
    before = {file: file.read_bytes() for file in run.folder.rglob("*") if file.is_file()}
    words = ["evaluate", str(run.folder), "--metrics", "exact_match,{regex: e}", "--max-tokens", "4", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert found["metrics"] == expected.metrics
    assert len(list(cache.glob("*.json"))) == 1  # the answers of the run itself were found again
    assert {file: file.read_bytes() for file in run.folder.rglob("*") if file.is_file()} == before
    assert main(["evaluate", str(run.folder), "--base", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(base.loss, rel=1e-6)
    assert main(["evaluate", str(tmp_path / "nothing")]) == 1
