"""The laws of training, on a model small enough to compute everything twice."""

from __future__ import annotations

import dataclasses
import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.examples.batches import TokenBatch, pad
from mlx_nb.data.examples.imitation import TokenizedExample
from mlx_nb.errors import ConfigError, DataError, ModelError
from mlx_nb.events import (
    AdapterSaved,
    ChangeSetting,
    EvaluationCompleted,
    Pause,
    Progress,
    RunFailed,
    RunFinished,
    RunPaused,
    RunStarted,
    SettingChanged,
    StepCompleted,
    Stop,
)
from mlx_nb.model import adapters
from mlx_nb.model.logprobs import TargetScorer, target_inputs
from mlx_nb.model.randomness import random_stream, seed_for
from mlx_nb.objectives.grpo import bnpo, completion_objective, dapo
from mlx_nb.objectives.sft import nll, token_objective
from mlx_nb.train.optimizer import build_optimizer, learning_rate_at
from mlx_nb.train.state import TrainerExamples
from mlx_nb.train.step import Stepper
from mlx_nb.train.trainer import Trainer
from tiny import VOCABULARY, random_examples, tiny_model
from trainers import ADAPTER, losses, make_trainer, weights


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert np.array_equal(first[name], second[name]), name


def stepper_for(model, **settings):
    config = RunConfig.from_dict({"lora_parameters": ADAPTER, **settings})
    with random_stream(1):
        adapters.attach_adapter(model, config)
    for name, array in adapters.adapter_weights(model).items():
        if name.endswith("lora_b"):
            model.load_weights(
                [(name, 0.1 * mx.random.normal(array.shape, key=mx.random.key(len(name))))], strict=False
            )
    return Stepper(model, build_optimizer(config), token_objective(nll), TargetScorer(model), compiled=False)


# Law 1 and the definition of the loss


def test_loss_is_the_mean_negative_log_likelihood_of_the_trained_tokens():
    model = tiny_model()
    example = random_examples(1)[0]
    logits = np.array(model(mx.array(example.tokens[None])))[0].astype(np.float64)
    total = 0.0
    for position in range(1, len(example.tokens)):
        row = logits[position - 1]
        logprob = row[example.tokens[position]] - np.log(np.exp(row - row.max()).sum()) - row.max()
        total -= example.loss_mask[position] * logprob
    sums = token_objective(nll)(TargetScorer(model), target_inputs(pad([example])))
    assert sums.total.item() == pytest.approx(total, rel=1e-5)
    assert sums.units.item() == example.loss_mask.sum()


@pytest.mark.parametrize("tied", [True, False])
def test_projecting_targets_only_equals_the_whole_model(tied):
    model = tiny_model(tied=tied)
    scorer = TargetScorer(model)
    assert scorer.projects_targets_only
    inputs = target_inputs(pad(random_examples(4)))
    split = scorer.logprobs(inputs)
    scorer._text = None
    assert mx.allclose(split, scorer.logprobs(inputs), atol=1e-5).item()


@pytest.mark.parametrize("taken_apart", [True, False])
def test_token_losses_are_those_of_the_objective(taken_apart):
    model, example = tiny_model(), random_examples(1, shortest=20)[0]
    scorer = TargetScorer(model)
    if not taken_apart:
        scorer._text = None
    losses = scorer.token_losses(example.tokens)
    assert np.isnan(losses[0])
    total = token_objective(nll)(scorer, target_inputs(pad([example]))).total.item()
    assert (losses[1:] * example.loss_mask[1:]).sum() == pytest.approx(total, rel=1e-5)


def test_a_model_that_changes_its_logits_changes_them_at_targets_too():
    class Capped(type(tiny_model())):
        def __call__(self, inputs, cache=None):
            return mx.tanh(super().__call__(inputs, cache))

    model = Capped(tiny_model().args)
    scorer, inputs = TargetScorer(model), target_inputs(pad(random_examples(2)))
    assert scorer.projects_targets_only
    whole_SV = model(inputs.tokens_BT).reshape(-1, VOCABULARY)[inputs.position_S]
    assert mx.allclose(scorer.logits(inputs), whole_SV, atol=1e-5).item()


# Laws 2 and 3


def test_micro_batches_give_the_gradient_of_one_big_batch():
    examples = random_examples(9)
    stepper = stepper_for(tiny_model())
    whole, loss, units, *_ = stepper.gradients([pad(examples)], seed=0)
    parts = [pad(examples[start:stop]) for start, stop in ((0, 1), (1, 5), (5, 9))]
    split, split_loss, split_units, *_ = stepper.gradients(parts, seed=0)
    assert units == split_units
    assert loss == pytest.approx(split_loss, rel=1e-6)
    for (name, one), (_, other) in zip(tree_flatten(whole), tree_flatten(split)):
        assert mx.allclose(one, other, rtol=1e-4, atol=1e-6).item(), name


@pytest.mark.parametrize("loss", [bnpo, dapo])
def test_an_update_in_which_no_completion_counts_has_no_gradient(loss):
    batch = pad(random_examples(3))
    batch = batch._replace(
        row_values={"advantage": np.ones(3, np.float32), "counts": np.zeros(3, np.float32)},
        token_values={"behavior": np.full(batch.tokens_BT.shape, -1.0, np.float32)},
    )
    stepper = stepper_for(tiny_model())
    stepper.objective = completion_objective(loss, temperature=1.0, max_completion_length=8)
    gradients, mean, units, *_ = stepper.gradients([batch], seed=0)
    assert (mean, units) == (0.0, 0.0)
    assert all(not array.any().item() for _, array in tree_flatten(gradients))


def test_padding_width_and_content_change_neither_loss_nor_gradient():
    examples = random_examples(4)
    stepper = stepper_for(tiny_model())
    narrow = pad(examples)
    wide = pad(examples, 64)
    tokens = wide.tokens_BT.copy()
    for index, length in enumerate(wide.lengths):
        tokens[index, length:] = 7
    filled = TokenBatch(tokens, wide.loss_mask_BT, wide.rows, wide.lengths)
    results = [stepper.gradients([narrow], 0)]
    stepper._multiples = (32, 64)
    results.append(stepper.gradients([filled], 0))
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-6)
    assert results[0][2] == results[1][2]
    for (name, one), (_, other) in zip(tree_flatten(results[0][0]), tree_flatten(results[1][0])):
        assert mx.allclose(one, other, rtol=1e-4, atol=1e-6).item(), name


def test_gradient_equals_finite_differences():
    stepper = stepper_for(tiny_model())
    batch = pad(random_examples(3))
    gradients, *_ = stepper.gradients([batch], 0)
    name, gradient = max(tree_flatten(gradients), key=lambda item: mx.abs(item[1]).max().item())
    parameter = adapters.adapter_weights(stepper.model)[name]
    index = int(mx.argmax(mx.abs(gradient)).item())
    step = 1e-2
    values = []
    for sign in (1, -1):
        flat = np.array(parameter).ravel()
        flat[index] += sign * step
        stepper.model.load_weights([(name, mx.array(flat.reshape(parameter.shape)))], strict=False)
        total, units, *_ = stepper.evaluate(batch)
        values.append(total / units)
    measured = (values[0] - values[1]) / (2 * step)
    assert measured == pytest.approx(gradient.reshape(-1)[index].item(), rel=2e-2)


# Law 5: randomness


def test_dropout_is_a_function_of_seed_and_step_and_the_users_stream_is_untouched(tmp_path):
    settings = {"lora_parameters": {**ADAPTER, "dropout": 0.3}}
    mx.random.seed(5)
    expected = mx.random.normal((3,)).tolist()
    runs = []
    for name in ("a", "b"):
        model = tiny_model()
        mx.random.seed(5)
        trainer = make_trainer(tmp_path, model=model, name=name, **settings)
        events = []
        for _ in range(6):
            events += list(trainer.events(1))
            if name == "b":
                mx.random.normal((2,))
        runs.append((losses(events), weights(trainer)))
        if name == "a":
            assert mx.random.normal((3,)).tolist() == expected
    assert runs[0][0] == runs[1][0]
    assert_same_weights(runs[0][1], runs[1][1])


def test_dropout_is_off_between_updates(tmp_path):
    trainer = make_trainer(tmp_path, lora_parameters={**ADAPTER, "dropout": 0.5})
    list(trainer.events(2))
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(trainer.model(tokens), trainer.model(tokens)).item()


# Stepping


def test_step_by_step_equals_a_straight_run(tmp_path):
    straight, stepped = make_trainer(tmp_path, name="a"), make_trainer(tmp_path, name="b")
    expected = losses(straight.events())
    got = [loss for _ in range(6) for loss in losses(stepped.events(1))]
    assert got == expected
    assert_same_weights(weights(straight), weights(stepped))
    assert stepped.finished is not None


def test_events_come_in_order_and_exactly_n_updates_are_done(tmp_path):
    trainer = make_trainer(tmp_path, valid=random_examples(4, seed=9), steps_per_eval=2, save_every=3)
    kinds = [type(event) for event in trainer.events(2) if not isinstance(event, Progress)]
    assert kinds == [
        RunStarted,
        EvaluationCompleted,
        StepCompleted,
        StepCompleted,
        EvaluationCompleted,
        AdapterSaved,
    ]
    assert trainer.state.step == 2
    rest = [type(event) for event in trainer.events()]
    assert rest.count(StepCompleted) == 4
    assert rest[-1] is RunFinished
    assert list(trainer.events()) == []


def test_training_lowers_the_loss(tmp_path):
    examples = [
        TokenizedExample(np.arange(1, 12, dtype=np.int32), np.r_[0, np.ones(10)].astype(np.float32), row)
        for row in range(4)
    ]
    events = list(make_trainer(tmp_path, train=examples, iters=60, learning_rate=3e-2).events())
    assert losses(events)[-1] < 0.2 * losses(events)[0]


@pytest.mark.parametrize("fine_tune_type", ["lora", "dora", "full"])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "adafactor", "muon", "lion"])
@pytest.mark.matrix
def test_every_optimizer_moves_every_kind_of_parameter(tmp_path, fine_tune_type, optimizer):
    settings = {"fine_tune_type": fine_tune_type, "optimizer": optimizer, "learning_rate": 1e-3, "iters": 3}
    if fine_tune_type == "full":
        settings["lora_parameters"] = {}
    trainer = make_trainer(tmp_path, **settings)
    before = weights(trainer)
    assert all(math.isfinite(loss) for loss in losses(trainer.events()))
    after = weights(trainer)
    assert any(not np.array_equal(before[name], after[name]) for name in before)


def test_compiled_and_plain_steps_agree(tmp_path):
    plain, compiled = make_trainer(tmp_path, name="a"), make_trainer(tmp_path, name="b", compiled=True)
    assert losses(compiled.events()) == pytest.approx(losses(plain.events()), rel=1e-4)


# Law 6


def test_a_failure_inside_the_update_changes_nothing(tmp_path):
    trainer = make_trainer(tmp_path)
    list(trainer.events(2))
    before, state = weights(trainer), dataclasses.replace(trainer.state)
    optimizer_before = [np.array(array) for _, array in tree_flatten(trainer.stepper.optimizer.state)]
    stream = mx.random.state[0].tolist()
    real = trainer.stepper._gradients

    def interrupted(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    trainer.stepper._gradients = interrupted
    with pytest.raises(KeyboardInterrupt):
        list(trainer.events(1))
    trainer.stepper._gradients = real
    assert_same_weights(before, weights(trainer))
    assert trainer.state == state
    assert mx.random.state[0].tolist() == stream
    for old, (_, new) in zip(optimizer_before, tree_flatten(trainer.stepper.optimizer.state)):
        assert np.array_equal(old, np.array(new))
    uninterrupted = make_trainer(tmp_path, name="other")
    expected = losses(uninterrupted.events())
    assert losses(trainer.events()) == expected[2:]


def test_nan_stops_the_run_naming_the_rows_and_keeps_what_was_learned(tmp_path):
    examples = random_examples(12)
    poisoned = dataclasses.replace(
        examples[7], loss_mask=np.where(examples[7].loss_mask > 0, np.nan, 0).astype(np.float32)
    )
    trainer = make_trainer(tmp_path, train=[*examples[:7], poisoned, *examples[8:]], iters=8)
    before, failed = None, None
    for _ in range(8):
        before = weights(trainer)
        events = list(trainer.events(1))
        failed = next((event for event in events if isinstance(event, RunFailed)), None)
        if failed:
            break
    assert 7 in failed.rows
    assert "7" in failed.error
    assert_same_weights(before, weights(trainer))


# Requests


def test_pause_and_stop_are_read_at_step_boundaries(tmp_path):
    trainer = make_trainer(tmp_path)
    seen = []
    for event in trainer.events():
        seen.append(event)
        if isinstance(event, StepCompleted) and event.step == 2:
            trainer.request(Pause("asked"))
    assert isinstance(seen[-1], RunPaused)
    assert trainer.state.step == 2
    trainer.request(Stop())
    assert [event.reason for event in trainer.events() if isinstance(event, RunFinished)] == ["stopped"]


def test_a_changed_learning_rate_acts_from_the_next_update(tmp_path):
    trainer = make_trainer(tmp_path, lr_schedule={"name": "constant", "warmup": 0})
    list(trainer.events(2))
    trainer.request(ChangeSetting("learning_rate", 1e-3))
    events = list(trainer.events(1))
    assert [event.new for event in events if isinstance(event, SettingChanged)] == [1e-3]
    assert [event.learning_rate for event in events if isinstance(event, StepCompleted)] == [1e-3]


# Validation


def test_validation_is_weighted_by_token_and_changes_nothing(tmp_path):
    valid = random_examples(7, seed=3)
    trainer = make_trainer(tmp_path, valid=valid)
    list(trainer.events(2))
    before = weights(trainer)
    first, second = trainer.evaluate(), trainer.evaluate()
    totals = [trainer.stepper.evaluate(pad([example])) for example in valid]
    assert first.loss == second.loss
    assert first.loss == pytest.approx(sum(one.total for one in totals) / sum(one.units for one in totals), rel=1e-5)
    assert dict(first.row_losses) == pytest.approx(
        {row: one.total / one.units for row, one in enumerate(totals)}, rel=1e-4
    )
    assert first.perplexity == pytest.approx(math.exp(first.loss))
    assert_same_weights(before, weights(trainer))


@pytest.mark.long
def test_early_stopping_keeps_the_best_adapter(tmp_path):
    # Training rows that contradict the validation rows: validation gets worse from the first update on.
    trainer = make_trainer(
        tmp_path,
        valid=random_examples(6, seed=50),
        iters=200,
        steps_per_eval=5,
        early_stopping_patience=3,
        learning_rate=5e-2,
    )
    events = list(trainer.events())
    finished = events[-1]
    assert finished.reason == "early stopping"
    assert finished.step < 200
    evaluations = [event for event in events if isinstance(event, EvaluationCompleted)]
    assert finished.best_loss == min(event.loss for event in evaluations)
    if finished.best_step:
        assert (tmp_path / "run" / "best" / "adapters.safetensors").exists()


def test_the_test_split_is_measured_at_the_end(tmp_path):
    trainer = make_trainer(tmp_path, test=random_examples(5, seed=4))
    assert trainer.evaluate("test").rows == 5
    with pytest.raises(DataError, match="valid"):
        trainer.evaluate("valid")


# Schedules


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"name": "constant", "warmup": 4}, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
        ({"name": "linear", "warmup": 0}, [1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        (
            {"name": "cosine", "warmup": 2},
            [0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)],
        ),
        ({"name": "step_decay", "arguments": [1e-3, 0.5, 2], "warmup": 0}, [1, 1, 0.5, 0.5, 0.25, 0.25]),
        ({"name": "exponential_decay", "arguments": [1e-3, 0.9], "warmup": 0}, [0.9**k for k in range(6)]),
    ],
)
def test_learning_rate_follows_the_schedule(schedule, expected):
    config = RunConfig.from_dict({"learning_rate": 1e-3, "lr_schedule": schedule})
    assert [learning_rate_at(config, 6, step) for step in range(6)] == pytest.approx(
        [1e-3 * factor for factor in expected]
    )


# Adapters


def test_short_and_full_key_names_mean_the_same():
    model = tiny_model()
    assert adapters.resolve_keys(model, ("q_proj",)) == adapters.resolve_keys(model, ("self_attn.q_proj",))
    with pytest.raises(ConfigError, match="Did you mean 'q_proj'"):
        adapters.resolve_keys(model, ("q_prj",))


def test_a_trainer_that_is_closed_leaves_the_base_as_it_was(tmp_path):
    base = tiny_model()
    tokens = mx.array([[1, 2, 3, 4]])
    expected = base(tokens)
    trainer = make_trainer(tmp_path, learning_rate=5e-2)
    list(trainer.events(4))
    adapted = trainer.model(tokens)
    assert not mx.array_equal(adapted, expected).item()
    trainer.close()
    assert mx.array_equal(trainer.model(tokens), expected).item()


def test_an_adapter_warm_starts_another_run(tmp_path):
    first = make_trainer(tmp_path, name="first")
    list(first.events())
    second = make_trainer(tmp_path, name="second", resume_adapter_file=str(tmp_path / "first"))
    assert_same_weights(weights(first), weights(second))
    with pytest.raises(ModelError, match="rank"):
        make_trainer(tmp_path, name="third", resume_adapter_file=str(tmp_path / "first"), lora_parameters={"rank": 2})
    with pytest.raises(ModelError, match="no such file"):
        make_trainer(tmp_path, name="fourth", resume_adapter_file=str(tmp_path / "nowhere"))


def test_too_many_layers_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="has 2 layers"):
        make_trainer(tmp_path, num_layers=3)


def test_full_needs_float_weights(tmp_path):
    model = tiny_model(dims=64)
    nn.quantize(model, group_size=32, bits=4)
    with pytest.raises(ModelError, match="float weights"):
        make_trainer(tmp_path, model=model, fine_tune_type="full", lora_parameters={})


def test_no_rows_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no training row"):
        Trainer(RunConfig(), tiny_model(), TrainerExamples([]), name="x", folder=tmp_path)


def test_seeds_differ_by_purpose_and_step():
    seeds = {seed_for(0, purpose, step) for purpose in ("adapter", "dropout") for step in range(50)}
    assert len(seeds) == 100
