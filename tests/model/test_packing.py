"""Lines in one row give the loss and gradient of the same lines alone, and nothing is left behind."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from every_family import TRAINED, small_model
from method_batches import METHODS, batch_for
from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.examples.batches import pad, pad_pairs
from mlx_nb.data.examples.imitation import TokenizedExample
from mlx_nb.data.examples.packing import pack_lines, scored_lines
from mlx_nb.data.examples.preference import PreferenceExample
from mlx_nb.model import cpu_kernels, vocabulary_chunks
from mlx_nb.model.adapters import attach_adapter
from mlx_nb.model.block_attention import block_attention, causal_blocks, masked_blocks
from mlx_nb.model.logprobs import TargetScorer, target_inputs
from mlx_nb.model.packing import mixing_lines, packing_is_verified
from mlx_nb.model.recomputing import Recomputed
from mlx_nb.objectives.build import objective_for
from mlx_nb.train.optimizer import build_optimizer
from mlx_nb.train.step import Stepper
from tiny import VOCABULARY, random_examples, tiny_model

# Learned positions, n-grams that are embedded, loops over the layers' own parts, values kept from layer to layer.
NOT_PACKED = ("afm7", "gpt2", "gpt_bigcode", "iquestloopcoder", "longcat_flash_ngram", "rwkv7")
FEW = ("llama", "gemma3", "qwen3_5", "mamba2", "mixtral", "deepseek_v3", "nemotron_h", "mistral3")


def attached(model, **settings):
    own = {} if settings.get("fine_tune_type") == "full" else {"lora_parameters": {"rank": 2}}
    attach_adapter(model, RunConfig.from_dict({"model": "tiny", "data": "rows", **own, **settings}))
    mx.random.seed(1)
    moved = [(name, a + 0.05 * mx.random.normal(a.shape)) for name, a in tree_flatten(model.trainable_parameters())]
    model.load_weights(moved, strict=False)
    return model.eval()


def answer(random, prompt, row):
    own = random.integers(1, VOCABULARY, int(random.integers(2, 9)))
    mask = np.repeat(np.array([0, 1], np.float32), (len(prompt), len(own)))
    return TokenizedExample(np.concatenate([prompt, own]).astype(np.int32), mask, row)


def pairs(count=2, prompt=11):
    """Pairs of answers of different length to prompts that they share."""
    random, found = np.random.default_rng(count), []
    for row in range(count):
        tokens = random.integers(1, VOCABULARY, prompt + row)
        found.append(PreferenceExample(answer(random, tokens, row), answer(random, tokens, row), len(tokens), row))
    return pad_pairs(found)


def gradients(model, batch, *, lanes=1, compiled=False, checkpoints=False, **settings):
    """Loss, losses of rows and gradient of a batch as it is, and packed."""
    config, found = RunConfig.from_dict(settings), []
    scorer = TargetScorer(model, Recomputed(segment=int(checkpoints)))
    stepper = Stepper(model, build_optimizer(config), objective_for(config), scorer, compiled=compiled, lanes=lanes)
    for packed in (False, True):
        measured = stepper.gradients([batch._replace(packed=packed)], 3)
        found.append((measured.loss, measured.row_losses, dict(tree_flatten(measured.gradients))))
    return found


def assert_same(plain, packed, rel=1e-6):
    # The loss is a mean of the rows' losses, which may cancel: it is as exact as the largest of them.
    assert packed[0] == pytest.approx(plain[0], abs=rel * max(map(abs, plain[1])))
    assert packed[1] == pytest.approx(plain[1], rel=1e-5, abs=1e-6)
    largest = max(mx.abs(array).max().item() for array in plain[2].values())
    assert largest > 0
    for name, expected in plain[2].items():
        assert mx.abs(packed[2][name] - expected).max().item() <= 1e-4 * largest, name


@pytest.mark.parametrize("family", TRAINED)
@pytest.mark.matrix(every=15)
def test_every_family_is_packed_or_found_out_by_the_probe(family):
    assert packing_is_verified(attached(small_model(family))) == (family not in NOT_PACKED)


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("batch", [pad(random_examples(5)), pairs()], ids=["rows", "pairs with a prompt"])
@pytest.mark.matrix(every=6)
def test_a_packed_batch_gives_the_loss_and_gradient_of_its_lines(family, batch):
    method = "sft" if len(batch.rows) == len(batch.lengths) else "cpo"
    assert_same(*gradients(attached(small_model(family), fine_tune_type="full"), batch, method=method))


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize(("method", "settings"), METHODS, ids=lambda value: str(value))
@pytest.mark.parametrize("compiled", [False, True], ids=["as it is", "compiled"])
@pytest.mark.parametrize("checkpoints", [False, True], ids=["layers kept", "computed again"])
@pytest.mark.matrix
def test_it_goes_with_every_method_adapter_lane_chunk_and_checkpoint(
    method, settings, kind, lanes, compiled, checkpoints, monkeypatch
):
    monkeypatch.setattr(vocabulary_chunks, "_CHUNK_BYTES", 4 * VOCABULARY * 5)
    monkeypatch.setattr(vocabulary_chunks, "_FEWEST", 1)
    monkeypatch.setattr("mlx_nb.model.lanes._TOKENS_IN_A_LANE", 8)
    model = attached(tiny_model(), fine_tune_type=kind)
    batch = batch_for(method, model)
    found = gradients(model, batch, lanes=lanes, compiled=compiled, checkpoints=checkpoints, method=method, **settings)
    assert_same(*found)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2", "mamba2", "qwen3_moe"])
@pytest.mark.parametrize("checkpoints", [False, True], ids=["layers kept", "computed again"])
@pytest.mark.parametrize("batch", [pad(random_examples(5)), pairs()], ids=["rows", "pairs with a prompt"])
@pytest.mark.matrix(every=10)
def test_it_goes_with_attention_in_blocks(family, checkpoints, batch, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "_BLOCK", 4)
    monkeypatch.setattr(cpu_kernels, "_FEWEST_TOKENS", 5)
    method = "sft" if len(batch.rows) == len(batch.lengths) else "cpo"
    assert_same(*gradients(attached(small_model(family)), batch, method=method, checkpoints=checkpoints))


@pytest.mark.parametrize("family", FEW)
@pytest.mark.matrix(every=3)
def test_without_it_a_packed_row_would_be_another_one_and_afterwards_nothing_is_left(family):
    model = attached(small_model(family))
    before = [(path, id(module), sorted(vars(module))) for path, module in model.named_modules()]
    plain, packed = (target_inputs(pad(random_examples(4))._replace(packed=packed)) for packed in (False, True))
    scorer = TargetScorer(model)
    own = scorer.logprobs(plain)
    assert mx.allclose(scorer.logprobs(packed), own, atol=1e-4).item()
    unaware = packed._replace(layout=None)
    assert not mx.allclose(scorer.logprobs(unaware), own, atol=1e-2).item()
    with pytest.raises(RuntimeError), mixing_lines(model, packed.layout):
        raise RuntimeError
    assert [(path, id(module), sorted(vars(module))) for path, module in model.named_modules()] == before


@pytest.mark.parametrize("family", ["llama", "qwen3_5", "qwen3_moe"])
def test_what_rows_begin_with_in_common_may_itself_be_trained(family):
    rows = random_examples(3, shortest=14, longest=20)
    beginning = rows[0].tokens[:12]
    for row in rows[1:]:
        row.tokens[: 10 + row.row] = beginning[: 10 + row.row]
    for row in rows:
        row.loss_mask[1:] = 1 + 0.5 * row.row
    batch = pad(rows)
    assert min(pack_lines(scored_lines(batch)).shared[1:]) >= 11
    assert_same(*gradients(attached(small_model(family), fine_tune_type="full"), batch, method="sft"))


def test_a_quantized_base_is_packed():
    model = tiny_model(dims=64)
    nn.quantize(model, group_size=32, bits=4)
    assert_same(*gradients(attached(model), pairs(), method="cpo"))


def test_a_prompt_is_computed_once():
    seen = []

    class Watched(type(tiny_model().layers[0].mlp)):
        def __call__(self, x):
            seen.append(x.shape)
            return super().__call__(x)

    model, batch = tiny_model(), pairs(count=2, prompt=11)
    for layer in model.layers:
        layer.mlp.__class__ = Watched
    scorer = TargetScorer(model)
    assert scorer.can_pack
    seen.clear()
    scorer.logprobs(target_inputs(batch._replace(packed=True)))
    own = sum(len(line) for line in scored_lines(batch)) - 11 - 12
    assert seen == [(1, own, 32)] * 2


def test_what_is_compiled_has_few_shapes_and_no_constants_of_its_own():
    inputs = [target_inputs(pad(random_examples(5, seed))._replace(packed=True), 64, 32) for seed in range(12)]
    assert {one.tokens_BT.shape for one in inputs} <= {(1, 32), (1, 64), (1, 96)}
    assert {one.layout.position_RL.shape for one in inputs} <= {(5, 32), (5, 64)}
    assert {one.layout.needed for one in inputs} == {()}


def test_lines_of_a_row_for_example():
    lines = [np.arange(12), np.array([*range(10), 50]), np.array([*range(10), 50, 51]), np.array([7, 8])]
    packed = pack_lines(lines)
    assert packed.tokens_N.tolist() == [*range(12), 50, 51, 7, 8]
    assert packed.shared == (0, 10, 11, 0)
    assert [packed.tokens_N[at].tolist() for at in packed.positions] == [line.tolist() for line in lines]
    assert packed.positions[2].tolist() == [*range(10), 12, 13]


@pytest.mark.parametrize("needed", [((0, 17), (0, 12), (9, 17)), ((3, 5), (16, 17), (16, 17)), ((0, 4),) * 3])
@pytest.mark.parametrize("mask", ["causal", "window"])
def test_attention_leaves_out_what_no_line_needs_and_changes_nothing_else(needed, mask):
    length, size = 17, 4
    mx.random.seed(0)
    arrays = [mx.random.normal((3, heads, length, 8)) for heads in (4, 2, 2)]
    place = np.arange(length)
    if mask == "causal":
        blocks, all_blocks = causal_blocks(length, size, needed), causal_blocks(length, size)
    else:
        window = (place[:, None] >= place) & (place[:, None] < place + 6)
        blocks, all_blocks = masked_blocks(window, size, needed), masked_blocks(window, size)
    wanted = mx.array(np.array([[[[first <= query < end] for query in place]] for first, end in needed], np.float32))
    for start in range(0, length, size):
        lines = range(3)[blocks[start // size].lines]
        assert set(lines) >= {n for n, (first, end) in enumerate(needed) if first < start + size and start < end}

    def total(blocks):
        return mx.value_and_grad(
            lambda q, k, v: mx.square(block_attention(q, k, v, scale=0.3, blocks=blocks) * wanted).sum(), (0, 1, 2)
        )(*arrays)

    (value, slopes), (expected, own) = total(blocks), total(all_blocks)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(slopes, own):
        assert mx.allclose(one, other, atol=1e-5).item()


@pytest.mark.real_model
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_real_model_packs_rows_and_pairs(method, smollm2):
    model = attached(smollm2().model)
    random = np.random.default_rng(0)
    prompt = random.integers(1, 40_000, 150)
    if method == "dpo":
        batch = pad_pairs([PreferenceExample(answer(random, prompt, 0), answer(random, prompt, 0), 150, 0)])
        batch = batch._replace(token_values={"reference": np.full(batch.tokens_BT.shape, -6, np.float32)})
    else:
        batch = pad([answer(random, random.integers(1, 40_000, length), length) for length in (40, 150, 90)])
    # The loss of a pair is of a difference between sums of log-probabilities, which are far larger.
    assert_same(*gradients(model, batch, method=method, lanes=2), rel=1e-6 if method == "sft" else 5e-6)
