"""What is trained is said and is what is trained: `full` is every weight, or those of the last layers."""

from __future__ import annotations

import json
import math

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_nb import Run, RunConfig
from mlx_nb.errors import MlxNbError, ModelError
from mlx_nb.model import adapters
from mlx_nb.model.trained import trained_summary
from mlx_nb.view.event_text import describe, summary_text
from mlx_nb.view.panel.state import head_of
from tiny import tiny_model, tiny_pairs, tiny_rows
from trainers import make_trainer


def run_of(folder, tiny_folder, **settings):
    base = {
        "model": str(tiny_folder),
        "data": tiny_pairs(20) if settings.get("method") == "dpo" else tiny_rows(20),
        "iters": 4,
        "learning_rate": 1e-2,
        "steps_per_eval": -1,
        "adapter_path": str(folder),
    }
    return Run(RunConfig.from_dict({**base, **settings}))


def parameters(model):
    return {name: np.array(array) for name, array in tree_flatten(model.parameters())}


def changed(before, after):
    return {name for name in before if not np.array_equal(before[name], after[name])}


OUTSIDE = ["model.embed_tokens.weight", "model.norm.weight"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_layers", [-1, 2, 1])
@pytest.mark.matrix(every=3)
def test_full_trains_every_weight_or_the_last_layers(tied, num_layers, tmp_path):
    model = tiny_model(tied=tied)
    before = parameters(model)
    trainer = make_trainer(
        tmp_path, model=model, fine_tune_type="full", lora_parameters={}, num_layers=num_layers, learning_rate=1e-2
    )
    list(trainer.events(3))
    outside = OUTSIDE if tied else [*OUTSIDE, "lm_head.weight"]
    expected = {
        -1: set(before),
        2: set(before) - set(outside),
        1: {name for name in before if name.startswith("model.layers.1.")},
    }[num_layers]
    assert changed(before, parameters(model)) == expected
    assert set(adapters.adapter_weights(model)) == expected


@pytest.mark.parametrize("num_layers", [2, 1])
def test_full_of_layers_trains_what_mlx_lm_trains(num_layers):
    theirs, ours = tiny_model(tied=False), tiny_model(tied=False)
    theirs.freeze()  # as mlx_lm.lora: train_model
    for layer in theirs.layers[-num_layers:]:
        layer.unfreeze()
    adapters.attach_adapter(ours, RunConfig.from_dict({"fine_tune_type": "full", "num_layers": num_layers}))
    trained = [{name for name, _ in tree_flatten(model.trainable_parameters())} for model in (theirs, ours)]
    assert trained[0] == trained[1]


WORDS = {
    "everything": ({"fine_tune_type": "full"}, "all weights; none are frozen"),
    "layers": (
        {"fine_tune_type": "full", "num_layers": 2},
        "the weights of all 2 layers; frozen: embed_tokens, norm, lm_head",
    ),
    "the last layer": (
        {"fine_tune_type": "full", "num_layers": 1},
        "the weights of the last of 2 layers; frozen: embed_tokens, norm, lm_head, the first layer",
    ),
    "lora": ({}, "LoRA of rank 8, scale 20, on every linear module of all 2 layers; the base is frozen"),
    "dora": (
        {"fine_tune_type": "dora", "num_layers": 1, "lora_parameters": {"rank": 3, "scale": 1.5, "keys": ["v_proj"]}},
        "DoRA of rank 3, scale 1.5, on v_proj of the last of 2 layers; the base is frozen",
    ),
}


@pytest.mark.parametrize("case", WORDS)
def test_what_is_trained_and_frozen_is_explained(case):
    settings, words = WORDS[case]
    model, config = tiny_model(tied=False), RunConfig.from_dict(settings)
    assert trained_summary(model, config, adapters.attach_adapter(model, config)) == words


@pytest.mark.long
def test_panel_summary_and_log_say_what_is_trained(tiny_folder, tmp_path):
    run = run_of(tmp_path, tiny_folder, fine_tune_type="full", num_layers=1)
    run.run()
    words = "the weights of the last of 2 layers; frozen: embed_tokens, norm, the first layer"
    started = run.history.started
    assert started.trained == words
    assert words in describe(started)
    assert words in head_of(run, "CPU")["facts"]
    assert words in summary_text(run.history, "x")
    assert words in run.report(tmp_path / "report.html").read_text()


@pytest.mark.parametrize("num_layers", [-1, 1])
@pytest.mark.matrix(every=2)
def test_a_full_fine_tune_is_saved_resumed_forked_and_loaded_whole(num_layers, tiny_folder, tmp_path):
    settings = {"fine_tune_type": "full", "num_layers": num_layers}
    run = run_of(tmp_path / "a", tiny_folder, **settings)
    run.step(2)
    run.checkpoint("pause")
    fork = run.fork(adapter_path=str(tmp_path / "fork"))
    run.run()
    resumed = Run.resume(tmp_path / "a", data=tiny_rows(20), step=2)
    for other in (fork, resumed):
        other.run()
        assert other.adapter_bytes() == run.adapter_bytes()
    theirs, _ = mlx_lm.load(str(tiny_folder), adapter_path=str(tmp_path / "a"))
    tokens = mx.array([[5, 80, 17, 60]])
    np.testing.assert_allclose(np.array(theirs(tokens)), np.array(run.model(tokens)), atol=1e-5)
    saved = mx.load(str(tmp_path / "a" / "adapters.safetensors"))
    assert ("model.embed_tokens.weight" in saved) == (num_layers == -1)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["num_layers"] == num_layers


def test_the_reference_of_a_full_fine_tune_keeps_every_starting_weight(tiny_folder, tmp_path):
    run = run_of(tmp_path / "a", tiny_folder, method="dpo", fine_tune_type="full")
    start = parameters(run.model)
    assert run.step().loss == pytest.approx(math.log(2), abs=1e-5)
    run.step(2)
    reference = run.inputs.reference._scorer.model
    assert not changed(start, parameters(reference))
    assert "model.embed_tokens.weight" in changed(start, parameters(run.model))


def test_another_run_on_the_same_base_does_not_see_a_full_fine_tune(tiny_folder, tmp_path):
    first = run_of(tmp_path / "a", tiny_folder)
    before = parameters(first.model)
    full = run_of(tmp_path / "b", tiny_folder, fine_tune_type="full")
    full.step(2)
    assert not changed(before, parameters(first.model))
    assert not changed(before, parameters(run_of(tmp_path / "c", tiny_folder).model))


def test_full_is_refused_where_any_trained_weight_is_quantized(tiny_folder, tmp_path):
    model = tiny_model()
    nn.quantize(model, group_size=32, bits=4, class_predicate=lambda _, module: isinstance(module, nn.Embedding))
    with pytest.raises(ModelError, match="quantized"):
        adapters.attach_adapter(model, RunConfig.from_dict({"fine_tune_type": "full"}))
    model = tiny_model()
    nn.quantize(model, group_size=32, bits=4, class_predicate=lambda _, module: isinstance(module, nn.Linear))
    for layers in (-1, 1):
        with pytest.raises(ModelError, match="quantized"):
            adapters.attach_adapter(model, RunConfig.from_dict({"fine_tune_type": "full", "num_layers": layers}))
    with pytest.raises(MlxNbError, match="quantized"):
        run_of(tmp_path, tiny_folder, fine_tune_type="full", load_in_bits=4).step()


def test_whole_numbers_among_the_parameters_stay_frozen():
    model = tiny_model()
    model.model.norm.table = mx.arange(4)
    adapters.attach_adapter(model, RunConfig.from_dict({"fine_tune_type": "full"}))
    trained = dict(tree_flatten(model.trainable_parameters()))
    assert "model.norm.weight" in trained
    assert "model.norm.table" not in trained


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"optimizer": "muon", "fine_tune_type": "full"}, "embed_tokens"),
        ({"optimizer": "muon", "fine_tune_type": "full", "num_layers": 2}, None),
        ({"optimizer": "muon", "fine_tune_type": "full", "num_layers": 1}, None),
        ({"optimizer": "muon"}, None),
        ({"fine_tune_type": "full"}, None),
    ],
)
def test_a_note_says_when_muon_orthogonalizes_what_its_author_gives_to_another(settings, named, tiny_folder, tmp_path):
    config = RunConfig(
        model=str(tiny_folder), data=tiny_rows(), iters=1, val_set_size=0, adapter_path=str(tmp_path / "a"), **settings
    )
    notes = [note for note in Run(config).trainer.notes if note.startswith("muon also orthogonalizes")]
    expected = (
        f"muon also orthogonalizes {named}, as in mlx-lm. Its author uses AdamW for embeddings and the output head: "
        "see `num_layers`, or use another optimizer."
    )
    assert notes == ([] if named is None else [expected])
