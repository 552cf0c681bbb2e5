"""Adapters in PEFT's format come in and go out exactly: its logits are given here, and it reads what is written here.

The folders in goldens/ were written by PEFT (goldens/make_peft_goldens.py). Where PEFT is installed (extra
`peft-check`), it also opens what is written here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_nb
from fixed_llama import TOKENS, VOCABULARY, write_fixed_llama
from mlx_nb import Run, RunConfig
from mlx_nb.errors import CommandError, MlxNbError, ModelError
from mlx_nb.export.peft import alpha_for, write_peft
from mlx_nb.model import adapters
from mlx_nb.model.adapter_files import START, open_adapter, shape_of
from mlx_nb.model.loading import load_skeleton
from mlx_nb.model.randomness import random_stream
from mlx_nb.model.trees import named_arrays
from tiny import tiny_pairs, tiny_rows

GOLDENS = Path(__file__).parent / "goldens"
LOGITS = {name: np.array(values) for name, values in json.loads((GOLDENS / "logits.json").read_text()).items()}
HELD = ["lora", "dora", "rslora", "last-layers", "some-layers", "patterns", "ranks", "embedding-and-head", "embedding"]
ONE_FACTOR = [name for name in HELD if name != "patterns"]
with_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="needs PEFT and torch: pip install mlx-nb[peft-check]"
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The folders of the fixed llama by whether its head shares the embedding's weights."""
    place = tmp_path_factory.mktemp("bases")
    return {tied: write_fixed_llama(place / str(tied), tied=tied) for tied in (True, False)}


def is_tied(folder):
    name = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    return name == "fixed-llama-tied"


def with_adapter(bases, folder, base=None):
    """The base with the adapter in `folder` attached, and the settings of its shape."""
    model = load_skeleton(base or bases[is_tied(folder)])[0]
    adapter = open_adapter(str(folder), START)
    config = shape_of(adapter, model)
    with random_stream(0):
        adapters.attach_adapter(model, config)
    adapters.load_adapter_weights(model, adapter)
    model.eval()
    return model, config


def logits(model):
    return np.array(model(mx.array([TOKENS]))[0])


def tensors(folder):
    return {name: np.array(array) for name, array in mx.load(str(folder / "adapter_model.safetensors")).items()}


# In


@pytest.mark.parametrize("name", HELD)
def test_an_adapter_that_peft_trained_gives_the_logits_of_peft(name, bases):
    folder = GOLDENS / name
    base = load_skeleton(bases[is_tied(folder)])[0]
    model, config = with_adapter(bases, folder)
    assert np.abs(logits(model) - LOGITS[name]).max() < 1e-5
    assert np.abs(logits(base) - LOGITS[f"base-{'tied' if is_tied(folder) else 'untied'}"]).max() < 1e-5
    assert np.abs(logits(base) - LOGITS[name]).max() > 0.1
    assert config.fine_tune_type == ("dora" if name == "dora" else "lora")
    assert config.num_layers == (2 if name == "last-layers" else -1)


def test_padded_ranks_and_layers_without_an_adapter_get_no_gradient(bases):
    """They are zeros in both matrices, so training leaves them zeros and the layers of PEFT stay the only ones."""
    import mlx.nn as nn

    for name in ("some-layers", "patterns"):
        model, _ = with_adapter(bases, GOLDENS / name)

        def loss(parameters, model=model):
            model.update(parameters)
            return model(mx.array([TOKENS])).square().mean()

        gradients = dict(named_arrays(mx.grad(loss)(model.trainable_parameters())))
        padded = 0
        for path, module in adapters.adapter_modules(model):
            a, b = np.array(module["lora_a"]), np.array(module["lora_b"])
            unused = ~(a.any(axis=0) | b.any(axis=1))
            padded += unused.sum()
            assert not np.array(gradients[f"{path}.lora_a"])[:, unused].any()
            assert not np.array(gradients[f"{path}.lora_b"])[unused].any()
        assert padded > 0
        assert isinstance(model, nn.Module)


REFUSED = {
    "refused-tied-embedding": "embed_tokens alone",
    "refused-modules-to-save": "lm_head.weight is saved as a whole weight",
    "refused-embedding-dora": "DoRA of the embedding model.embed_tokens",
    "refused-bias": "`lora_bias: True`",
    "refused-pissa": "`init_lora_weights: 'pissa'`",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_mlx_cannot_hold_is_refused_by_name_in_one_line(name, bases):
    with pytest.raises(ModelError) as caught:
        with_adapter(bases, GOLDENS / name)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"resume_adapter_file: {GOLDENS / name}")
    assert REFUSED[name] in message


CHANGED = {
    "another kind": ({"peft_type": "VERA"}, "`peft_type: VERA`"),
    "bias": ({"bias": "all"}, "`bias: 'all'`"),
    "a key of a later PEFT": ({"use_something_new": True}, "`use_something_new: True`"),
    "experts": ({"target_parameters": ["mlp.experts"]}, "`target_parameters: ['mlp.experts']`"),
    "another rank": ({"r": 2}, "another rank than 2"),
    "a rank of 0": ({"rank_pattern": {"q_proj": 0}}, "another rank than 0"),
    "a pattern that is none": ({"rank_pattern": {"(": 2}}, "the pattern '(' cannot be read"),
    "no number": ({"lora_alpha": "x"}, "`lora_alpha` is 'x'"),
    "a factor of 0": ({"lora_alpha": 0}, "with the factor 0"),
    "DoRA without magnitudes": ({"use_dora": True}, "lacks its part M"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_configuration_that_means_something_else_is_refused_in_one_line(what, tmp_path):
    changes, words = CHANGED[what]
    folder = copied("lora", tmp_path, **changes)
    with pytest.raises(ModelError) as caught:
        open_adapter(str(folder), START)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def copied(name, target, **changes):
    folder = target / name
    folder.mkdir()
    described = json.loads((GOLDENS / name / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**described, **changes}))
    (folder / "adapter_model.safetensors").write_bytes((GOLDENS / name / "adapter_model.safetensors").read_bytes())
    return folder


def renamed(name, target, rename):
    """A copy of an adapter with other names of tensors."""
    folder = copied(name, target)
    arrays = mx.load(str(folder / "adapter_model.safetensors"))
    mx.eval(arrays)
    mx.save_safetensors(
        str(folder / "adapter_model.safetensors"), {rename(name): array for name, array in arrays.items()}
    )
    return folder


NAMES = {
    "another tower": (lambda name: name.replace("model.layers", "vision_model.layers"), "only the language model"),
    "an unknown part": (lambda name: name.replace("lora_A.weight", "lora_E"), "the tensors"),
    "a layer too many": (lambda name: name.replace("layers.2", "layers.7"), "no module to adapt for"),
    "two of one module": (lambda name: name.replace("model.model.layers.1", "model.layers.0"), "are one module here"),
}


@pytest.mark.parametrize("what", NAMES)
def test_tensors_for_something_else_are_refused_in_one_line(what, bases, tmp_path):
    rename, words = NAMES[what]
    with pytest.raises(ModelError) as caught:
        with_adapter(bases, renamed("lora", tmp_path, rename))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pickle_and_weights_without_a_configuration_are_refused(tmp_path):
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"a pickle.*is not read"):
        open_adapter(str(tmp_path / "pickle"), START)
    folder = copied("lora", tmp_path)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match=r"has no adapter_config.json"):
        open_adapter(str(folder), START)


# Out


def written(model, config, folder, **options):
    write_peft(model, config, folder, base_name="base", **options)
    return folder


@pytest.mark.parametrize("name", ONE_FACTOR)
def test_a_round_trip_gives_the_same_tensors_to_the_bit(name, bases, tmp_path):
    folder = written(*with_adapter(bases, GOLDENS / name), tmp_path / "out", use_rslora=name == "rslora")
    theirs, ours = tensors(GOLDENS / name), tensors(folder)
    theirs = {key: array for key, array in theirs.items() if "base_layer" not in key}
    assert theirs.keys() == ours.keys()
    for key, array in theirs.items():
        assert np.array_equal(array, ours[key]), key
    one, other = (open_adapter(str(place), START).peft for place in (GOLDENS / name, folder))
    assert {module.path: (module.rank, module.factor) for module in one.modules} == {
        module.path: (module.rank, module.factor) for module in other.modules
    }


def test_factors_that_differ_are_kept_to_rounding(bases, tmp_path):
    model, config = with_adapter(bases, GOLDENS / "patterns")
    folder = written(model, config, tmp_path / "out")
    ranks = {module.path: module.rank for module in open_adapter(str(folder), START).peft.modules}
    assert ranks == {module.path: module.rank for module in open_adapter(str(GOLDENS / "patterns"), START).peft.modules}
    again, _ = with_adapter(bases, folder, bases[True])
    assert np.array_equal(logits(model), logits(again))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_factor_comes_back_to_the_bit(use_rslora):
    random = np.random.default_rng(0)
    for scale in random.uniform(0.01, 40, 300):
        for rank in (1, 2, 3, 7, 8, 12, 64, 100):
            divisor = rank**0.5 if use_rslora else rank
            alpha = alpha_for(float(scale), divisor)
            assert alpha / divisor == pytest.approx(scale, rel=1e-15)
            assert use_rslora or np.float32(alpha / divisor) == np.float32(scale)
    assert json.dumps(alpha_for(2.0, 8)) == "16"


def tiny_run(tiny_folder, folder, **settings):
    values = {"model": str(tiny_folder), "data": tiny_rows(20), "iters": 3, "learning_rate": 2e-2, "val_set_size": 4}
    return Run(RunConfig.from_dict({**values, "adapter_path": str(folder), **settings}), name="run")


KINDS = {
    "lora": {"lora_parameters": {"rank": 4, "scale": 1.7}},
    "dora": {"fine_tune_type": "dora", "lora_parameters": {"rank": 4, "scale": 1.7}},
    "the last layer": {"num_layers": 1, "lora_parameters": {"rank": 3, "scale": 2.0, "keys": ["q_proj", "up_proj"]}},
    "embedding": {"lora_parameters": {"rank": 3, "scale": 2.0, "keys": ["q_proj", "embed_tokens"]}},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", ["peft", "peft-rslora"])
@pytest.mark.matrix(every=4)
def test_a_run_saves_for_peft_and_continues_from_it(kind, format, tiny_folder, tmp_path):
    run = tiny_run(tiny_folder, tmp_path / "a", **KINDS[kind])
    run.run()
    folder = run.save(tmp_path / "peft", format=format)
    assert sorted(file.name for file in folder.iterdir() if file.is_file()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = mlx_nb.load(folder)
    assert loaded.update == 3
    assert loaded.generate("say red", max_tokens=8) == run.generate("say red", max_tokens=8)
    loss = run.evaluate().loss
    other = tiny_run(tiny_folder, tmp_path / "b", resume_adapter_file=str(folder))
    assert other.evaluate().loss == pytest.approx(loss, abs=0 if format == "peft" else 1e-6)
    if format == "peft":
        assert other.adapter_bytes() == run.adapter_bytes()
    assert other.step().step == 1


@pytest.mark.long
def test_a_peft_adapter_is_the_reference_and_resume_checks_it(tiny_folder, tmp_path):
    run = tiny_run(tiny_folder, tmp_path / "a", **KINDS["lora"])
    run.run()
    folder = run.save(tmp_path / "peft", format="peft")
    settings = {"method": "dpo", "data": tiny_pairs(20), "resume_adapter_file": str(folder)}
    dpo = tiny_run(tiny_folder, tmp_path / "b", **settings)
    assert dpo.step().loss == pytest.approx(np.log(2), abs=1e-5)  # policy and reference are the same
    bare = tiny_run(tiny_folder, tmp_path / "c", **settings, reference_adapter="none")
    assert abs(bare.step().loss - np.log(2)) > 1e-3
    named = tiny_run(tiny_folder, tmp_path / "d", **settings, reference_adapter=str(folder))
    assert named.step().loss == pytest.approx(np.log(2), abs=1e-5)


def test_where_an_adapter_cannot_be_written_for_peft_one_line_says_why(tiny_folder, tmp_path):
    run = tiny_run(tiny_folder, tmp_path / "a", fine_tune_type="full", learning_rate=1e-4)
    run.step()
    with pytest.raises(CommandError, match="a full fine-tune is a model"):
        run.save(tmp_path / "peft", format="peft")
    with pytest.raises(CommandError, match=r"no adapter format is called 'pft'. Did you mean 'peft'\?"):
        run.save(tmp_path / "peft", format="pft")
    with pytest.raises(CommandError, match="Give another folder for `peft`"):
        run.save(format="peft")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "adapter_model.safetensors").write_bytes(b"mine")
    with pytest.raises(MlxNbError, match="was not written by mlx_nb"):
        tiny_run(tiny_folder, tmp_path / "b").save(tmp_path / "mine", format="peft")
    assert (tmp_path / "mine" / "adapter_model.safetensors").read_bytes() == b"mine"


@pytest.mark.long
def test_adapters_of_experts_are_refused_before_anything_is_written_and_those_of_attention_are_held(
    tiny_folder, tmp_path
):
    from families import save_family

    model = save_family("qwen3_moe", tmp_path / "model", tiny_folder)
    run = tiny_run(model, tmp_path / "a", iters=1, steps_per_eval=-1)
    run.step()
    with pytest.raises(CommandError, match=r"switch_mlp\.down_proj.* cannot be written for PEFT"):
        run.save(tmp_path / "peft", format="peft")
    assert not (tmp_path / "peft").exists()
    keys = {"lora_parameters": {"rank": 2, "scale": 2.0, "keys": ["q_proj", "v_proj"]}}
    run = tiny_run(model, tmp_path / "b", iters=1, steps_per_eval=-1, **keys)
    run.step()
    run.save(tmp_path / "peft", format="peft")
    held = mlx_nb.load(tmp_path / "peft", model=str(model))
    tokens = mx.array([[3, 9, 4, 20]])
    assert mx.array_equal(held.model(tokens), run.model(tokens))


# PEFT itself

PROGRAM = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, tokens, *folders = sys.argv[1:]
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        print("LOGITS", json.dumps(model(torch.tensor([json.loads(tokens)])).logits[0].tolist()))
"""


def logits_of_peft(base, tokens, *folders):
    """(T, V) logits of transformers with the adapter of each folder."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, base, json.dumps(list(tokens)), *map(str, folders)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRANSFORMERS_OFFLINE": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [line.removeprefix("LOGITS ") for line in result.stdout.splitlines() if line.startswith("LOGITS ")]
    return [np.array(json.loads(line)) for line in lines]


def randomized(model, size=0.05, **settings):
    """Attach an adapter of these settings with random matrices of about this size."""
    config = RunConfig.from_dict(settings)
    with random_stream(1):
        adapters.attach_adapter(model, config)
        weights = adapters.adapter_weights(model)
        changed = {
            name: array * mx.random.uniform(1 - 2 * size, 1 + 2 * size, array.shape)
            if name.endswith(".m")
            else array + size * mx.random.normal(array.shape)
            for name, array in weights.items()
        }
    model.load_weights(list(changed.items()), strict=False)
    model.eval()
    mx.eval(model.parameters())
    return config


OURS = {
    "lora": {"lora_parameters": {"rank": 4, "scale": 2.0}},
    "dora": {"fine_tune_type": "dora", "lora_parameters": {"rank": 4, "scale": 2.0}},
    "rslora": {"lora_parameters": {"rank": 8, "scale": 0.9}},
    "the last layer": {"num_layers": 1, "lora_parameters": {"rank": 3, "scale": 2.0, "keys": ["q_proj", "up_proj"]}},
    "embedding": {"lora_parameters": {"rank": 3, "scale": 2.0, "keys": ["q_proj", "embed_tokens"]}},
}


@with_peft
@pytest.mark.long
@pytest.mark.parametrize("tied", [True, False])
def test_peft_reads_what_is_written_here(tied, bases, tmp_path):
    expected = {}
    for name, settings in OURS.items():
        model = load_skeleton(bases[tied])[0]
        config = randomized(model, **settings)
        expected[written(model, config, tmp_path / name, use_rslora=name == "rslora")] = logits(model)
    for name in HELD:
        if is_tied(GOLDENS / name) == tied:
            model, config = with_adapter(bases, GOLDENS / name)
            expected[written(model, config, tmp_path / f"again-{name}")] = logits(model)
    for (folder, ours), theirs in zip(expected.items(), logits_of_peft(bases[tied], TOKENS, *expected), strict=True):
        assert np.abs(ours - theirs).max() < 1e-4, folder
        assert ours.shape == (len(TOKENS), VOCABULARY)


@with_peft
@pytest.mark.real_model
def test_peft_reads_adapters_of_smollm2(smollm2, tmp_path):
    loaded = smollm2()
    base = tmp_path / "base"
    base.mkdir()
    described = json.loads((loaded.folder / "config.json").read_text())
    described = {key: value for key, value in described.items() if not key.startswith("quantization")}
    (base / "config.json").write_text(json.dumps({**described, "architectures": ["LlamaForCausalLM"]}))
    weights = dict(named_arrays(loaded.model.parameters()))
    mx.save_safetensors(str(base / "model.safetensors"), weights, metadata={"format": "pt"})
    tokens, expected = (504, 3575, 282, 4649, 314, 7042), {}
    for name in ("lora", "dora", "rslora"):
        model = smollm2().model
        config = randomized(model, 0.01, **OURS[name])
        ours = np.array(model(mx.array([tokens]))[0])
        assert np.abs(ours - np.array(loaded.model(mx.array([tokens]))[0])).max() > 0.1
        expected[written(model, config, tmp_path / name, use_rslora=name == "rslora")] = ours
    for (folder, ours), theirs in zip(expected.items(), logits_of_peft(base, tokens, *expected), strict=True):
        # Logits of up to 29 in float32: the base alone differs by 7e-5, and PEFT's own are 1e-4 from float64.
        assert np.abs(ours - theirs).max() < 1e-5 * np.abs(ours).max(), folder
