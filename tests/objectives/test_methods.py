"""Every method through the one trainer: it learns, stops, resumes, rewinds and forks as supervised fine-tuning does."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from method_runs import ROWS, e_share, run_of, settings_for
from mlx_nb import Run, RunConfig
from mlx_nb.config.methods import METHODS as METHODS_BY_NAME
from mlx_nb.errors import CheckpointError, ConfigError, DataError, ModelError, OutOfMemory, TrainingError
from mlx_nb.events import (
    BatchSkipped,
    EvaluationCompleted,
    Pause,
    Progress,
    RequestRefused,
    RolloutCompleted,
    RunPaused,
    StepCompleted,
)
from mlx_nb.train.reference_logprobs import REFERENCE_FILE
from tiny import tiny_pairs, tiny_prompts, tiny_rows

METHODS = [name for name in ROWS if name != "sft"]


def happened(events):
    """What a run did, without the clock and the memory."""
    return [
        dataclasses.replace(event, seconds=0.0, **({"peak_memory": 0} if isinstance(event, StepCompleted) else {}))
        for event in events
        if isinstance(event, StepCompleted | EvaluationCompleted)
    ]


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_a_run_resumed_at_any_step_is_the_run_that_was_never_stopped(method, tmp_path, tiny_folder):
    whole = run_of(method, tmp_path / "whole", tiny_folder, iters=6)
    whole.run()
    stopped = run_of(method, tmp_path / "stopped", tiny_folder, iters=6, keep=6)
    for step in range(1, 6):
        stopped.step()
        stopped.checkpoint("pause")
        folder = shutil.copytree(tmp_path / "stopped", tmp_path / str(step))
        resumed = Run.resume(folder, data=ROWS[method](24), namespace={"e_share": e_share})
        assert resumed.step_count == step
        resumed.run()
        assert resumed.adapter_bytes() == whole.adapter_bytes(), step
        assert happened(resumed.history.events) == happened(whole.history.events), step


@pytest.mark.long
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("method", METHODS)
def test_going_back_and_on_again_changes_nothing(method, kind, tmp_path, tiny_folder):
    shape = {"fine_tune_type": "full", "lora_parameters": {}, "learning_rate": 1e-4} if kind == "full" else {}
    straight = run_of(method, tmp_path / "straight", tiny_folder, **shape)
    straight.run()
    rewound = run_of(method, tmp_path / "rewound", tiny_folder, **shape)
    rewound.step(5)
    rewound.rewind(to=3)
    rewound.run()
    assert rewound.adapter_bytes() == straight.adapter_bytes()


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_a_fork_without_changes_gives_the_same_results(method, tmp_path, tiny_folder):
    run = run_of(method, tmp_path / "run", tiny_folder)
    run.step(3)
    fork = run.fork(adapter_path=str(tmp_path / "fork"))
    run.run()
    fork.run()
    assert fork.adapter_bytes() == run.adapter_bytes()
    with pytest.raises(ConfigError, match="a fork keeps its `method`"):
        run.fork(method="sft")


@pytest.mark.long
@pytest.mark.parametrize("method", ["dpo", "cpo", "orpo"])
def test_preferences_are_learned_on_pairs_that_are_held_out(method, tmp_path, tiny_folder):
    run = run_of(method, tmp_path, tiny_folder, iters=44, learning_rate=1e-2, val_batches=-1)
    before = run.evaluate().metrics
    run.run()
    after = [event for event in run.history.events if isinstance(event, EvaluationCompleted)][-1].metrics
    assert after["accuracy"] >= max(0.5, before["accuracy"])
    assert after["margin"] > before["margin"] + 0.1


@pytest.mark.long
def test_kto_tells_good_answers_from_bad_ones(tmp_path, tiny_folder):
    run = run_of("kto", tmp_path, tiny_folder, iters=60, learning_rate=1e-2, val_batches=-1, val_set_size=8)
    run.run()
    after = [event for event in run.history.events if isinstance(event, EvaluationCompleted)][-1].metrics
    assert after["reward_desirable"] > 0.1 + after["reward_undesirable"]


@pytest.mark.long
def test_grpo_raises_the_reward_and_keeps_the_kl_bounded(tmp_path, tiny_folder):
    run = run_of(
        "grpo",
        tmp_path,
        tiny_folder,
        iters=80,
        learning_rate=3e-3,
        group_size=8,
        steps_per_eval=-1,
        data=tiny_prompts(60),
        lora_parameters={"rank": 8},
        seed=1,
    )
    run.run()
    steps = [event.metrics for event in run.history.events if isinstance(event, StepCompleted)]
    first, last = (float(np.mean([one["reward"] for one in part])) for part in (steps[:10], steps[-10:]))
    assert last > 3 * first
    assert max(one["kl"] for one in steps) < 10
    assert any(one["clipped"] > 0 for one in steps[1::2])
    assert all(one["clipped"] < 1e-3 for one in steps[::2])


@pytest.mark.long
def test_validation_of_kto_is_the_same_whatever_the_batch_size(tmp_path, tiny_folder):
    run_of("kto", tmp_path / "trained", tiny_folder, learning_rate=1e-2, iters=12).run()

    def validated(batch_size):
        run = run_of(
            "kto",
            tmp_path / str(batch_size),
            tiny_folder,
            batch_size=batch_size,
            resume_adapter_file=str(tmp_path / "trained"),
            reference_adapter="none",
            val_set_size=16,
            val_batches=-1,
        )
        return run.evaluate(), [event for event in run.events(1) if isinstance(event, Progress)]

    (small, progress), (large, _) = validated(2), validated(8)
    assert large.loss == pytest.approx(small.loss, abs=1e-4)
    assert large.metrics == pytest.approx(small.metrics, abs=1e-4)
    assert dict(large.row_losses) == pytest.approx(dict(small.row_losses), abs=1e-4)
    assert small.metrics["kl_estimate"] > 0.1
    assert [(event.what, event.done, event.total) for event in progress[:16]] == [
        *(("valid kl", done, 8) for done in range(8)),
        *(("valid loss", done, 8) for done in range(8)),
    ]


# The reference


@pytest.mark.long
def test_the_policy_leaves_the_reference_and_the_reference_stays(tmp_path, tiny_folder):
    run = run_of("dpo", tmp_path, tiny_folder, learning_rate=1e-2, lora_parameters={"rank": 4, "scale": 4.0})
    losses = [run.step().loss for _ in range(4)]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert all(abs(loss - math.log(2)) > 1e-3 for loss in losses[1:])
    batch = run.trainer.next_batches()[0]
    alone = Run(RunConfig(model=str(tiny_folder), data=tiny_rows(), adapter_path=str(tmp_path / "other")))
    from mlx_nb.model.logprobs import TargetScorer, target_inputs

    inputs = target_inputs(batch)
    base = np.array(TargetScorer(alone.loaded.model).logprobs(inputs))
    assert np.array(inputs.token_values["reference"]) == pytest.approx(base, abs=1e-4)
    assert np.abs(np.array(run.trainer.scorer.logprobs(inputs)) - base).max() > 1e-2


@pytest.mark.long
def test_reference_log_probabilities_are_measured_once_and_kept_beside_the_run(tmp_path, tiny_folder):
    folder = tmp_path / "adapter"
    first = run_of("dpo", folder, tiny_folder)
    first.run()
    assert (folder / REFERENCE_FILE).is_file()
    measured = len(first.inputs.reference)
    assert measured > 10
    again = run_of("dpo", folder, tiny_folder)
    again.trainer.next_batches()
    assert again.inputs.reference._scorer is None
    assert len(again.inputs.reference) == measured
    again.run()
    assert again.adapter_bytes() == first.adapter_bytes()


@pytest.mark.long
def test_numbers_of_another_reference_or_a_torn_file_are_not_read(tmp_path, tiny_folder):
    folder = tmp_path / "adapter"
    run_of("dpo", folder, tiny_folder).run()
    reference = run_of("dpo", tmp_path / "x", tiny_folder).inputs.reference
    reference.fingerprint = "another"
    reference.load(folder)
    assert len(reference) == 0
    (folder / REFERENCE_FILE).write_bytes((folder / REFERENCE_FILE).read_bytes()[:100])
    torn = run_of("dpo", tmp_path / "y", tiny_folder).inputs.reference
    torn.load(folder)
    assert len(torn) == 0


@pytest.mark.parametrize("named", [None, "reference_adapter", "none"])
@pytest.mark.matrix(every=3)
def test_after_sft_the_reference_is_what_training_starts_from(named, tmp_path, tiny_folder):
    sft = run_of("sft", tmp_path / "sft", tiny_folder, learning_rate=1e-2)
    sft.run()
    chosen = {
        None: {},
        "reference_adapter": {"reference_adapter": str(tmp_path / "sft")},
        "none": {"reference_adapter": "none"},
    }
    run = run_of(
        "dpo",
        tmp_path / "dpo",
        tiny_folder,
        resume_adapter_file=str(tmp_path / "sft"),
        steps_per_eval=-1,
        **chosen[named],
    )
    loss = run.step().loss
    if named == "none":
        assert abs(loss - math.log(2)) > 1e-3
    else:
        # Dropout is on in the policy's pass only.
        assert loss == pytest.approx(math.log(2), abs=0.02)


def test_a_reference_model_of_another_vocabulary_or_an_adapter_that_is_not_there_is_refused(tmp_path, tiny_folder):
    run = run_of("dpo", tmp_path / "a", tiny_folder, reference_adapter=str(tmp_path / "nothing"), steps_per_eval=-1)
    with pytest.raises(ModelError, match=r"reference_adapter: .*nothing has no adapter_config.json"):
        run.step()
    same = run_of("dpo", tmp_path / "b", tiny_folder, reference_model=str(tiny_folder), steps_per_eval=-1)
    assert same.step().loss == pytest.approx(math.log(2), abs=1e-5)


def test_reference_free_has_no_reference(tmp_path, tiny_folder):
    run = run_of("dpo", tmp_path, tiny_folder, reference_free=True)
    step = run.step()
    assert run.inputs.reference is None
    assert "kl" not in step.metrics
    assert abs(step.loss - math.log(2)) > 1e-3


# Completions and rewards


def rollouts(run):
    return [event for event in run.history.events if isinstance(event, RolloutCompleted)]


def test_a_rollout_serves_several_updates_and_its_numbers_add_up(tmp_path, tiny_folder):
    run = run_of("grpo", tmp_path, tiny_folder, lora_parameters={"rank": 4})
    run.step(4)
    assert [event.step for event in rollouts(run)] == [0, 2]
    for event in rollouts(run):
        assert len(event.groups) == 4
        for group in event.groups:
            assert len(group["completions"]) == 4
            rewards = np.array([said["reward"] for said in group["completions"]])
            advantages = np.array([said["advantage"] for said in group["completions"]])
            for said in group["completions"]:
                assert said["rewards"]["e_share"] == pytest.approx(e_share(said["text"]))
            if np.ptp(rewards) > 1e-6:
                expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
                assert advantages == pytest.approx(expected, rel=1e-4)
    first = run.history.events[[type(event).__name__ for event in run.history.events].index("StepCompleted")]
    assert first.metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert first.metrics["reward"] == pytest.approx(
        np.mean([said["reward"] for group in rollouts(run)[0].groups for said in group["completions"]])
    )


def test_log_ratios_of_the_completions_in_use_are_0_until_an_update(tmp_path, tiny_folder):
    run = run_of("grpo", tmp_path, tiny_folder, learning_rate=1e-2, steps_per_eval=-1)
    run.step(1)
    changed = run.trainer.rollouts.log_ratios()
    assert len(changed) == 16
    assert max(np.abs(ratio).max() for _, _, ratio in changed) > 1e-3
    run.rewind(to=0)
    events = run.events(1)
    while not isinstance(next(events), RolloutCompleted):
        pass
    assert max(np.abs(ratio).max() for _, _, ratio in run.trainer.rollouts.log_ratios()) < 1e-4


@pytest.mark.long
def test_a_reward_that_raises_returns_nan_or_is_slow_never_ends_the_run(tmp_path, tiny_folder):
    def broken(completion):
        if "e" in completion:
            raise ValueError("no e please")
        return float("nan") if "a" in completion else len(completion)

    def slow(completions):
        time.sleep(0.05)
        return [0.0] * len(completions)

    run = run_of("grpo", tmp_path, tiny_folder, rewards=[broken, slow], reward_timeout=0.02, data=tiny_prompts(40))
    run.run()
    assert run.step_count == 8
    said = [problem for event in rollouts(run) for problem in event.problems]
    assert any("reward broken: completion" in text and "ValueError: no e please" in text for text in said)
    assert any("not finite" in text for text in said)
    assert any("reward slow: it took" in text for text in said)
    assert all(event.reward_seconds["slow"] >= 0.05 for event in rollouts(run))
    for event in rollouts(run):
        for group in event.groups:
            for one in group["completions"]:
                if one["rewards"]["broken"] is None:
                    assert one["advantage"] == 0.0
    assert all(math.isfinite(loss) for loss in run.history["loss"])


def test_a_reward_that_always_raises_pauses_the_run_before_anything_is_trained(tmp_path, tiny_folder):
    def broken(completion):
        raise KeyError("score")

    run = run_of("grpo", tmp_path, tiny_folder, rewards=[broken], lora_parameters={"rank": 4})
    before = run.adapter_bytes()
    *events, ended = run.events()
    refused = [event for event in events if isinstance(event, RequestRefused)]
    assert "validation: no completion got a reward. reward broken: completion 0 of row" in refused[0].error
    assert isinstance(ended, RunPaused)
    assert "no completion got a reward. reward broken: completion 0 of row" in ended.reason
    assert "KeyError" in ended.reason
    assert (run.state, run.step_count, run.adapter_bytes()) == ("paused", 0, before)
    with pytest.raises(DataError, match="no completion got a reward"):
        run.evaluate()


def test_rewards_that_say_nothing_leave_the_policy_to_the_kl(tmp_path, tiny_folder):
    run = run_of(
        "grpo", tmp_path, tiny_folder, rewards=[lambda completion: 1.0], beta=0, optimizer="sgd", weight_decay=0
    )
    before = run.adapter_bytes()
    step = run.step(2)
    assert step.metrics["zero_variance_groups"] == 1.0
    assert run.adapter_bytes() == before


def test_completions_that_were_cut_are_masked_on_request(tmp_path, tiny_folder):
    run = run_of(
        "grpo", tmp_path, tiny_folder, mask_truncated_completions=True, max_completion_length=2, steps_per_eval=-1
    )
    run.step()
    finished = [said["finished"] for said in (one for group in rollouts(run)[0].groups for one in group["completions"])]
    counts = np.concatenate([batch.row_values["counts"] for batch in run.trainer.next_batches()])
    assert counts.tolist() == [float(one) for one in finished]


def test_rewards_are_found_in_the_notebook_and_unknown_ones_are_named(tmp_path, tiny_folder):
    config = RunConfig.from_dict(settings_for("grpo", tmp_path, tiny_folder, rewards=["e_share"]))
    assert Run(config, namespace={"e_share": e_share}).step().step == 1
    with pytest.raises(ConfigError, match="e_shar"):
        run_of("grpo", tmp_path / "x", tiny_folder, rewards=["e_shar"]).step()


@pytest.mark.long
def test_dropping_the_current_rollout_changes_nothing(tmp_path, tiny_folder):
    straight = run_of("grpo", tmp_path / "straight", tiny_folder)
    straight.run()
    run = run_of("grpo", tmp_path / "run", tiny_folder)
    run.evaluate()
    key = np.array(mx.random.state[0]).tolist()
    for patience in (0, 1, 3, 5):
        seen = 0
        for event in run.events():
            if isinstance(event, Progress) and event.what == "completions":
                seen += 1
                if seen > patience:
                    run.request(Pause("now", at_once=True))
            if isinstance(event, StepCompleted):
                break
    assert np.array(mx.random.state[0]).tolist() == key
    run.run()
    assert run.adapter_bytes() == straight.adapter_bytes()


@pytest.mark.long
def test_an_interrupt_ends_a_reward_function_that_does_not_end(tmp_path, tiny_folder):
    calls = []

    def stuck(completion):
        calls.append(1)
        if len(calls) == 3:
            try:
                run.request(Pause("now", at_once=True))  # as the second interrupt does, in the middle of this
            except Exception:
                pytest.fail("a reward's own `except Exception` must not swallow it")
            pytest.fail("it must not come back")
        return e_share(completion)

    run = run_of("grpo", tmp_path / "a", tiny_folder, rewards=[stuck], steps_per_eval=-1)
    events = list(run.events())
    assert isinstance(events[-1], RunPaused)
    assert run.step_count == 0
    run.run()
    straight = run_of("grpo", tmp_path / "b", tiny_folder, rewards=[e_share], steps_per_eval=-1)
    straight.run()
    assert run.adapter_bytes() == straight.adapter_bytes()


def test_skipping_leaves_the_prompts_of_the_rollout_behind(tmp_path, tiny_folder):
    run = run_of("grpo", tmp_path, tiny_folder, steps_per_eval=-1)
    run.step()
    run.skip()
    run.step()
    first, second = rollouts(run)
    assert {group["row"] for group in first.groups} != {group["row"] for group in second.groups}


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_naming_and_leaving_out_the_next_rows_measures_and_samples_nothing(method, tmp_path, tiny_folder):
    run = run_of(method, tmp_path, tiny_folder, steps_per_eval=-1)
    rows = run.trainer.next_rows()
    run.skip()
    events = run.events(1)
    skipped = next(event for event in events if isinstance(event, BatchSkipped))
    assert skipped.rows == rows
    assert len(rows) == 4
    assert not rollouts(run)
    assert method == "grpo" or len(run.inputs.reference) == 0
    update = next(event for event in events if isinstance(event, StepCompleted))
    assert not set(update.rows) & set(rows)


def test_an_update_that_is_refused_names_each_prompt_once(tmp_path, tiny_folder):
    run = run_of("grpo", tmp_path, tiny_folder, steps_per_eval=-1, beta=1e38, learning_rate=1e3)
    with pytest.raises(TrainingError) as refused:
        run.run()
    assert len(refused.value.rows) == len(set(refused.value.rows)) == 4


@pytest.mark.parametrize(
    ("method", "loss"), [(one.name, loss) for one in METHODS_BY_NAME.values() for loss in one.losses]
)
@pytest.mark.matrix(every=17)
def test_a_compiled_update_is_the_plain_one(method, loss, tmp_path, tiny_folder, monkeypatch):
    # With this seed what is 0 but for rounding at the first update, and decides the accuracy of kto, is rounded alike.
    shape = {"loss": loss, "steps_per_eval": -1, "iters": 2, "lora_parameters": {"rank": 4, "scale": 4.0}, "seed": 2}
    # What is computed otherwise on a CPU and on a GPU rounds otherwise; what compiling does is compared alone.
    shape["packing"] = False
    monkeypatch.delattr("mlx.core.fast.cross_entropy")
    monkeypatch.setattr("mlx_nb.model.logprobs.kernels_are_verified", lambda _model: False)
    plain = run_of(method, tmp_path / "plain", tiny_folder, **shape)
    plain.run()
    monkeypatch.setattr("mlx_nb.model.backend.is_cpu", lambda: False)
    compiled = run_of(method, tmp_path / "compiled", tiny_folder, **shape)
    compiled.run()
    for one, other in zip(plain.history.steps(), compiled.history.steps(), strict=True):
        for name in ("loss", "gradient_norm", *one.keys() & METHODS_BY_NAME[method].metrics.keys()):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name


# What a run is made from, and what changes under it


@pytest.mark.long
def test_a_fork_has_the_rewards_and_the_test_rows_that_it_asked_for(tmp_path, tiny_folder):
    rows = {"train": tiny_prompts(24), "test": tiny_prompts(4)}
    run = run_of("grpo", tmp_path, tiny_folder, steps_per_eval=-1, data=rows)
    run.step()
    fork = run.fork(rewards=[lambda completion: 7.0], test=True, test_batches=1, adapter_path=str(tmp_path / "fork"))
    fork.run()
    assert rollouts(fork)[-1].groups[0]["completions"][0]["reward"] == 7.0
    assert [event.split for event in fork.history.events if isinstance(event, EvaluationCompleted)] == ["test"]


@pytest.mark.parametrize(
    ("changes", "same"),
    [({"learning_rate": 1e-5}, True), ({"temperature": 0.5}, False), ({"grad_accumulation_steps": 4}, False)],
)
@pytest.mark.matrix(every=3)
def test_a_fork_in_the_middle_of_a_rollout_keeps_completions_that_its_settings_would_have_made(
    changes, same, tmp_path, tiny_folder
):
    run = run_of("grpo", tmp_path / "run", tiny_folder, steps_per_eval=-1)
    run.step()
    fork = run.fork(adapter_path=str(tmp_path / "fork"), **changes)
    assert fork.trainer.rollouts.ready is same
    assert set(run.trainer.next_rows()) <= set(fork.trainer.next_rows())
    fork.step()
    assert max(np.abs(ratio).max() for _, _, ratio in fork.log_ratios()) < (1.0 if same else 0.2)


def test_a_fork_with_another_batch_size_is_at_the_same_place_in_the_epoch(tmp_path, tiny_folder):
    run = run_of("sft", tmp_path / "run", tiny_folder, steps_per_eval=-1, val_set_size=0)
    epoch = run.step(3).epoch
    fork = run.fork(batch_size=4, grad_accumulation_steps=1, adapter_path=str(tmp_path / "fork"))
    assert fork.trainer.state.batches / fork.trainer.plan.batches.batches_per_epoch == epoch == 0.5


def test_settings_changed_before_the_start_decide_what_is_loaded(tmp_path, tiny_folder):
    run = run_of("grpo", tmp_path, tiny_folder, steps_per_eval=-1)
    model, prompts = run.model, len(run.rows("train"))
    run.set(rewards=[lambda completion: 7.0], data=tiny_prompts(12))
    assert (run.model is model, prompts, len(run.rows("train"))) == (True, 22, 11)
    run.step()
    assert rollouts(run)[-1].groups[0]["completions"][0]["reward"] == 7.0


def sft_adapter(folder, tiny_folder, **changes):
    run = run_of("sft", folder, tiny_folder, learning_rate=0.03, steps_per_eval=-1, **changes)
    run.run()
    return str(folder)


@pytest.mark.long
def test_numbers_of_an_adapter_at_another_scale_are_not_read(tmp_path, tiny_folder):
    start = sft_adapter(tmp_path / "sft", tiny_folder, lora_parameters={"rank": 4, "scale": 4.0})
    described = json.loads((tmp_path / "sft" / "adapter_config.json").read_text())
    for scale in (4.0, 20.0):
        described["lora_parameters"]["scale"] = scale
        (tmp_path / "sft" / "adapter_config.json").write_text(json.dumps(described))
        run = run_of("dpo", tmp_path / "dpo", tiny_folder, resume_adapter_file=start, lora_parameters={})
        assert run.config.lora_parameters.scale == scale
        assert run.step().loss == pytest.approx(math.log(2), abs=1e-4), scale


@pytest.mark.long
def test_a_resume_notices_that_the_reference_is_another(tmp_path, tiny_folder):
    start = sft_adapter(tmp_path / "sft", tiny_folder)
    run = run_of("dpo", tmp_path / "dpo", tiny_folder, reference_adapter=start)
    run.step(2)
    run.checkpoint("pause")
    sft_adapter(tmp_path / "sft", tiny_folder, seed=5)
    with pytest.raises(CheckpointError, match="changed since the checkpoint of step 2: reference"):
        Run.resume(tmp_path / "dpo", data=tiny_pairs(24))


@pytest.mark.long
def test_reference_log_probabilities_are_kept_by_every_run_in_a_folder(tmp_path, tiny_folder):
    for number in range(3):
        run = run_of("dpo", tmp_path / "adapter", tiny_folder)
        run.run()
        assert (tmp_path / "adapter" / REFERENCE_FILE).is_file(), number
        assert run.inputs.reference._scorer is None or number == 0


@pytest.mark.long
def test_a_row_without_a_column_that_others_have_gives_none(tmp_path, tiny_folder):
    seen = []

    def deep(completion, depth):
        seen.append(depth)
        return 0.0 if depth is None else float(depth)

    rows = [{**row, **({"depth": 2} if number == 5 else {})} for number, row in enumerate(tiny_prompts(10))]
    run = run_of("grpo", tmp_path, tiny_folder, rewards=[deep], data={"train": rows, "valid": tiny_prompts(2)})
    run.run()
    assert set(seen) == {None, 2}


def test_a_test_without_any_reward_does_not_keep_the_run_from_its_end(tmp_path, tiny_folder):
    def broken(completion, exam):
        if exam:
            raise KeyError("nothing")
        return e_share(completion)

    rows = {
        split: [{**row, "exam": split == "test"} for row in tiny_prompts(count)]
        for split, count in (("train", 8), ("test", 4))
    }
    run = run_of("grpo", tmp_path, tiny_folder, rewards=[broken], data=rows, test=True, steps_per_eval=-1, iters=2)
    refused = [event for event in run.events() if isinstance(event, RequestRefused)]
    assert run.state == "finished"
    assert "test: no completion got a reward" in refused[0].error


class Longer:
    def __call__(self, completion):
        return float(len(completion))


@pytest.mark.long
def test_rewards_without_a_name_of_their_own_can_be_saved(tmp_path, tiny_folder):
    run = run_of("grpo", tmp_path, tiny_folder, rewards=[partial(e_share), Longer()], steps_per_eval=-1)
    run.step()
    run.checkpoint("pause")
    assert run.config.to_dict()["rewards"] == ["e_share", "Longer"]


@pytest.mark.long
def test_the_own_folder_is_moved_only_by_a_run_that_can_start(tmp_path, tiny_folder):
    start = sft_adapter(tmp_path / "run", tiny_folder)
    with pytest.raises(ConfigError, match="which this run would overwrite"):
        run_of("dpo", tmp_path / "run", tiny_folder, resume_adapter_file=start).step()
    with pytest.raises(ConfigError, match="unheard_of"):
        run_of("grpo", tmp_path / "run", tiny_folder, rewards=["unheard_of"]).step()
    assert (tmp_path / "run" / "adapters.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("where", ["sample", "batches"])
def test_out_of_memory_outside_an_update_is_reported_and_changes_nothing(where, tmp_path, tiny_folder, monkeypatch):
    run = run_of("grpo", tmp_path, tiny_folder, steps_per_eval=-1)

    def full(*arguments):
        raise RuntimeError("[malloc] Unable to allocate 9 bytes.")

    run.step(2)
    monkeypatch.setattr(run.trainer.rollouts, where, full)
    with pytest.raises(OutOfMemory, match="outside an update"):
        run.step()
    monkeypatch.undo()
    assert run.step().step == 3


def test_a_rewind_forgets_which_batch_was_to_be_left_out(tmp_path, tiny_folder):
    run = run_of("sft", tmp_path, tiny_folder, steps_per_eval=-1)
    run.step(4)
    run.skip()
    run.rewind(2)
    run.step(2)
    assert not [event for event in run.history.events if isinstance(event, BatchSkipped)]


def test_rows_in_memory_stay_out_of_what_is_saved_beside_the_adapter(tmp_path, tiny_folder):
    import pandas as pd

    run = run_of("sft", tmp_path, tiny_folder, data=pd.DataFrame(tiny_rows(12)), steps_per_eval=-1, iters=1)
    run.run()
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["mlx_nb"]["settings"]
    assert "data" not in saved
    assert saved["iters"] == 1
    listed = run_of("sft", tmp_path / "list", tiny_folder, steps_per_eval=-1, iters=1)
    listed.run()
    assert "data" not in json.loads((tmp_path / "list" / "adapter_config.json").read_text())["mlx_nb"]["settings"]


def test_the_summary_of_a_fork_and_of_a_longer_run_is_about_themselves(tmp_path, tiny_folder):
    run = run_of("sft", tmp_path / "run", tiny_folder, iters=2)
    run.run()
    fork = run.fork(iters=5, adapter_path=str(tmp_path / "fork"))
    fork.step()
    assert "3 of 5" in fork.status()
    assert str(tmp_path / "run") not in fork.status()
    run.set(iters=6)
    run.step()
    assert "run: paused" in run.status()
    assert "3 of 6" in run.status()
