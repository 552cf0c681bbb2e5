"""Layers that are computed again give the model's own loss and gradient, in the memory of one layer."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from every_family import TRAINED, configuration, save_model, small_model
from method_batches import METHODS, batch_for
from mlx_nb import Run
from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.examples.batches import pad
from mlx_nb.errors import ModelError
from mlx_nb.model import cpu_kernels, layer_checkpoints, vocabulary_chunks
from mlx_nb.model.adapters import attach_adapter
from mlx_nb.model.layer_checkpoints import checkpointed_layers
from mlx_nb.model.logprobs import TargetScorer, target_inputs
from mlx_nb.objectives.build import objective_for
from mlx_nb.train.optimizer import build_optimizer
from mlx_nb.train.step import Stepper
from tiny import VOCABULARY, random_examples, tiny_model, tiny_rows

# mlx-lm's model goes through the parts of its layers by itself.
REFUSED = "iquestloopcoder"


def attached(model, **settings):
    own = {} if settings.get("fine_tune_type") == "full" else {"lora_parameters": {"rank": 2}}
    config = RunConfig.from_dict({"model": "tiny", "data": "rows", **own, **settings})
    attach_adapter(model, config)
    mx.random.seed(1)
    names, arrays = zip(*tree_flatten(model.trainable_parameters()))
    moved = [array + 0.05 * mx.random.normal(array.shape) for array in arrays]
    model.load_weights(list(zip(names, moved)), strict=False)
    return model


def gradients(model, batch, *, lanes=1, seed=3, compiled=False, **settings):
    """Loss and gradient of a batch, with the layers kept and with them computed again."""
    config, found = RunConfig.from_dict(settings), []
    for checkpoints in (False, True):
        scorer = TargetScorer(model, grad_checkpoint=checkpoints)
        stepper = Stepper(model, build_optimizer(config), objective_for(config), scorer, compiled=compiled, lanes=lanes)
        measured = stepper.gradients([batch], seed)
        found.append((measured.loss, dict(tree_flatten(measured.gradients))))
    return found


def assert_same(kept, again):
    assert again[0] == pytest.approx(kept[0], rel=1e-6, abs=1e-7)
    largest = max(mx.abs(array).max().item() for array in kept[1].values())
    assert largest > 0
    for name, expected in kept[1].items():
        assert mx.abs(again[1][name] - expected).max().item() <= 1e-4 * largest, name


@pytest.mark.parametrize("family", [family for family in TRAINED if family != REFUSED])
@pytest.mark.matrix(every=20)
def test_every_family_has_its_own_loss_and_gradient(family):
    model = attached(small_model(family), fine_tune_type="full")
    assert_same(*gradients(model, pad(random_examples(3))))


def test_a_family_whose_layers_are_not_called_is_refused_by_name():
    with pytest.raises(ModelError) as caught:
        TargetScorer(attached(small_model(REFUSED)), grad_checkpoint=True)
    assert str(caught.value) == (
        f"grad_checkpoint cannot be used with {REFUSED}: its layers are not called one after the other. "
        "Set grad_checkpoint: false."
    )


class Mixing(llama.Model):
    """Adds to a layer's result what went into it, by a parameter that no layer has."""

    def __init__(self, args):
        super().__init__(args)
        self.share = mx.array(0.5)
        for layer in self.layers:
            layer._share = lambda: self.share
            layer.mlp.__class__ = Shared
            layer.mlp._share = layer._share


class Shared(llama.MLP):
    def __call__(self, x):
        return super().__call__(x) + x * self._share()


def test_a_gradient_that_does_not_come_through_a_layer_is_found_out():
    with pytest.raises(ModelError, match="the gradient with it is not that of the model"):
        TargetScorer(attached(Mixing(tiny_model().args), fine_tune_type="full"), grad_checkpoint=True)


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize(("method", "settings"), METHODS, ids=lambda value: str(value))
@pytest.mark.parametrize("compiled", [False, True], ids=["as it is", "compiled"])
@pytest.mark.matrix
def test_it_goes_with_every_method_adapter_lane_and_chunk(method, settings, kind, lanes, compiled, monkeypatch):
    monkeypatch.setattr(vocabulary_chunks, "_CHUNK_BYTES", 4 * VOCABULARY * 5)
    monkeypatch.setattr(vocabulary_chunks, "_FEWEST", 1)
    monkeypatch.setattr("mlx_nb.model.lanes._TOKENS_IN_A_LANE", 8)
    model = attached(tiny_model(), fine_tune_type=kind)
    batch = batch_for(method, model)
    assert_same(*gradients(model, batch, lanes=lanes, compiled=compiled, method=method, **settings))


@pytest.mark.parametrize("family", ["llama", "gemma3", "mamba2", "qwen3_moe"])
@pytest.mark.matrix(every=2)
def test_it_goes_with_attention_in_blocks(family, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "_BLOCK", 4)
    monkeypatch.setattr(cpu_kernels, "_FEWEST_TOKENS", 5)
    assert_same(*gradients(attached(small_model(family)), pad(random_examples(4))))


@pytest.mark.parametrize("compiled", [False, True], ids=["as it is", "compiled"])
def test_what_is_dropped_the_first_time_is_dropped_again(compiled):
    model = attached(tiny_model(), lora_parameters={"rank": 4, "dropout": 0.5})
    batch = pad(random_examples(4))
    kept, again = gradients(model, batch, compiled=compiled)
    assert_same(kept, again)
    assert gradients(model, batch, seed=4, compiled=compiled)[1][0] != again[0]


def state_of(model):
    names = [name for name, _ in tree_flatten(model.parameters())]
    return names, [(path, id(module), sorted(vars(module))) for path, module in model.named_modules()]


def test_nothing_of_it_stays_in_the_model():
    model = attached(small_model("gemma3"))
    before = state_of(model)
    gradients(model, pad(random_examples(2)))
    assert state_of(model) == before

    class Broken(Exception):
        pass

    with pytest.raises(Broken), checkpointed_layers(model, lambda _layer: (_ for _ in ()).throw(Broken)):
        model(mx.array([[1, 2]]))
    assert state_of(model) == before


def test_an_evaluation_keeps_nothing_and_computes_nothing_again(monkeypatch):
    scorer = TargetScorer(tiny_model(), grad_checkpoint=True)
    scorer.model.eval()
    monkeypatch.setattr(layer_checkpoints._Checkpointed, "__call__", lambda *args: pytest.fail("called"))
    mx.eval(scorer.logprobs(target_inputs(pad(random_examples(2)))))


def deep_model(layers):
    arguments = dataclasses.replace(
        tiny_model().args, num_hidden_layers=layers, layer_types=None, intermediate_size=256
    )
    mx.random.seed(0)
    return llama.Model(arguments)


def peak(model, batch, *, checkpoints):
    scorer, config = TargetScorer(model, grad_checkpoint=checkpoints), RunConfig()
    stepper = Stepper(model, build_optimizer(config), objective_for(config), scorer, compiled=False)
    for _ in range(2):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        found = stepper.gradients([batch], 0)
        mx.eval(found.gradients)
        del found
    return mx.get_peak_memory() - before


@pytest.mark.long
def test_memory_is_that_of_one_layer_and_of_what_goes_into_the_others():
    batch = pad(random_examples(1, shortest=600, longest=600))
    few, many = (attached(deep_model(layers)) for layers in (4, 16))
    kept, again = ([peak(model, batch, checkpoints=on) for model in (few, many)] for on in (False, True))
    of_inputs = 600 * 32 * 4
    assert again[1] < 0.25 * kept[1]
    assert (again[1] - again[0]) / 12 < 3 * of_inputs
    assert (kept[1] - kept[0]) / 12 > 20 * of_inputs


def test_a_run_with_it_learns_the_same(tiny_folder, tmp_path):
    losses = {}
    for on in (False, True):
        settings = {"model": str(tiny_folder), "data": tiny_rows(8), "iters": 3, "grad_checkpoint": on}
        run = Run(RunConfig.from_dict({**settings, "adapter_path": str(tmp_path / str(on))}))
        losses[on] = [run.step().loss for _ in range(3)]
    np.testing.assert_allclose(losses[True], losses[False], rtol=1e-6)


def test_a_run_is_refused_in_one_line_before_anything_is_written(tiny_folder, tmp_path):
    model = save_model(configuration(REFUSED, 300), tmp_path / "model", tiny_folder)
    settings = {"model": str(model), "data": tiny_rows(4), "grad_checkpoint": True, "iters": 1}
    with pytest.raises(ModelError, match=f"grad_checkpoint cannot be used with {REFUSED}") as caught:
        Run(RunConfig.from_dict({**settings, "adapter_path": str(tmp_path / "run")})).step()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_layers_that_are_not_in_a_list_of_the_model_are_refused():
    class Flat(nn.Module):
        model_type = "flat"

        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, 16)

        @property
        def layers(self):
            return []

        def __call__(self, tokens, cache=None):
            return self.embed.as_linear(self.embed(tokens))

    with pytest.raises(ModelError, match="its layers are not called"):
        TargetScorer(Flat(), grad_checkpoint=True)
