"""The head is computed at scored positions alone, for every family, and gives what the whole model gives."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import llama
from mlx_lm.tuner.utils import linear_to_lora_layers

from every_family import TRAINED, WRAPPERS, small_model
from mlx_nb.data.examples.batches import pad
from mlx_nb.model.logprobs import TargetScorer, target_inputs
from mlx_nb.model.text_model import full_logits_note, text_model
from tiny import VOCABULARY, random_examples, tiny_model

ADAPTER = {"rank": 2, "scale": 2.0, "dropout": 0.0}


def with_adapter(model):
    """Adapters that are no zeros, so that all their tensors have a gradient."""
    model.freeze()
    linear_to_lora_layers(model, -1, ADAPTER)
    model.update(tree_map(lambda array: array + 0.03, model.trainable_parameters()))
    return model


def loss_and_gradient(scorer, inputs):
    model = scorer.model
    parameters = model.trainable_parameters()

    def loss(parameters):
        model.update(parameters)
        return -(scorer.logprobs(inputs) * inputs.weight_S).sum()

    value, gradient = mx.value_and_grad(loss)(parameters)
    mx.eval(value, gradient)
    model.update(parameters)
    return value.item(), dict(tree_flatten(gradient))


def assert_equal(one, other):
    """Loss to 1e-6 and each gradient to 1e-4 of its largest number."""
    assert one[0] == pytest.approx(other[0], rel=1e-6)
    largest = max(mx.abs(array).max().item() for array in other[1].values())
    for name, expected in other[1].items():
        atol = 1e-4 * max(mx.abs(expected).max().item(), 1e-4 * largest)
        assert mx.allclose(one[1][name], expected, rtol=1e-4, atol=atol).item(), name


@pytest.mark.parametrize("family", TRAINED)
@pytest.mark.matrix(every=17)
def test_the_head_at_scored_positions_gives_the_loss_and_gradient_of_the_whole_model(family):
    model = with_adapter(small_model(family))
    scorer = TargetScorer(model)
    assert scorer.projects_targets_only
    assert full_logits_note(model) is None
    inputs = target_inputs(pad(random_examples(3)))
    assert scorer.logits(inputs).shape == (len(inputs.target_S), VOCABULARY)
    apart = loss_and_gradient(scorer, inputs)
    scorer._text = None
    assert_equal(apart, loss_and_gradient(scorer, inputs))


@pytest.mark.parametrize("family", [*WRAPPERS, "mamba2", "nemotron_h"])
@pytest.mark.matrix(every=4)
def test_what_is_found_changes_nothing_in_the_model(family):
    model = small_model(family)
    before = [(path, id(module), sorted(vars(module))) for path, module in model.named_modules()]
    scorer = TargetScorer(model)
    mx.eval(scorer.logprobs(target_inputs(pad(random_examples(2)))))
    assert [(path, id(module), sorted(vars(module))) for path, module in model.named_modules()] == before


def test_only_scored_positions_reach_the_head():
    model = small_model("gemma3")
    seen = []
    model.language_model.lm_head = Watched(model.language_model.lm_head, seen)
    scorer = TargetScorer(model)
    seen.clear()
    inputs = target_inputs(pad(random_examples(3)))
    mx.eval(scorer.logprobs(inputs))
    assert seen == [(1, len(inputs.target_S), 32)]


class Watched(nn.Module):
    def __init__(self, inner, seen):
        super().__init__()
        self.inner = inner
        self._seen = seen

    def __call__(self, x):
        self._seen.append(x.shape)
        return self.inner(x)


class Mixed(llama.Model):
    """Its logits at a position depend on other positions after the head."""

    def __call__(self, inputs, cache=None):
        return super().__call__(inputs, cache)[:, ::-1]


def test_a_model_whose_logits_are_mixed_after_its_head_is_run_whole_and_reported():
    model = Mixed(tiny_model().args)
    assert text_model(model) is None
    assert "llama" in full_logits_note(model)
    assert "\n" not in full_logits_note(model)


class Scaled(llama.Model):
    """Scale, bias and soft cap of its own, around a wrapper's call."""

    def __init__(self, args):
        super().__init__(args)
        self.gain, self.bias = mx.array(3.0), mx.linspace(-1, 1, args.vocab_size)

    def __call__(self, inputs, cache=None):
        return 5 * mx.tanh(super().__call__(inputs, cache) * self.gain / 5) + self.bias


def test_scale_soft_cap_and_bias_are_the_models_own_and_are_trained():
    model = Scaled(tiny_model().args)
    scorer = TargetScorer(model)
    assert scorer.projects_targets_only
    inputs = target_inputs(pad(random_examples(3)))
    apart = loss_and_gradient(scorer, inputs)
    assert mx.abs(apart[1]["bias"]).max().item() > 0
    assert abs(apart[1]["gain"].item()) > 0
    scorer._text = None
    assert_equal(apart, loss_and_gradient(scorer, inputs))


def test_a_scorer_reads_the_parameters_of_the_moment():
    model = Scaled(tiny_model().args)
    scorer, inputs = TargetScorer(model), target_inputs(pad(random_examples(2)))
    first = scorer.logprobs(inputs)
    model.gain = mx.array(1.0)
    second = scorer.logprobs(inputs)
    scorer._text = None
    assert not mx.allclose(first, second).item()
    assert mx.allclose(second, scorer.logprobs(inputs), atol=1e-5).item()
