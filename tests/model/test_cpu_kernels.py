"""What a CPU computes in a faster way is what mlx computes, and is so only where and while it is asked for."""

from __future__ import annotations

import threading

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import activations, base, llama, switch_layers

from every_family import small_model
from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.examples.batches import pad
from mlx_nb.model import cpu_kernels
from mlx_nb.model.adapters import attach_adapter
from mlx_nb.model.block_attention import block_attention, causal_blocks, fast_swiglu, masked_blocks
from mlx_nb.model.cpu_kernels import kernels, kernels_are_verified
from mlx_nb.model.logprobs import TargetScorer, target_inputs
from mlx_nb.model.powers import power_of_2
from tiny import random_examples, tiny_model

SHAPES = {  # heads, heads of keys, width of queries, width of values
    "shared keys": (6, 2, 16, 16),
    "own keys": (3, 3, 8, 8),
    "one key": (4, 1, 8, 8),
    "narrower values": (4, 4, 24, 16),
}


def drawn(length, shape):
    heads, groups, width, values = SHAPES[shape]
    mx.random.seed(length)
    sizes = [(heads, width), (groups, width), (groups, values), (heads, values)]
    return [mx.random.normal((2, number, length, size)) for number, size in sizes]


def compared(attention, arrays, weight):
    _, gradients = mx.value_and_grad(lambda *qkv: (attention(*qkv) * weight).sum(), argnums=(0, 1, 2))(*arrays)
    return [attention(*arrays), *gradients]


def assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert mx.abs(one - other).max().item() <= 3e-6 * max(1.0, mx.abs(other).max().item())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("length", "size"), [(1, 4), (4, 4), (37, 8), (64, 16), (65, 128)])
def test_attention_in_blocks_is_mlx_own_with_its_gradients(shape, length, size):
    *arrays, weight = drawn(length, shape)

    def fast(queries, keys, values):
        return block_attention(queries, keys, values, scale=0.3, blocks=causal_blocks(length, size))

    def own(queries, keys, values):
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.3, mask="causal")

    assert_close(compared(fast, arrays, weight), compared(own, arrays, weight))


def window(length, width):
    place = np.arange(length)
    return (place[:, None] >= place[None]) & (place[:, None] < place[None] + width)


@pytest.mark.parametrize("mask", [window(40, 7), window(40, 40), window(40, 1), np.ones((40, 40), bool)], ids=len)
@pytest.mark.parametrize("size", [8, 13])
def test_a_mask_of_any_form_is_kept_and_what_it_hides_is_not_computed(mask, size):
    *arrays, weight = drawn(40, "shared keys")
    blocks = masked_blocks(mask, size)
    widest = max(block.pieces[0].last - block.pieces[0].first for block in blocks)
    assert widest == max(np.ptp(np.flatnonzero(mask[at : at + size].any(0))) + 1 for at in range(0, 40, size))

    def fast(queries, keys, values):
        return block_attention(queries, keys, values, scale=0.3, blocks=blocks)

    def own(queries, keys, values):
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.3, mask=mx.array(mask))

    assert_close(compared(fast, arrays, weight), compared(own, arrays, weight))


def test_a_query_that_sees_nothing_is_left_to_mlx():
    assert masked_blocks(np.eye(6, dtype=bool)[:, ::-1] & False, 2) is None


@pytest.mark.long
def test_memory_of_attention_is_that_of_a_block_and_not_of_all_scores():
    length, size = 1024, 64
    *arrays, weight = drawn(length, "shared keys")
    mx.eval(arrays, weight)

    def peak(attention):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(compared(attention, arrays, weight)[1:])
        return mx.get_peak_memory() - before

    blocks = causal_blocks(length, size)
    ours = peak(lambda *qkv: block_attention(*qkv, scale=0.3, blocks=blocks))
    own = peak(lambda *qkv: mx.fast.scaled_dot_product_attention(*qkv, scale=0.3, mask="causal"))
    assert own > 2 * 6 * length * length * 4
    assert ours < 0.4 * own


def test_swiglu_is_mlx_own_with_its_gradients_at_both_ends_too():
    mx.random.seed(0)
    gate = mx.concatenate([mx.random.normal((40,)) * 10, mx.array([0.0, -0.0, 90.0, -90.0, 200.0, -200.0, 1e4, -1e4])])
    x, weight = mx.random.normal(gate.shape), mx.random.normal(gate.shape)

    def with_gradient(function):
        _, gradients = mx.value_and_grad(lambda g, x: (function(g, x) * weight).sum(), argnums=(0, 1))(gate, x)
        return [function(gate, x), *gradients]

    found, expected = with_gradient(fast_swiglu), with_gradient(lambda gate, x: nn.silu(gate) * x)
    for one, other in zip(found, expected):
        np.testing.assert_allclose(np.array(one), np.array(other), rtol=2e-5, atol=1e-6)


# In models


@pytest.fixture
def small_blocks(monkeypatch):
    """Rows of a few tokens are long."""
    monkeypatch.setattr(cpu_kernels, "_BLOCK", 4)
    monkeypatch.setattr(cpu_kernels, "_FEWEST_TOKENS", 5)


def attached(model, **settings):
    attach_adapter(model, RunConfig.from_dict({"model": "tiny", "data": "rows", **settings}))
    mx.random.seed(1)
    names, arrays = zip(*tree_flatten(model.trainable_parameters()))
    moved = [array + 0.05 * mx.random.normal(array.shape) for array in arrays]
    model.load_weights(list(zip(names, moved)), strict=False)
    model.eval()
    return model


def loss_and_gradient(scorer, inputs):
    parameters = scorer.model.trainable_parameters()

    def loss(parameters):
        scorer.model.update(parameters)
        return -(scorer.logprobs(inputs) * inputs.weight_S).sum()

    value, gradient = mx.value_and_grad(loss)(parameters)
    mx.eval(value, gradient)
    scorer.model.update(parameters)
    return value.item(), dict(tree_flatten(gradient))


FAMILIES = ["llama", "gemma3", "glm4", "qwen3_moe", "nemotron_h", "lfm2", "gpt2", "cohere2", "olmo3", "phi3"]


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.matrix(every=7)
def test_loss_and_gradient_of_a_family_stay_what_they_are(family, kind, monkeypatch):
    called = []
    monkeypatch.setattr(cpu_kernels, "block_attention", lambda *a, **k: called.append(1) or block_attention(*a, **k))
    scorer = TargetScorer(attached(small_model(family), fine_tune_type=kind))
    assert scorer._has_kernels
    inputs = target_inputs(pad(random_examples(3, shortest=12)))
    called.clear()
    fast = loss_and_gradient(scorer, inputs)
    assert called
    scorer._has_kernels = False
    called.clear()
    own = loss_and_gradient(scorer, inputs)
    assert not called
    assert fast[0] == pytest.approx(own[0], rel=1e-6)
    largest = max(mx.abs(array).max().item() for array in own[1].values())
    for name, expected in own[1].items():
        most = 1e-4 * max(mx.abs(expected).max().item(), 1e-3 * largest)
        assert mx.abs(fast[1][name] - expected).max().item() <= most, name


NAMES = [(llama, "scaled_dot_product_attention"), (llama, "swiglu")]


def bound():
    return [getattr(module, name) for module, name in NAMES]


OWN = [base.scaled_dot_product_attention, activations.swiglu]


def test_the_names_of_mlx_lm_are_bound_while_inside_and_given_back_whatever_happens():
    model = tiny_model()
    assert bound() == OWN
    with kernels(model):
        assert not set(bound()) & set(OWN)
        with kernels(model):
            pass
        assert not set(bound()) & set(OWN)
        assert base.scaled_dot_product_attention is OWN[0]
        assert switch_layers.swiglu is OWN[1]
    assert bound() == OWN
    with pytest.raises(ZeroDivisionError), kernels(model):
        raise ZeroDivisionError
    assert bound() == OWN


def test_a_scorer_gives_them_back_after_each_call():
    model = tiny_model()
    scorer, inputs = TargetScorer(model), target_inputs(pad(random_examples(2)))
    scorer.logprobs(inputs)
    assert bound() == OWN
    model.model.layers[0].mlp = None
    with pytest.raises(TypeError):
        scorer.logprobs(inputs)
    assert bound() == OWN


def test_the_modules_in_which_they_are_defined_keep_them():
    """A model may have modules of these too."""
    model = small_model("apertus")
    assert any(type(module).__module__ == activations.__name__ for module in model.modules())
    with kernels(model):
        assert [base.scaled_dot_product_attention, activations.swiglu] == OWN
        mx.eval(model(mx.array([[1, 2, 3]])))
    assert [base.scaled_dot_product_attention, activations.swiglu] == OWN


@pytest.mark.usefixtures("small_blocks")
def test_another_thread_and_a_pass_with_a_cache_are_left_to_mlx(monkeypatch):
    model, called = tiny_model(), []
    monkeypatch.setattr(cpu_kernels, "block_attention", lambda *a, **k: called.append(1) or block_attention(*a, **k))
    tokens = mx.array([list(range(1, 30))])
    with kernels(model):
        other = threading.Thread(target=lambda: model(tokens))
        other.start()
        other.join()
        assert not called
        from mlx_lm.models.cache import make_prompt_cache

        model(tokens, cache=make_prompt_cache(model))
        assert not called
        model(tokens)
        assert len(called) == len(model.layers)


@pytest.mark.parametrize("wrong", ["block_attention", "fast_swiglu"])
def test_what_is_not_proved_equal_is_not_used(wrong, monkeypatch):
    right = getattr(cpu_kernels, wrong)
    monkeypatch.setattr(cpu_kernels, wrong, lambda *a, **k: 1.01 * right(*a, **k))
    assert not kernels_are_verified(attached(tiny_model()))
    monkeypatch.setattr(cpu_kernels, wrong, right)
    assert kernels_are_verified(attached(tiny_model()))


def test_the_proof_leaves_weights_and_random_stream_as_they_were():
    model = attached(tiny_model())
    before = {name: np.array(array).tobytes() for name, array in tree_flatten(model.parameters())}
    mx.random.seed(3)
    expected = mx.random.uniform().item()
    mx.random.seed(3)
    assert kernels_are_verified(model)
    assert mx.random.uniform().item() == expected
    assert {name: np.array(array).tobytes() for name, array in tree_flatten(model.parameters())} == before


def test_half_precision_is_left_to_mlx(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "block_attention", lambda *a, **k: pytest.fail("called"))
    monkeypatch.setattr(cpu_kernels, "fast_swiglu", lambda *a, **k: pytest.fail("called"))
    model = tiny_model()
    model.set_dtype(mx.bfloat16)
    mx.eval(TargetScorer(model).logprobs(target_inputs(pad(random_examples(2)))))


def test_powers_of_2_are_mlx_own_to_rounding_and_never_denormal():
    x = mx.concatenate([mx.linspace(-100, 100, 40_001), mx.random.uniform(-2, 2, (10_000,), key=mx.random.key(0))])
    found, expected = np.array(power_of_2(x)).astype(np.float64), 2.0 ** np.array(x).astype(np.float64)
    assert np.abs(found / expected - 1).max() < 3e-7
    far = power_of_2(mx.array([-101.0, -1e30, -float("inf")]))
    assert far.tolist() == [power_of_2(mx.array(-100.0)).item()] * 3
    assert np.isnan(np.array(power_of_2(mx.array(float("nan")))))
    assert power_of_2(mx.array([0.0, 1.0, -3.0])).tolist() == pytest.approx([1, 2, 0.125], rel=2e-7)
