"""On mlx-lm's own batches, without the one padding target it adds to each row, loss and gradients are mlx-lm's."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss, iterate_batches
from mlx_lm.tuner.utils import load_adapters

from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.examples.batches import TokenBatch
from mlx_nb.model import adapters
from mlx_nb.model.logprobs import TargetScorer
from mlx_nb.model.randomness import random_stream
from mlx_nb.objectives.sft import nll, token_objective
from mlx_nb.train.optimizer import build_optimizer
from mlx_nb.train.step import Stepper
from tiny import VOCABULARY, tiny_model

KINDS = ["lora", "dora", "full"]


def attach(model, fine_tune_type, keys=None):
    """Attach as a run does, then give the second matrices values: with zeros half the gradients are zero.

    `full` with the number of all layers, which is what mlx-lm's trains: nothing outside of them.
    """
    settings = {"fine_tune_type": fine_tune_type}
    if fine_tune_type == "full":
        settings["num_layers"] = len(model.layers)
    if fine_tune_type != "full":
        settings["lora_parameters"] = {"rank": 4, "scale": 2.0, "keys": keys}
    config = RunConfig.from_dict(settings)
    with random_stream(1):
        keys = adapters.attach_adapter(model, config)
        weights = adapters.adapter_weights(model)
        drawn = [
            (name, 0.02 * mx.random.normal(array.shape)) for name, array in weights.items() if name.endswith("lora_b")
        ]
    model.load_weights(drawn, strict=False)
    mx.eval(model.parameters())
    return config, keys


def rows_of_tokens(vocabulary, count=8):
    random = np.random.default_rng(0)
    return [
        (random.integers(1, vocabulary, length).tolist(), int(length) // 3) for length in random.integers(6, 40, count)
    ]


def our_batch(batch, lengths):
    """mlx-lm's arrays as ours: token s of a row is a target when offset <= s < length."""
    tokens_BT = np.array(batch)
    columns = np.arange(tokens_BT.shape[1])[None]
    offsets, ends = np.array(lengths)[:, :1], np.array(lengths)[:, 1:]
    loss_mask_BT = ((columns >= np.maximum(offsets, 1)) & (columns < ends)).astype(np.float32)
    return TokenBatch(tokens_BT, loss_mask_BT, tuple(range(len(tokens_BT))), tuple(ends[:, 0].tolist()))


def attach_every_weight(model):
    config = RunConfig.from_dict({"fine_tune_type": "full"})
    adapters.attach_adapter(model, config)
    return config


def assert_parity(model, fine_tune_type, rows, batch_size=4):
    config = attach_every_weight(model) if fine_tune_type == "every weight" else attach(model, fine_tune_type)[0]
    stepper = Stepper(model, build_optimizer(config), token_objective(nll), TargetScorer(model), compiled=False)
    theirs = nn.value_and_grad(model, default_loss)
    compared = 0
    for batch, lengths in iterate_batches(rows, batch_size, max_seq_length=512):
        (loss, tokens), gradients = theirs(model, batch, lengths - mx.array([[0, 1]]))
        ours, our_loss, units, *_ = stepper.gradients([our_batch(batch, lengths)], seed=0)
        assert units == tokens.item()
        assert our_loss == pytest.approx(loss.item(), rel=1e-5)
        their_flat = dict(tree_flatten(gradients))
        norm = max(mx.abs(gradient).max().item() for gradient in their_flat.values())
        for name, gradient in tree_flatten(ours):
            difference = mx.abs(gradient - their_flat[name]).max().item()
            assert difference <= 1e-5 * max(1.0, norm), (name, difference)
            compared += 1
    assert compared > 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fine_tune_type", [*KINDS, "every weight"])
@pytest.mark.matrix(every=3)
def test_loss_and_gradients_equal_mlx_lm(fine_tune_type, tied):
    assert_parity(tiny_model(tied=tied), fine_tune_type, rows_of_tokens(VOCABULARY))


@pytest.mark.real_model
@pytest.mark.parametrize("fine_tune_type", KINDS)
def test_loss_and_gradients_equal_mlx_lm_on_the_real_model(fine_tune_type, smollm2):
    assert_parity(smollm2().model, fine_tune_type, rows_of_tokens(40000, count=2), batch_size=2)


LOADED = [
    ("lora", None),
    ("dora", None),
    ("full", None),
    ("lora", ["q_proj", "mlp.down_proj"]),
    ("dora", ["v_proj"]),
]


@pytest.mark.parametrize(("fine_tune_type", "keys"), LOADED)
def test_mlx_lm_loads_what_we_save(fine_tune_type, keys, tmp_path):
    model = tiny_model()
    config, resolved = attach(model, fine_tune_type, keys)
    changed = [(name, 1.5 * array + 0.01) for name, array in adapters.adapter_weights(model).items()]
    model.load_weights(changed, strict=False)
    adapters.save_adapter(model, adapters.adapter_description(config, resolved), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fine_tune_type"] == fine_tune_type
    theirs = load_adapters(tiny_model(), str(tmp_path))
    theirs.eval()
    model.eval()
    tokens = mx.array([[1, 2, 3, 4, 5]])
    assert mx.allclose(theirs(tokens), model(tokens), atol=1e-6).item()
    assert not mx.allclose(tiny_model()(tokens), model(tokens), atol=1e-3).item()
