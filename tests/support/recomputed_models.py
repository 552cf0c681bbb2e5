"""Loss, gradient and memory of small models, of which something is computed again for the gradient."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from mlx_nb.config.run_config import RunConfig
from mlx_nb.model.adapters import attach_adapter
from mlx_nb.model.logprobs import TargetScorer
from mlx_nb.model.recomputing import Recomputed
from mlx_nb.objectives.build import objective_for
from mlx_nb.train.optimizer import build_optimizer
from mlx_nb.train.step import Stepper
from tiny import tiny_model

ONE_LAYER = Recomputed(segment=1)


def attached(model, **settings):
    own = {} if settings.get("fine_tune_type") == "full" else {"lora_parameters": {"rank": 2}}
    config = RunConfig.from_dict({"model": "tiny", "data": "rows", **own, **settings})
    attach_adapter(model, config)
    mx.random.seed(1)
    names, arrays = zip(*tree_flatten(model.trainable_parameters()))
    moved = [array + 0.05 * mx.random.normal(array.shape) for array in arrays]
    model.load_weights(list(zip(names, moved)), strict=False)
    return model


def gradients(model, batch, *, lanes=1, seed=3, compiled=False, recomputed=ONE_LAYER, **settings):
    """Loss and gradient of a batch, with the layers kept and with them computed again."""
    config, found = RunConfig.from_dict(settings), []
    for what in (Recomputed(), recomputed):
        scorer = TargetScorer(model, what)
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


def state_of(model):
    names = [name for name, _ in tree_flatten(model.parameters())]
    return names, [(path, id(module), sorted(vars(module))) for path, module in model.named_modules()]


def deep_model(layers):
    arguments = dataclasses.replace(
        tiny_model().args, num_hidden_layers=layers, layer_types=None, intermediate_size=256
    )
    mx.random.seed(0)
    return llama.Model(arguments)


def peak(model, batch, recomputed):
    scorer, config = TargetScorer(model, recomputed), RunConfig()
    stepper = Stepper(model, build_optimizer(config), objective_for(config), scorer, compiled=False)
    for _ in range(2):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        found = stepper.gradients([batch], 0)
        mx.eval(found.gradients)
        del found
    return mx.get_peak_memory() - before
