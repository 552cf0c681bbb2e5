"""What has nothing to learn from is said: a rollout without a reward pauses, a run that learned nothing tells it."""

from __future__ import annotations

import math

import pytest

from method_runs import e_share, run_of
from mlx_nb.events import NothingLearned, RunFinished, RunPaused
from mlx_nb.view.event_text import describe, summary_rows


@pytest.mark.long
@pytest.mark.parametrize("nothing", [None, math.nan, math.inf, "text", KeyError("score")])
@pytest.mark.parametrize("later", [0, 3])
@pytest.mark.matrix(every=10)
def test_a_rollout_without_any_reward_pauses_and_continues_once_there_is_one(nothing, later, tmp_path, tiny_folder):
    """Also where another reward gives numbers: their sum is none."""
    silent, calls = [later == 0], []

    def moody(completions):
        calls.append(len(completions))
        if not silent[0] and (later == 0 or len(calls) <= later):
            return [e_share(text) for text in completions]
        if isinstance(nothing, Exception):
            raise nothing
        return [nothing] * len(completions)

    rewards = [moody, lambda completion: 1.0]
    run = run_of("grpo", tmp_path, tiny_folder, rewards=rewards, steps_per_eval=-1, updates_per_rollout=1)
    paused = run.run()
    assert isinstance(paused, RunPaused)
    assert "no completion got a reward. reward moody: " in paused.reason
    assert "%finetune skip" in paused.reason
    assert run.step_count == later
    weights, rows = run.adapter_bytes(), run.trainer.next_rows()
    assert isinstance(run.run(), RunPaused)  # as often as one likes
    assert (run.adapter_bytes(), run.trainer.next_rows()) == (weights, rows)
    calls.clear()
    silent[0], later = False, 0
    ended = run.run()
    assert isinstance(ended, RunFinished)
    assert ended.step == 8


@pytest.mark.long
def test_a_reward_of_weight_0_may_return_nothing(tmp_path, tiny_folder):
    rewards = {"rewards": [e_share, lambda completion: None], "reward_weights": [1.0, 0.0]}
    run = run_of("grpo", tmp_path, tiny_folder, steps_per_eval=-1, **rewards)
    assert run.run().step == 8


@pytest.mark.long
def test_a_run_in_which_nothing_was_learned_says_so(tmp_path, tiny_folder):
    run = run_of("grpo", tmp_path, tiny_folder, rewards=[lambda completion: 1.0], steps_per_eval=-1, iters=24)
    ended = run.run()
    said = [event for event in run.history.events if isinstance(event, NothingLearned)]
    assert [(event.step, event.updates) for event in said] == [(10, 10)]
    assert not ended.learned
    assert "Nothing was learned" in describe(ended)
    assert dict(summary_rows(run.history))["learned"].startswith("nothing. ")


@pytest.mark.long
def test_a_run_that_learned_once_is_no_run_that_learned_nothing(tmp_path, tiny_folder):
    reported = []

    def at_first(completions):
        reported.append(1)
        return [e_share(text) if len(reported) == 1 else 1.0 for text in completions]

    shape = {"steps_per_eval": -1, "iters": 14, "updates_per_rollout": 1}
    run = run_of("grpo", tmp_path, tiny_folder, rewards=[at_first], **shape)
    assert run.run().learned
    said = [event for event in run.history.events if isinstance(event, NothingLearned)]
    assert [event.step for event in said] == [11]


def test_a_run_whose_batches_were_all_left_out_has_learned_nothing(tmp_path, tiny_folder):
    run = run_of("dpo", tmp_path, tiny_folder, iters=None, epochs=1, steps_per_eval=-1, val_set_size=0)
    while not run.finished:
        run.skip()
        run.run(until=0)
    assert run.step_count == 0
    assert not run.trainer.finished.learned
