"""Runs in words: what each event says, what a summary counts, how long is left."""

from __future__ import annotations

import dataclasses

import pytest

from mlx_nb.events import (
    EvaluationCompleted,
    Progress,
    RolloutCompleted,
    RunFinished,
    RunStarted,
    SampleGenerated,
    StepCompleted,
)
from mlx_nb.events.history import History
from mlx_nb.view.event_text import (
    describe,
    duration,
    elapsed_words,
    progress_line,
    remarks,
    rollout_words,
    summary_rows,
)
from mlx_nb.view.metric_text import decimals, main_metrics, number, reward_of
from mlx_nb.view.pace import time_left
from mlx_nb.view.panel.state import progress_of


def update(step: int, loss: float = 1.0, **metrics: float) -> StepCompleted:
    return StepCompleted(step, loss, 1e-4, 0.5, 12.0, 40, 2.0, 1000, 0.3, (4, 7), metrics)


def evaluation(step: int, loss: float, perplexity: float | None = None, **metrics: float) -> EvaluationCompleted:
    return EvaluationCompleted(step, "valid", loss, perplexity, 40.0, 4, 0.2, metrics=metrics)


def best(measured: EvaluationCompleted) -> EvaluationCompleted:
    return dataclasses.replace(measured, best=True)


def completion(reward: float | None = 1.0, finished: bool = True, **changed) -> dict:
    said = {"text": "red", "rewards": {"right": reward}, "reward": reward, "advantage": 0.5, "tokens": 3}
    return {**said, "finished": finished, **changed}


def rollout(step: int, *groups: list[dict], seconds: float = 3.0, problems: tuple[str, ...] = ()) -> RolloutCompleted:
    reported = tuple({"row": row, "prompt": "say red", "completions": group} for row, group in enumerate(groups))
    return RolloutCompleted(step, reported, seconds, problems=problems)


def test_the_metrics_that_say_most_come_first_and_times_never():
    dpo = ["accuracy", "margin", "reward_chosen", "logprob_chosen", "kl"]
    assert main_metrics(dpo, 2) == ["accuracy", "margin"]
    grpo = ["entropy", "kl", "completion_tokens", "seconds_sampling", "reward", "reward_short", "seconds_short"]
    assert main_metrics(grpo) == ["reward", "kl", "completion_tokens"]
    assert main_metrics(["mine", "seconds_x", "other"]) == ["mine", "other"]
    assert main_metrics([]) == []


@pytest.mark.parametrize(
    ("value", "said"), [(2.8e-7, "0"), (0.0, "0"), (-1.54394, "-1.54"), (23.25, "23.2"), (1e-4, "0.0001")]
)
def test_a_number_is_reported_with_three_digits_and_rounding_errors_as_zero(value, said):
    assert number(value) == said


def test_a_small_loss_never_reads_as_zero():
    assert [decimals(value) for value in (2.71828, 0.01, 0.00045778, 0.0, -0.0021)] == [
        "2.718",
        "0.010",
        "0.00046",
        "0.000",
        "-0.0021",
    ]
    history = History([update(1, loss=0.00045778), evaluation(1, 0.00031)])
    for text in (progress_line(history, 2), " · ".join(progress_of(history, 2, 40)["parts"])):
        assert "loss 0.00046" in text
        assert "validation 0.00031" in text


def test_an_evaluation_says_perplexity_or_what_the_method_measures():
    assert describe(evaluation(3, 1.0, 2.718)) == "update 3: valid loss 1.0000, perplexity 2.72 (4 rows)"
    pairs = evaluation(3, 0.64, accuracy=0.75, margin=0.12345, reward_chosen=1.0, kl=0.2)
    assert describe(pairs) == "update 3: valid loss 0.6400, accuracy 0.75, margin 0.123 (4 rows)"
    assert describe(evaluation(3, 0.64)) == "update 3: valid loss 0.6400 (4 rows)"


def test_a_loss_that_is_minus_a_reward_is_reported_as_the_reward():
    rewards = evaluation(3, -0.5, reward=0.5, completion_tokens=20.0, seconds_sampling=3.0)
    assert describe(rewards) == "update 3: valid reward 0.5000, completion tokens 20 (4 rows)"
    history = History([rewards, update(4, reward=0.4), evaluation(4, -0.75, reward=0.75)])
    assert dict(summary_rows(history))["validation reward"] == "0.5000 → 0.7500"
    assert "validation reward 0.750" in progress_line(history, 10)
    assert "reward 0.400" in progress_line(history, 10)
    assert reward_of({"loss": 0.7, "perplexity": None, "reward": 0.5}) is None
    assert reward_of({"loss": 1.0, "perplexity": 2.7}) is None


def test_the_summary_tells_the_methods_metrics_and_the_best_reward():
    finished = RunFinished(4, "iters reached", 8.0, 160, 48.0, -0.75, 4, "adapters/run")
    history = History(
        [
            RunStarted(0, "run", 4, 10, 100, 8, 4),
            rollout(0, [completion()], seconds=3.0),
            update(1, reward=0.1, kl=0.0),
            rollout(1, [completion()], seconds=4.0),
            update(2, reward=0.4, kl=0.02),
            best(evaluation(4, -0.75, reward=0.75, kl=0.1)),
            finished,
        ]
    )
    rows = dict(summary_rows(history))
    assert rows["training reward"] == "0.1 → 0.4"
    assert rows["training kl"] == "0 → 0.02"
    assert rows["validation reward"] == "0.7500 (kl 0.1)"
    assert rows["best validation"] == "reward 0.7500 at update 4"
    assert "sampling 7 s" in rows["elapsed"]
    plain = dict(summary_rows(History([update(1), evaluation(1, 1.0, 2.718)])))
    assert plain["validation loss"] == "1.0000 (perplexity 2.72)"
    assert "training reward" not in plain
    assert "sampling" not in plain["elapsed"]


def test_a_run_that_is_not_over_tells_its_best_validation_too():
    history = History([best(evaluation(0, 2.0)), update(1), best(evaluation(1, 1.0)), update(2), evaluation(2, 1.5)])
    rows = dict(summary_rows(history))
    assert rows["best validation"] == "1.0000 at update 1"
    assert "adapter" not in rows


def test_a_rollout_is_counted_in_one_line_and_its_problems_are_reported_beside():
    reported = rollout(
        2, [completion(1.0), completion(0.0, finished=False)], [completion(None)], problems=("right: bad",)
    )
    assert describe(reported) == (
        "update 2: 3 completions of 2 prompts, reward 0.5 ± 0.5, 1 cut off, sampled in 3.0 s, 1 problem"
    )
    assert remarks(reported) == ("right: bad",)
    assert "no reward" in rollout_words(rollout(0, [completion(None)]))
    assert remarks(RunStarted(0, "run", 4, 10, 100, 8, 4, ("a note",))) == ("a note",)
    assert remarks(update(1)) == ()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("completions", "sampling completions: 1,200 of at most 4,096 tokens"),
        ("reward short", "reward short: 1,200 of 4,096 completions"),
        ("reference", "log-probabilities of the reference: 1,200 of 4,096 completions"),
        ("valid loss", "valid loss: 1200 of 4096"),
    ],
)
def test_progress_says_what_is_being_done(what, said):
    assert describe(Progress(3, what, 1200, 4096)) == said


def test_the_time_left_is_the_same_wherever_it_is_shown():
    slow, *steady = [dataclasses.replace(update(step), seconds=1.0) for step in range(1, 5)]
    history = History([dataclasses.replace(slow, seconds=10.0), *steady])
    assert "1:36 left" in progress_line(history, 100)
    assert "1:36 left" in progress_of(history, 100, 0)["parts"]


def test_the_time_left_counts_sampling_too():
    plain = History([update(step) for step in (1, 2, 3)])
    assert time_left(plain, 5) == pytest.approx(4.0)
    sampled = History()
    for step in range(1, 5):
        # Two updates use the same completions.
        if step % 2:
            sampled.append(rollout(step - 1, [completion()]))
        sampled.append(update(step, seconds_sampling=3.0, seconds_right=1.0))
    assert time_left(sampled, 6) == pytest.approx(2 * (2.0 + 4.0 / 2))


def test_elapsed_is_the_wall_clock_and_says_what_it_went_into(monkeypatch):
    clock = iter(range(100, 10_000, 10))
    monkeypatch.setattr("mlx_nb.events.history.time.monotonic", lambda: float(next(clock)))
    history = History()
    answer = SampleGenerated(1, "Hello", "Hi", None, seconds=3.0)
    for event in (update(1), evaluation(1, 1.0), rollout(1, [completion()], seconds=4.0), answer, update(2)):
        history.append(event)
    spent = history.spent()
    assert spent["sampling"] == 4.0 + 3.0
    assert history.elapsed == 40 + update(1).seconds
    assert f"{duration(history.elapsed)} elapsed" in progress_of(history, 9, 0)["parts"]
    waiting = history.elapsed - sum(spent.values())
    assert elapsed_words(history).endswith(f"waiting {waiting:.0f} s")
    again = History(history.events)  # read from a file, in another process
    assert again.elapsed == sum(spent.values())
    again.append(update(3))
    again.append(update(4))
    assert again.elapsed == sum(spent.values()) + update(3).seconds + 10


def test_the_end_of_a_run_that_overfits_says_so_and_names_the_best_adapter():
    def reported(last: float) -> dict[str, str]:
        losses = [best(evaluation(0, 3.0)), update(1), best(evaluation(2, 1.0)), update(4), evaluation(4, last)]
        return dict(
            summary_rows(History([*losses, RunFinished(4, "iters reached", 8.0, 1, 1.0, 1.0, 2, "adapters/x")]))
        )

    assert reported(1.5)["overfitting"] == (
        "validation loss rose from 1.0000 at update 2 to 1.5000. The adapter of update 2 is in adapters/x/best"
    )
    assert "overfitting" not in reported(1.005)
    assert "overfitting" not in reported(0.9)


def test_a_pace_of_few_updates_says_so():
    few, many = (History(update(step) for step in range(1, count + 1)) for count in (2, 9))
    assert "(of 2 updates)" in progress_line(few, 10)
    assert "(of 2 updates)" in dict(summary_rows(few))["tokens"]
    assert "updates)" not in progress_line(many, 10)
