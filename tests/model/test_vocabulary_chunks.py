"""Targets that are projected a few at a time give what all at once give, in memory of a few."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from every_family import small_model
from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.examples.batches import pad
from mlx_nb.model import vocabulary_chunks
from mlx_nb.model.adapters import attach_adapter
from mlx_nb.model.logprobs import TargetScorer, target_inputs
from mlx_nb.objectives.build import objective_for
from mlx_nb.objectives.conformance import check_objective
from mlx_nb.objectives.kinds import LOSS_KINDS
from tiny import VOCABULARY, random_examples, tiny_model

LOSSES = [
    ("sft", {}),
    ("sft", {"label_smoothing": 0.1, "z_loss": 0.01}),
    ("sft", {"loss": "dft"}),
    ("dpo", {}),
    ("orpo", {}),
    ("cpo", {}),
    ("kto", {}),
    ("grpo", {"rewards": ["length"], "updates_per_rollout": 2, "importance_sampling_level": "sequence"}),
]


@pytest.fixture(params=[3, 7], ids="{} at once".format)
def chunks(request, monkeypatch):
    monkeypatch.setattr(vocabulary_chunks, "_CHUNK_BYTES", 4 * VOCABULARY * request.param)
    monkeypatch.setattr(vocabulary_chunks, "_FEWEST", 1)
    assert vocabulary_chunks.targets_at_once(VOCABULARY) == request.param
    return request.param


def attached(model, **settings):
    config = RunConfig.from_dict({"model": "tiny", "data": "rows", **settings})
    attach_adapter(model, config)
    mx.random.seed(1)
    noise = tree_map(lambda array: array + 0.1 * mx.random.normal(array.shape), model.trainable_parameters())
    model.update(noise)
    model.eval()
    return model


def found(scorer, objective, inputs):
    parameters = scorer.model.trainable_parameters()
    metrics = []

    def total(parameters):
        scorer.model.update(parameters)
        sums = objective(scorer, inputs)
        metrics[:] = [(name, part) for name, pair in sums.metrics.items() for part in pair]
        return sums.total

    value, gradient = mx.value_and_grad(total)(parameters)
    mx.eval(value, gradient, [part for _, part in metrics])
    scorer.model.update(parameters)
    return value.item(), dict(tree_flatten(gradient)), [(name, part.item()) for name, part in metrics]


def assert_same(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-6, abs=3e-7)  # that of GRPO is a difference of larger sums
    for (name, ours), (same, theirs) in zip(one[2], other[2], strict=True):
        assert name == same
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5), name
    for name, expected in other[1].items():
        most = 1e-4 * max(mx.abs(expected).max().item(), 1e-6)
        assert mx.abs(one[1][name] - expected).max().item() <= most, name


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize(("method", "settings"), LOSSES, ids=lambda value: str(value))
@pytest.mark.matrix(every=11)
def test_every_loss_has_the_values_and_gradients_of_all_targets_at_once(
    method, settings, training, chunks, monkeypatch
):
    config = RunConfig.from_dict({"method": method, **settings})
    scorer, objective = TargetScorer(attached(tiny_model())), objective_for(config)
    rows = "tokens" if method == "sft" else {"kto": "labels", "grpo": "prompts"}.get(method, "pairs")
    inputs = target_inputs(LOSS_KINDS[rows].trial_batch(scorer, range(6), 1))
    assert len(inputs.target_S) > 2 * chunks
    scorer.model.train(training)
    cut = found(scorer, objective, inputs)
    monkeypatch.setattr(vocabulary_chunks, "_CHUNK_BYTES", 1 << 30)
    assert_same(cut, found(scorer, objective, inputs))


KINDS = {
    "full, tied": (lambda: tiny_model(), {"fine_tune_type": "full"}),
    "full, a head of its own": (lambda: tiny_model(tied=False), {"fine_tune_type": "full"}),
    "adapter on the head": (lambda: tiny_model(tied=False), {"lora_parameters": {"keys": ["lm_head", "q_proj"]}}),
    "adapter on the tied embedding": (lambda: tiny_model(), {"lora_parameters": {"keys": ["embed_tokens", "v_proj"]}}),
    "soft cap in a wrapper": (lambda: small_model("gemma4"), {}),
    "recurrent": (lambda: small_model("mamba2"), {"fine_tune_type": "full"}),
    "experts": (lambda: small_model("qwen3_moe"), {}),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.matrix(every=10)
def test_what_is_trained_in_the_head_has_its_whole_gradient(kind, training, chunks, monkeypatch):
    make, settings = KINDS[kind]
    scorer = TargetScorer(attached(make(), **settings))
    objective = objective_for(RunConfig.from_dict({"method": "sft"}))
    inputs = target_inputs(pad(random_examples(4)))
    scorer.model.train(training)
    cut = found(scorer, objective, inputs)
    monkeypatch.setattr(vocabulary_chunks, "_CHUNK_BYTES", 1 << 30)
    assert_same(cut, found(scorer, objective, inputs))


@pytest.mark.long
@pytest.mark.parametrize("method", ["sft", "dpo", "kto", "grpo"])
@pytest.mark.usefixtures("chunks")
def test_objectives_keep_their_laws_in_chunks(method):
    check_objective(method)


@pytest.mark.usefixtures("chunks")
def test_the_trained_arrays_of_a_head_are_found_and_left_as_they_were():
    model = attached(tiny_model(tied=False), lora_parameters={"keys": ["lm_head", "q_proj"]})
    before = {name: np.array(array) for name, array in tree_flatten(model.parameters())}
    scorer = TargetScorer(model)
    assert set(scorer.trained_head) == {"lm_head.lora_a", "lm_head.lora_b"}
    after = dict(tree_flatten(model.parameters()))
    assert all(np.array_equal(before[name], np.array(after[name])) for name in before)
    assert TargetScorer(attached(tiny_model())).trained_head == []


@pytest.mark.long
def test_memory_is_that_of_a_chunk_and_not_of_all_targets(monkeypatch):
    """A hundred times more logits than the model's own arrays."""
    mx.random.seed(0)
    from mlx_lm.models import llama

    arguments = {**vars(tiny_model().args), "vocab_size": 20_000}
    model = llama.Model(llama.ModelArgs.from_dict(arguments))
    scorer = TargetScorer(attached(model, lora_parameters={"rank": 1}))
    model.train()
    objective = objective_for(RunConfig.from_dict({"method": "sft"}))
    inputs = target_inputs(pad(random_examples(16, shortest=100, longest=100)))

    def peak(at_once):
        monkeypatch.setattr(vocabulary_chunks, "_CHUNK_BYTES", 4 * 20_000 * at_once)
        parameters = model.trainable_parameters()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        found(scorer, objective, inputs)
        model.update(parameters)
        return mx.get_peak_memory() - before

    all_at_once = peak(1 << 20)
    assert len(inputs.target_S) == 800
    assert all_at_once > 3 * 800 * 20_000 * 4
    assert peak(64) < 0.3 * all_at_once
