"""MLPs computed a chunk of tokens at a time give the model's own loss and gradient, in the memory of a chunk."""

from __future__ import annotations

import mlx.core as mx
import pytest

from every_family import TRAINED, small_model
from method_batches import METHODS, batch_for
from mlx_nb import Run
from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.examples.batches import pad
from mlx_nb.errors import ModelError
from mlx_nb.model import cpu_kernels
from mlx_nb.model.logprobs import TargetScorer, target_inputs
from mlx_nb.model.recomputing import Recomputed
from mlx_nb.model.token_chunks import _InChunks
from mlx_nb.model.trees import trained_arrays_of
from recomputed_models import assert_same, attached, deep_model, gradients, peak, state_of
from tiny import random_examples, tiny_model, tiny_rows

# Its MLPs mix each token with the one before it.
REFUSED = "rwkv7"
# Their layers are a token mixer each.
WITHOUT_PARTS = ("falcon_mamba", "mamba", "mamba2", "nemotron_h")
OTHERS = [family for family in TRAINED if family not in (REFUSED, "iquestloopcoder", *WITHOUT_PARTS)]
CHUNKS = [Recomputed(tokens=3), Recomputed(1, tokens=5), Recomputed(2, each_layer=True, tokens=4)]


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.matrix(every=30)
def test_every_family_has_its_own_loss_and_gradient(family):
    model = attached(small_model(family), fine_tune_type="full")
    assert_same(*gradients(model, pad(random_examples(3)), recomputed=CHUNKS[0]))


@pytest.mark.parametrize("recomputed", CHUNKS)
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize(("method", "settings"), METHODS, ids=lambda value: str(value))
@pytest.mark.parametrize("compiled", [False, True], ids=["as it is", "compiled"])
@pytest.mark.matrix
def test_it_goes_with_every_method_adapter_and_checkpoint(method, settings, kind, recomputed, compiled, monkeypatch):
    monkeypatch.setattr("mlx_nb.model.lanes._TOKENS_IN_A_LANE", 8)
    model = attached(tiny_model(), fine_tune_type=kind)
    batch = batch_for(method, model)
    found = gradients(model, batch, lanes=2, compiled=compiled, recomputed=recomputed, method=method, **settings)
    assert_same(*found)


@pytest.mark.parametrize("recomputed", CHUNKS)
@pytest.mark.long
def test_it_goes_with_packing_and_attention_in_blocks(recomputed, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "_BLOCK", 4)
    monkeypatch.setattr(cpu_kernels, "_FEWEST_TOKENS", 5)
    batch = pad(random_examples(4))
    model = attached(tiny_model())
    alone, _ = gradients(model, batch)
    for found in gradients(model, batch._replace(packed=True), recomputed=recomputed):
        assert_same(alone, found)


def test_what_is_dropped_the_first_time_is_dropped_again():
    """By finite differences: other numbers are dropped than without chunks."""
    model = attached(tiny_model(), lora_parameters={"rank": 2, "dropout": 0.5, "keys": ["mlp.down_proj"]})
    batch = pad(random_examples(3))
    [_, (_loss, slopes)] = gradients(model, batch, recomputed=CHUNKS[0])
    before = dict(trained_arrays_of(model))
    largest = max(slopes, key=lambda name: mx.abs(slopes[name]).max().item())
    step = 1e-3 / mx.linalg.norm(slopes[largest]).item()
    losses = []
    for sign in (1, -1):
        model.load_weights([(largest, before[largest] + sign * step * slopes[largest])], strict=False)
        losses.append(gradients(model, batch, recomputed=CHUNKS[0])[1][0])
    expected = 2 * step * (slopes[largest] ** 2).sum().item()
    assert losses[0] - losses[1] == pytest.approx(expected, rel=0.02)


def test_a_family_whose_mlps_mix_tokens_is_refused_by_name():
    with pytest.raises(ModelError) as caught:
        TargetScorer(attached(small_model(REFUSED)), CHUNKS[0])
    assert str(caught.value).startswith(f"efficient_long_context cannot be used with {REFUSED}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", WITHOUT_PARTS)
def test_a_family_of_mixers_alone_is_refused_by_name(family):
    with pytest.raises(ModelError) as caught:
        TargetScorer(attached(small_model(family)), CHUNKS[0])
    refused = f"efficient_long_context cannot be used with {family.removeprefix('falcon_')}: "
    assert str(caught.value).startswith(f"{refused}no part of its layers besides token mixers can be computed")


def test_nothing_of_it_stays_in_the_model():
    model = attached(small_model("gemma3"))
    before = state_of(model)
    gradients(model, pad(random_examples(2)), recomputed=CHUNKS[1])
    assert state_of(model) == before


def test_an_evaluation_is_not_computed_in_chunks(monkeypatch):
    scorer = TargetScorer(tiny_model(), CHUNKS[0])
    scorer.model.eval()
    monkeypatch.setattr(_InChunks, "__call__", lambda *args: pytest.fail("called"))
    mx.eval(scorer.logprobs(target_inputs(pad(random_examples(2)))))


@pytest.mark.long
def test_memory_of_the_mlps_is_that_of_a_chunk():
    batch, model = pad(random_examples(1, shortest=600, longest=600)), attached(deep_model(6))
    of_mlps = 600 * 256 * 4  # one of the arrays of an MLP that its gradient needs
    whole, chunked = (peak(model, batch, what) for what in (Recomputed(), Recomputed(tokens=50)))
    assert whole - chunked > 6 * 3 * of_mlps
    one_layer, both = (peak(model, batch, Recomputed(1, tokens=tokens)) for tokens in (0, 50))
    assert one_layer - both > 2 * of_mlps


@pytest.mark.long
def test_a_run_with_it_learns_the_same_and_resumes_the_same(tiny_folder, tmp_path):
    losses = {}
    for on in (False, True):
        settings = {"model": str(tiny_folder), "data": tiny_rows(8), "iters": 3, "efficient_long_context": on}
        settings |= {"seq_step_size": 4} if on else {}
        run = Run(RunConfig.from_dict({**settings, "adapter_path": str(tmp_path / str(on))}))
        losses[on] = [run.step().loss for _ in range(3)]
    assert losses[True] == pytest.approx(losses[False], rel=1e-6)
