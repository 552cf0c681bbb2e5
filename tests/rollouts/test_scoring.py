"""Whatever a reward function does, its numbers are used, or it is said which are missing and why."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from mlx_nb.errors import ConfigError
from mlx_nb.rollouts.rewards import call
from mlx_nb.rollouts.rewards.resolve import completion_batch, resolve_rewards
from mlx_nb.rollouts.rewards.score import PROBLEMS_SPELLED_OUT, score_completions
from reward_batches import TEXTS, batch_of, column_of, my_reward, scores_of

# Functions that go wrong


def failing_on_two(completions):
    found = []
    for text in completions:
        found.append(1 / (len(text.split()) - 2))
    return found


def failing_on_two_alone(completion):
    words = completion.split()
    return 1 / (len(words) - 2)


@pytest.mark.parametrize(("function", "line"), [(failing_on_two, 4), (failing_on_two_alone, 3)])
def test_the_completion_that_a_function_raises_on_is_named_and_the_others_keep_their_numbers(function, line):
    values, problems = column_of(function)
    assert np.array_equal(values, [-1.0, math.nan, 1.0, -1.0], equal_nan=True)
    name = function.__name__
    assert problems == [
        f'reward {name}: completion 1 of row 17 ("two words"): ZeroDivisionError: division by zero '
        f"(line {line} of {name})."
    ]


def test_a_problem_counts_completions_within_their_row_and_knows_its_index():
    problem = scores_of(lambda completion: 1 if completion != "four" else None).problems[0]
    assert problem.completion_index == 3
    assert problem.error == 'reward <lambda>: completion 1 of row 20 ("four"): it returned None, not a number.'


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (math.nan, "nan, which is not finite"),
        (math.inf, "inf, which is not finite"),
        (10**400, "which is not finite"),
        (None, "None, not a number"),
        ("high", 'the text "high", not a number'),
        ([0.5], "a list, not a number"),
        (np.array([0.5]), "a list, not a number"),
        (1j, "a complex, not a number"),
    ],
)
def test_what_is_no_finite_number_is_missing(value, said):
    for function in (lambda completion: value, lambda completions: [value] * len(completions)):
        values, problems = column_of(function)
        assert np.isnan(values).all()
        assert said in problems[0]


def test_a_wrong_number_of_values_is_traced_to_the_completion():
    values, problems = column_of(lambda completions: [1.0 for text in completions if "more" not in text])
    assert np.array_equal(values, [1.0, 1.0, math.nan, 1.0], equal_nan=True)
    expected = 'reward <lambda>: completion 0 of row 20 ("three more words"): it returned 0 values for 1 completion.'
    assert problems == [expected]


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (0.5, "it returned 0.5 for 4 completions, and it returned 0.5 for 1 completion"),
        ([1, 2, 3], "it returned 3 values for 4 completions, and it returned 3 values for 1 completion"),
        ({"a": 1}, "it returned a dict for 4"),
        (None, "it returned None for 4"),
    ],
)
def test_a_shape_that_is_wrong_even_for_one_completion_is_reported_once(result, said):
    values, problems = column_of(lambda completions: result)
    assert np.isnan(values).all()
    assert len(problems) == 1
    assert said in problems[0]
    assert "It must return a list with one number for each completion" in problems[0]
    alone = column_of(lambda completions: result, batch=batch_of(["one"]))
    assert "It must return a list" in alone[1][0]


def test_a_function_that_fails_only_on_all_at_once_keeps_the_numbers_it_gives_one_at_a_time():
    def fragile(completions):
        if len(completions) > 1:
            raise OSError("too many at once")
        return [2.0]

    values, problems = column_of(fragile)
    assert values == [2.0] * 4
    assert problems == [
        "reward fragile: OSError: too many at once (line 3 of fragile) for 4 completions at once; "
        "called for one at a time it gave numbers."
    ]


def test_few_problems_are_spelled_out_and_the_rest_counted():
    batch = batch_of(["x"] * 10, rows=range(10))
    values, problems = column_of(lambda completion: None, batch=batch)
    assert np.isnan(values).all()
    assert len(problems) == PROBLEMS_SPELLED_OUT + 1
    assert problems[-1] == "reward <lambda>: 7 completions more without a number."


def test_a_problem_is_one_short_line_whatever_the_error_and_the_text_are():
    class Unspeakable(Exception):
        def __str__(self):
            raise RuntimeError

    def loud(completion):
        raise Unspeakable if completion == "four" else ValueError("a\nb" * 5000)

    problems = column_of(loud, batch=batch_of(["line\nbreak " * 50, "four"]))[1]
    assert all("\n" not in problem and len(problem) < 350 for problem in problems)
    assert '("line break line break l…")' in problems[0]
    assert "Unspeakable (line 2 of Unspeakable)" not in problems[1]
    assert "Unspeakable" in problems[1]


def test_a_failing_helper_of_the_notebook_is_where_the_line_points():
    def helper(text):
        raise KeyError(text)

    assert "KeyError: 'one' (line 2 of helper)" in column_of(lambda completion: helper(completion))[1][0]


def test_a_built_in_says_what_is_missing_without_a_line_of_its_own():
    batch = completion_batch([SimpleNamespace(prompt="a", answer=None, columns={}, row=3)], ["12"], [[1]], ())
    scores = scores_of("number_match", batch=batch)
    expected = 'reward number_match: completion 0 of row 3 ("12"): ValueError: the row has no answer.'
    assert scores.problems[0].error == expected


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_passes_through(kind):
    def interrupted(completion):
        raise kind

    async def interrupted_elsewhere(completion):
        raise kind

    for function in (interrupted, interrupted_elsewhere):
        with pytest.raises(kind):
            scores_of(function)


# Slow and asynchronous ones


def test_a_slow_function_is_reported_and_its_numbers_are_kept():
    def slow(completions):
        time.sleep(0.06)
        return [1.0] * len(completions)

    scores = scores_of(slow, timeout=0.05)
    assert scores.total_N.tolist() == [1.0] * 4
    assert scores.problems[0].error.startswith("reward slow: it took 0.")
    assert scores.problems[0].error.endswith(" s, reward_timeout is 0.05 s; its numbers count.")
    assert 0.06 <= scores.seconds_F[0] < 1.0


def test_a_slow_function_of_one_completion_is_called_for_all_of_them():
    def slow(completion):
        time.sleep(0.03)
        return 1

    values, problems = column_of(slow, timeout=0.05)
    assert values == [1.0] * 4
    assert len(problems) == 1


def test_a_function_that_fails_slowly_is_not_called_again_beyond_its_time():
    calls = []

    def slow(completions):
        calls.append(len(completions))
        time.sleep(0.1)
        raise OSError(f"no connection for {len(completions)}")

    values, problems = column_of(slow, timeout=0.25)
    assert calls[:2] == [4, 1]
    assert len(calls) <= 3  # where the five would take half a second
    assert np.isnan(values).all()
    assert "no connection for 4" in problems[0]
    assert any("no number within reward_timeout=0.25 s" in problem for problem in problems)
    calls.clear()
    assert "no connection" in column_of(slow, timeout=0.05)[1][0]
    assert calls == [4]


def test_asynchronous_functions_are_awaited_together_and_yield_meanwhile():
    async def one(completion):
        await asyncio.sleep(0.2)
        return len(completion)

    async def many(completions):
        return [len(text) for text in completions]

    seen = []
    started = time.monotonic()
    scores = scores_of(one, many, seen=seen)
    assert time.monotonic() - started < 0.7
    assert scores.rewards_NF.tolist() == [[len(text)] * 2 for text in TEXTS]
    assert scores.problems == ()
    assert [progress.done for progress in seen if progress.function == "one"].count(0) >= 2
    assert seen[-1] == ("many", 4, 4)


def test_what_an_asynchronous_function_does_not_give_in_time_is_missing():
    cancelled = []

    async def patchy(completion):
        try:
            await asyncio.sleep(60 if completion == "four" else 0)
        except asyncio.CancelledError:
            cancelled.append(completion)
            raise
        return 1.0

    async def never(completions):
        await asyncio.sleep(60)

    started = time.monotonic()
    scores = scores_of(patchy, never, timeout=0.1)
    assert time.monotonic() - started < 3.0
    assert cancelled == ["four"]
    assert np.array_equal(scores.rewards_NF[:, 0], [1, 1, 1, math.nan], equal_nan=True)
    assert np.isnan(scores.rewards_NF[:, 1]).all()
    assert [problem.error for problem in scores.problems] == [
        'reward patchy: completion 1 of row 20 ("four"): no number within reward_timeout=0.1 s.',
        "reward never: no number within reward_timeout=0.1 s.",
    ]


def test_an_asynchronous_function_that_raises_is_called_again_one_at_a_time():
    async def failing(completions):
        await asyncio.sleep(0)
        return [1 / (len(text.split()) - 2) for text in completions]

    async def gives_up(completion):
        raise asyncio.CancelledError

    scores = scores_of(failing, gives_up)
    assert np.array_equal(scores.rewards_NF[:, 0], [-1, math.nan, 1, -1], equal_nan=True)
    assert 'completion 1 of row 17 ("two words"): ZeroDivisionError' in scores.problems[0].error
    assert "CancelledError" in scores.problems[1].error


def test_the_only_error_of_a_task_group_is_the_one_that_is_reported():
    async def grouped(completion):
        raise ExceptionGroup("unhandled errors in a TaskGroup", [OSError("no connection")])

    assert ": OSError: no connection" in column_of(grouped)[1][0]


def test_one_that_blocks_its_event_loop_is_left_behind(monkeypatch):
    monkeypatch.setattr(call, "GRACE", 0.05)
    free = threading.Event()

    async def blocking(completions):
        free.wait(5)

    values, problems = column_of(blocking, timeout=0.1)
    free.set()
    assert np.isnan(values).all()
    assert problems == ["reward blocking: no number within reward_timeout=0.1 s."]


def test_asynchronous_functions_work_inside_a_running_event_loop():
    async def judge(completion):
        await asyncio.sleep(0.01)
        return 1.0

    async def kernel():
        turns = 0
        going = score_completions(resolve_rewards([judge], {}), None, batch_of(), timeout=5)
        while True:
            try:
                next(going)
            except StopIteration as stop:
                return stop.value, turns
            turns += 1
            await asyncio.sleep(0)

    scores, turns = asyncio.run(kernel())
    assert scores.total_N.tolist() == [1.0] * 4
    assert turns >= 2


def test_a_scoring_that_is_given_up_cancels_what_is_awaited():
    cancelled = threading.Event()

    async def long(completions):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    going = score_completions(resolve_rewards([long], {}), None, batch_of(), timeout=60)
    assert [next(going)[1:], next(going)[1:], next(going)[1:]] == [(0, 4)] * 3
    going.close()
    assert cancelled.wait(2)


def test_a_coroutine_from_a_plain_function_is_a_problem_with_advice():
    async def judge(completion):
        return 1.0

    assert "Define it with `async def`" in column_of(lambda completion: judge(completion))[1][0]


def test_a_synchronous_function_runs_in_the_callers_thread_and_shows_its_progress():
    threads = set()

    def slow(completion):
        threads.add(threading.current_thread())
        time.sleep(0.06)
        return 1

    seen = []
    scores_of(slow, seen=seen)
    assert threads == {threading.current_thread()}
    assert [progress.done for progress in seen] == [0, 1, 2, 3, 4, 4]


# Weights


def test_the_total_is_weighted_and_missing_where_a_counted_number_is():
    functions = [my_reward, failing_on_two, failing_on_two_alone]
    total = scores_of(*functions, weights=[2.0, -1.0, 0.0]).total_N
    assert np.array_equal(total, [7.0, math.nan, 31.0, 9.0], equal_nan=True)
    total = scores_of(*functions, weights=[2.0, 0.0, 0.0]).total_N
    assert total.tolist() == [6.0, 18.0, 32.0, 8.0]
    assert scores_of(my_reward).total_N.dtype == np.float64


@pytest.mark.parametrize(
    ("weights", "said"), [([1.0], "1 numbers for 2"), ([0, 0], "not all 0"), ([1, math.nan], "finite")]
)
def test_weights_that_do_not_fit_are_an_error_at_once(weights, said):
    found = resolve_rewards([my_reward, "exact_match"], {})
    with pytest.raises(ConfigError, match=said):
        score_completions(found, weights, batch_of(), timeout=1)


def test_no_completions_give_no_scores_and_call_nothing():
    scores = scores_of(lambda completions: 1 / 0, batch=batch_of([]))
    assert scores.rewards_NF.shape == (0, 1)
    assert scores.total_N.shape == (0,)
    assert scores.problems == ()
