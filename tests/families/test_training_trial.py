"""Before the first update: what cannot be trained is refused by name in one line, what would never learn is named."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from every_family import ENDS_THE_PROCESS, REFUSED, configuration, save_model, small_model
from mlx_nb import Run
from mlx_nb.config.run_config import RunConfig
from mlx_nb.errors import ModelError
from mlx_nb.model.loading import LoadedModel
from mlx_nb.model.training_trial import training_notes
from mlx_nb.train.optimizer import refuse_beyond_memory
from tiny import tiny_model, tiny_pairs, tiny_rows


def notes_of(model, **settings):
    loaded = LoadedModel(model, None, Path(), "tiny", None)
    return training_notes(
        loaded, RunConfig.from_dict({"model": "tiny", "data": "rows", **settings}), refuse_beyond_memory
    )


@pytest.mark.parametrize("family", [family for family in REFUSED if family not in ENDS_THE_PROCESS])
@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.matrix(every=6)
def test_a_family_that_cannot_be_trained_is_refused_by_name_before_anything_is_written(
    family, method, tmp_path, tiny_folder
):
    folder = tmp_path / "model"
    save_model(configuration(family, 300), folder, tiny_folder)
    data = tiny_pairs(4) if method == "dpo" else tiny_rows(4)
    settings = {"model": str(folder), "data": data, "method": method, "iters": 1, "adapter_path": str(tmp_path / "a")}
    run = Run(RunConfig.from_dict(settings))
    with pytest.raises(ModelError, match=family) as refused:
        run.step()
    assert REFUSED[family] in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "a").exists()


def test_trained_tensors_without_any_gradient_are_named(tmp_path):
    [note] = notes_of(small_model("deepseek_v32"))
    assert note.startswith("12 of 46 trained tensors never get a gradient in deepseek_v32")
    assert "self_attn.indexer.wq_b.lora_a" in note
    assert "\n" not in note
    note, *_ = notes_of(small_model("afm7"), packing=False)
    assert note.startswith("8 of 48")
    assert notes_of(small_model("qwen3_moe")) == []


def test_an_adapter_that_mlx_lm_will_not_read_is_reported():
    _, note = notes_of(small_model("afm7"), packing=False)
    assert note.startswith("mlx_lm.load cannot read this adapter")
    assert "qkv_proj.lora_a.0" in note


def test_a_family_that_answers_with_weights_of_before_an_update_is_refused():
    with pytest.raises(ModelError, match=r"kimi_k3 cannot be trained .* cached before an update"):
        notes_of(small_model("kimi_k3"), fine_tune_type="full")
    assert not any("kept" in note for note in notes_of(small_model("mamba2"), fine_tune_type="full"))


class Unused(llama.Model):
    """Its last layer is not used at all."""

    def __call__(self, inputs, cache=None):
        layers, self.model.layers = self.model.layers, self.model.layers[:-1]
        try:
            return super().__call__(inputs, cache)
        finally:
            self.model.layers = layers


class Frozen(llama.Model):
    """Nothing that its layers do reaches the logits with a gradient."""

    def __call__(self, inputs, cache=None):
        return mx.stop_gradient(super().__call__(inputs, cache))


class Broken(llama.Model):
    """In training it gives no numbers."""

    def __call__(self, inputs, cache=None):
        logits = super().__call__(inputs, cache)
        return logits * float("nan") if self.training else logits


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_a_layer_that_is_not_used_is_named_for_every_kind_of_training(kind):
    [note] = notes_of(Unused(tiny_model().args), fine_tune_type=kind)
    assert "layers.1." in note
    assert "layers.0." not in note


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_a_model_in_which_nothing_or_no_number_would_be_learned_is_refused(kind):
    with pytest.raises(ModelError, match=r"llama cannot be trained .* no trained parameter has a gradient"):
        notes_of(Frozen(tiny_model().args), fine_tune_type=kind)
    with pytest.raises(ModelError, match=r"llama cannot be trained .* is not finite"):
        notes_of(Broken(tiny_model().args), fine_tune_type=kind)


def test_the_trial_leaves_model_modes_and_random_stream_as_they_were():
    model = tiny_model()
    model.eval()
    before = {name: np.array(array) for name, array in tree_flatten(model.parameters())}
    mx.random.seed(5)
    expected = mx.random.uniform().item()
    mx.random.seed(5)
    notes_of(model)
    assert mx.random.uniform().item() == expected
    after = dict(tree_flatten(model.parameters()))
    assert list(after) == list(before)
    assert all(np.array_equal(before[name], np.array(after[name])) for name in before)
    assert not any(module.training for module in model.modules())
