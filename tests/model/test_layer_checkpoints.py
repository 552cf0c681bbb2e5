"""Layers that are computed again give the model's own loss and gradient, in the memory of one layer."""

from __future__ import annotations

from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import llama

from every_family import TRAINED, configuration, save_model, small_model
from method_batches import METHODS, batch_for
from mlx_nb import Run
from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.examples.batches import pad
from mlx_nb.errors import ConfigError, ModelError
from mlx_nb.model import cpu_kernels, layer_checkpoints, vocabulary_chunks
from mlx_nb.model.layer_checkpoints import checkpointed_layers
from mlx_nb.model.logprobs import TargetScorer, target_inputs
from mlx_nb.model.recomputing import Recomputed, recomputed_by
from recomputed_models import ONE_LAYER, assert_same, attached, deep_model, gradients, peak, state_of
from tiny import VOCABULARY, random_examples, tiny_model, tiny_rows

# mlx-lm's model goes through the parts of its layers by itself.
REFUSED = "iquestloopcoder"


@pytest.mark.parametrize("family", [family for family in TRAINED if family != REFUSED])
@pytest.mark.matrix(every=20)
def test_every_family_has_its_own_loss_and_gradient(family):
    model = attached(small_model(family), fine_tune_type="full")
    assert_same(*gradients(model, pad(random_examples(3))))


def test_a_family_whose_layers_are_not_called_is_refused_by_name():
    with pytest.raises(ModelError) as caught:
        TargetScorer(attached(small_model(REFUSED)), Recomputed(segment=1))
    assert str(caught.value) == (
        f"grad_checkpoint cannot be used with {REFUSED}: its layers are not called one after the other. "
        "Set grad_checkpoint: false."
    )


SEGMENTS = [Recomputed(2), Recomputed(3), Recomputed(9), Recomputed(2, each_layer=True)]


@pytest.mark.parametrize("recomputed", SEGMENTS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next", "gemma2"])
@pytest.mark.matrix(every=3)
def test_segments_of_layers_have_the_loss_and_gradient_of_the_model(family, recomputed):
    model = attached(deep_model(5) if family == "llama" else small_model(family), fine_tune_type="full")
    assert_same(*gradients(model, pad(random_examples(3)), recomputed=recomputed))


@pytest.mark.parametrize("compiled", [False, True], ids=["as it is", "compiled"])
@pytest.mark.parametrize("recomputed", [Recomputed(2), Recomputed(2, each_layer=True)])
@pytest.mark.matrix(every=2)
def test_segments_of_layers_drop_the_same_again(recomputed, compiled):
    model = attached(deep_model(5), lora_parameters={"rank": 2, "dropout": 0.5})
    assert_same(*gradients(model, pad(random_examples(4)), compiled=compiled, recomputed=recomputed))


class Averaging(llama.LlamaModel):
    """Gives the sum of what comes out of all its layers, and scales what goes into the last."""

    def __call__(self, inputs, cache=None, input_embeddings=None):
        h = total = self.embed_tokens(inputs)
        caches = cache or [None] * len(self.layers)
        mask = llama.create_attention_mask(h, caches[0])
        for number, (layer, own) in enumerate(zip(self.layers, caches)):
            h = layer(h if number < len(self.layers) - 1 else h * 0.5, mask, cache=own)
            total = total + h
        return self.norm(total)


@pytest.mark.parametrize("recomputed", SEGMENTS)
def test_results_inside_of_a_segment_can_be_used_elsewhere(recomputed):
    model = deep_model(5)
    model.model.__class__ = Averaging
    assert_same(*gradients(attached(model, fine_tune_type="full"), pad(random_examples(3)), recomputed=recomputed))


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
        TargetScorer(attached(Mixing(tiny_model().args), fine_tune_type="full"), Recomputed(segment=1))


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


def test_nothing_of_it_stays_in_the_model():
    model = attached(small_model("gemma3"))
    before = state_of(model)
    gradients(model, pad(random_examples(2)))
    assert state_of(model) == before

    class Broken(Exception):
        pass

    def broken():
        raise Broken

    with pytest.raises(Broken), checkpointed_layers(model, lambda _layer: nullcontext(), called=broken):
        model(mx.array([[1, 2]]))
    assert state_of(model) == before


def test_an_evaluation_keeps_nothing_and_computes_nothing_again(monkeypatch):
    scorer = TargetScorer(tiny_model(), Recomputed(segment=1))
    scorer.model.eval()
    monkeypatch.setattr(layer_checkpoints._Checkpointed, "__call__", lambda *args: pytest.fail("called"))
    mx.eval(scorer.logprobs(target_inputs(pad(random_examples(2)))))


@pytest.mark.long
def test_memory_is_that_of_one_layer_and_of_what_goes_into_the_others():
    batch = pad(random_examples(1, shortest=600, longest=600))
    few, many = (attached(deep_model(layers)) for layers in (4, 16))
    kept, again = ([peak(model, batch, what) for model in (few, many)] for what in (Recomputed(), ONE_LAYER))
    of_inputs = 600 * 32 * 4
    assert again[1] < 0.25 * kept[1]
    assert (again[1] - again[0]) / 12 < 3 * of_inputs
    assert (kept[1] - kept[0]) / 12 > 20 * of_inputs


@pytest.mark.long
def test_segments_of_layers_need_less_memory_if_each_layer_is_computed_again_too():
    batch = pad(random_examples(1, shortest=300, longest=300))
    model, of_inputs = attached(deep_model(16)), 300 * 32 * 4
    ways = (ONE_LAYER, Recomputed(4, each_layer=True))
    # The least of several, because mlx frees an array a moment earlier or later.
    one_by_one, in_segments = (min(peak(model, batch, what) for _ in range(7)) for what in ways)
    assert one_by_one - in_segments > 6 * of_inputs  # of 16 inputs, 4 + 4 are kept


def test_a_run_with_it_learns_the_same(tiny_folder, tmp_path):
    losses = {}
    for on in (False, True):
        settings = {"model": str(tiny_folder), "data": tiny_rows(8), "iters": 3, "grad_checkpoint": on}
        run = Run(RunConfig.from_dict({**settings, "adapter_path": str(tmp_path / str(on))}))
        losses[on] = [run.step().loss for _ in range(3)]
    np.testing.assert_allclose(losses[True], losses[False], rtol=1e-6)


def test_the_settings_say_what_is_computed_again():
    def of(**settings):
        return recomputed_by(RunConfig.from_dict({"model": "m", "data": "d", **settings}))

    assert of() == Recomputed()
    assert of(grad_checkpoint=True) == of(segment_size=1) == of(grad_checkpoint=True, segment_size=1) == ONE_LAYER
    assert of(segment_size=4) == Recomputed(4)
    assert of(segment_size=4, grad_checkpoint=True) == Recomputed(4, each_layer=True)
    assert of(efficient_long_context=True) == Recomputed(tokens=512)
    assert of(efficient_long_context=True, seq_step_size=64) == Recomputed(tokens=64)
    with pytest.raises(ConfigError, match="`seq_step_size` has no effect without `efficient_long_context: true`"):
        of(seq_step_size=64)


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
        TargetScorer(Flat(), Recomputed(segment=1))
