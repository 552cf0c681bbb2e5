"""A GGUF file has the trained model in llama.cpp's layout: tensors are read back, and llama.cpp computes the same."""

from __future__ import annotations

import gguf
import mlx.core as mx
import numpy as np
import pytest

from exported_families import MODELS, family_run, save_sentencepiece_tokenizer, save_tokenizer
from mlx_nb.errors import CommandError, FolderError, ModelError
from mlx_nb.export import gguf as gguf_module
from mlx_nb.export import gguf_tensors
from mlx_nb.export.gguf import TYPES, lm_studio_folder
from mlx_nb.export.gguf_families import Unwritable
from mlx_nb.export.gguf_tokenizer import tokenizer_metadata
from mlx_nb.model.gguf.convert import half_by_half, write_model
from mlx_nb.model.gguf.tokenizer import build_tokenizer
from mlx_nb.model.loading import load_model, load_tokenizer
from runs import rows_run
from tiny import tiny_rows

READABLE = (
    "llama",
    "llama, sentencepiece",
    "llama, own head and llama3 rope",
    "llama, linear rope",
    "qwen2",
    "qwen3",
    "gemma3",
)


def logits_of(model, tokens):
    return np.array(model(mx.array([tokens]))[0].astype(mx.float32))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.matrix(every=5)
def test_every_tensor_is_read_back_and_our_own_reader_computes_the_same(name, tmp_path, no_llama_cpp):
    run = family_run(tmp_path, name)
    written = run.gguf(tmp_path / "out", type="f32")
    names = [tensor.name for tensor in gguf.GGUFReader(str(written.path)).tensors if tensor.name != "rope_freqs.weight"]
    assert written.tensors == len(names) == len(set(names))
    assert written.checked is None
    assert "Not checked" in str(written)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".mlx_nb", "Modelfile", "tiny-f32.gguf"]
    if name in READABLE:
        again = load_model(str(write_model(written.path, tmp_path / "again")))
        tokens = run.tokenizer.encode("say red 3 again")
        assert again.tokenizer.encode("say red 3 again") == tokens
        trained, base = logits_of(run.model, tokens), logits_of(run.inputs.base_model, tokens)
        assert np.abs(trained - logits_of(again.model, tokens)).max() < 1e-3
        assert np.abs(trained - base).max() > 0.05


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_the_real_llama_cpp_computes_the_same(name, tmp_path, real_llama_cpp):
    run = family_run(tmp_path, name)
    written = run.gguf(tmp_path / "out", type="f32")
    assert written.checked.kl < 1e-4
    assert written.checked.agreement > 0.95  # of two equally likely tokens either may come first
    assert written.checked.positions > 30
    adapter = run.gguf(tmp_path / "adapter", adapter=True)
    assert adapter.checked.kl < 1e-3
    assert "Checked by llama.cpp" in str(adapter)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [".mlx_nb", "Modelfile", "tiny-lora.gguf"]


@pytest.mark.long
def test_llama_cpp_refuses_a_wrong_layout_and_nothing_is_kept(tmp_path, real_llama_cpp, monkeypatch):
    run = family_run(tmp_path, "llama")
    monkeypatch.setattr(gguf_tensors, "pair_by_pair", lambda rows, _heads: rows)
    monkeypatch.setattr(gguf_tensors, "half_by_half", lambda rows, _heads: rows)  # so that reading back agrees
    with pytest.raises(ModelError, match=r"llama\.cpp does not compute what mlx computes: KL divergence"):
        run.gguf(tmp_path / "out", type="f32")
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["q8_0", "q4_k_m"])
def test_smaller_types_are_checked_by_llama_cpp_too(kind, tmp_path, real_llama_cpp):
    run = family_run(tmp_path, "qwen2", load_in_bits=8)
    written = run.gguf(tmp_path / "out", type=kind)
    assert written.path.name == f"tiny-{kind}.gguf"
    assert written.checked.kl < 1
    assert [path.name for path in sorted((tmp_path / "out").glob("*.gguf"))] == [written.path.name]


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_types_round_no_more_than_they_must(kind, tmp_path, no_llama_cpp):
    run = family_run(tmp_path, "llama")
    written = run.gguf(tmp_path / "out", type=kind)
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(str(written.path)).tensors}
    assert kinds == {kind.upper(), "F32"}  # vectors stay in float32
    again = load_model(str(write_model(written.path, tmp_path / "again")))
    tokens = run.tokenizer.encode("say red 3")
    error = np.abs(logits_of(run.model, tokens) - logits_of(again.model, tokens)).max()
    assert error < {"f16": 0.02, "bf16": 0.2, "q8_0": 0.2}[kind]


@pytest.mark.parametrize("fault", ["value", "missing"])
def test_a_file_that_does_not_hold_the_model_is_named(fault, tmp_path, no_llama_cpp, monkeypatch):
    run = family_run(tmp_path, "qwen3")
    layout, _, _ = gguf_module._described(gguf_inputs(run))
    tensors = list(gguf_tensors.trained_tensors(run.model, layout))
    path = run.gguf(tmp_path / "out").path
    if fault == "missing":
        with pytest.raises(ModelError, match=r"does not have the weights of the model: blk\.0\.attn_k\.weight"):
            gguf_tensors.prove(path, [one for one in tensors if one.name != "blk.0.attn_k.weight"], layout, set())
        return
    reader = gguf.GGUFReader(str(path), "r+")
    (one,) = [tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_up.weight"]
    one.data[3, 4] += 0.01
    reader.data.flush()
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight does not hold the values of .*mlp\.up_proj"):
        gguf_tensors.prove(path, tensors, layout, set())


def gguf_inputs(run):
    from mlx_nb.run.model_exports import inputs_of_run

    return inputs_of_run(run)


def test_an_adapter_alone_has_its_matrices_and_scale(tmp_path, no_llama_cpp):
    run = family_run(tmp_path, "llama", lora_parameters={"rank": 3, "scale": 5.0, "keys": ["q_proj", "up_proj"]})
    written = run.gguf(tmp_path / "out", adapter=True)
    reader = gguf.GGUFReader(str(written.path))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"], fields["adapter.lora.alpha"]) == ("adapter", "lora", 15.0)
    shapes = {tensor.name: tuple(tensor.data.shape) for tensor in reader.tensors}
    assert shapes["blk.1.attn_q.weight.lora_a"] == (3, 64)
    assert shapes["blk.1.attn_q.weight.lora_b"] == (64, 3)
    assert len(shapes) == written.tensors == 8
    assert "ADAPTER ./tiny-lora.gguf" in written.modelfile.read_text()


def test_modules_with_other_scales_keep_them(tmp_path, no_llama_cpp):
    run = family_run(tmp_path, "llama")
    module = run.model.layers[1].self_attn.q_proj
    module.scale *= 3
    written = run.gguf(tmp_path / "out", adapter=True)
    there = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(str(written.path)).tensors}
    name = "blk.1.attn_q.weight"
    alpha, rank = run.config.lora_parameters.scale * run.config.lora_parameters.rank, module.lora_a.shape[1]
    change = alpha / rank * half_by_half(there[f"{name}.lora_b"], 4) @ there[f"{name}.lora_a"]
    assert np.allclose(change, module.scale * np.array(module.lora_a @ module.lora_b).T, atol=1e-5)


def test_what_cannot_be_written_is_refused_by_name(tmp_path, no_llama_cpp):
    refusals = {
        "dora": ({"fine_tune_type": "dora"}, "not dora"),
        "embedding": ({"lora_parameters": {"rank": 2, "keys": ["embed_tokens"]}}, "of the kind LoRAEmbedding"),
    }
    for name, (settings, reason) in refusals.items():
        run = family_run(tmp_path / name, "qwen3", **settings)
        with pytest.raises(ModelError, match=reason):
            run.gguf(tmp_path / "out", adapter=True)
        assert run.gguf(tmp_path / name / "whole").tensors > 10
    for arguments, reason in {
        ("q4_k_m",): "made by llama.cpp, which is not installed",
        ("q4_1x",): "Did you mean 'q4_0'|Known: f16",
    }.items():
        with pytest.raises(CommandError, match=reason):
            run.gguf(tmp_path / "out", type=arguments[0])
    with pytest.raises(CommandError, match=r"name the folder, such as .*bees"):
        run.gguf(tmp_path / "bees.gguf")
    with pytest.raises(CommandError, match="give a folder"):
        run.gguf()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("mine")
    with pytest.raises(FolderError, match=r"a\.txt was not written by mlx_nb"):
        run.gguf(tmp_path / "mine")
    assert not (tmp_path / "out").exists()
    assert set(TYPES) >= {"f16", "q8_0", "q4_k_m"}


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("mamba", "'mamba' is not among the families that can be written: llama, mistral"),
        ("llama", r"llama\.cpp has no llama with sliding windows"),
    ],
)
def test_a_family_or_setting_that_llama_cpp_lacks_is_named(family, reason, tmp_path, tiny_folder, no_llama_cpp):
    from families import save_family

    run = rows_run(tmp_path, save_family(family, tmp_path / "model", tiny_folder), iters=1, save_every=-1)
    run.run()
    with pytest.raises(ModelError, match=reason):
        run.gguf(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_for_lm_studio_is_in_its_folder(tmp_path, no_llama_cpp, monkeypatch):
    monkeypatch.setenv("LM_STUDIO_HOME", str(tmp_path / "studio"))
    run = family_run(tmp_path, "qwen2")
    written = run.gguf(lm_studio_name="bees")
    assert written.path == tmp_path / "studio" / "models" / "mlx_nb" / "bees" / "tiny-f16.gguf"
    assert lm_studio_folder("me/bees") == tmp_path / "studio" / "models" / "me" / "bees"


@pytest.mark.parametrize("pre", ["qwen2", "gpt-2"])
def test_the_way_a_tokenizer_splits_text_is_recognized(pre, tmp_path):
    from mlx_nb.model.gguf.tokenizer import QWEN2_WORDS

    size = save_tokenizer(tmp_path, QWEN2_WORDS if pre == "qwen2" else None)
    tokenizer = load_tokenizer(tmp_path)
    metadata = tokenizer_metadata(tokenizer, size + 3)
    assert metadata["tokenizer.ggml.pre"] == pre
    assert metadata["tokenizer.ggml.tokens"][-3:] == [f"[PAD{size + extra}]" for extra in range(3)]
    assert metadata["tokenizer.ggml.token_type"][:5] == [3, 3, 3, 3, 1]
    again = build_tokenizer(metadata)
    for text in ("say red 12", "Über don't\n\n  x", "<|user|>hi<|end|>"):
        assert again.encode(text) == tokenizer.encode(text)
    save_tokenizer(tmp_path, r"\w+|\s")
    unknown = load_tokenizer(tmp_path)
    with pytest.raises(Unwritable, match=r"regular expression that llama\.cpp does not have"):
        tokenizer_metadata(unknown, size)


def test_a_sentencepiece_tokenizer_keeps_its_merges(tmp_path):
    size = save_sentencepiece_tokenizer(tmp_path)
    original = load_tokenizer(tmp_path)
    metadata = tokenizer_metadata(original, size)
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] is True
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    again = build_tokenizer(metadata)
    for text in ("the hat", "  the 12 é", "theta<end_of_turn>", "cache the"):
        assert again.encode(text) == original.encode(text)


def test_the_command_writes_a_file_and_says_how_to_run_it(shell, tiny_folder, tmp_path, no_llama_cpp):
    shell.user_ns["rows"] = tiny_rows()
    shell.run_cell_magic("finetune", "--wait --name bees", f"model: {tiny_folder}\ndata: rows\niters: 1")
    reported = str(shell.run_line_magic("finetune", "gguf out --type q8_0"))
    assert "all 20 tensors were read back" in reported
    assert "ollama create bees-q8_0 -f out/Modelfile && ollama run bees-q8_0" in reported
    assert "lms import --user-repo mlx_nb/bees-q8_0 -y -c out/bees-q8_0.gguf" in reported
    assert "FROM ./bees-q8_0.gguf" in (tmp_path / "out" / "Modelfile").read_text()
    reported = str(shell.run_line_magic("finetune", "gguf out --adapter"))  # an earlier export is replaced
    assert "llama-cli -m BASE.gguf --lora out/bees-lora.gguf" in reported
    assert [path.name for path in (tmp_path / "out").glob("*.gguf")] == ["bees-lora.gguf"]


def test_an_interrupt_leaves_the_earlier_file(tmp_path, no_llama_cpp, monkeypatch):
    run = family_run(tmp_path, "qwen2")
    before = run.gguf(tmp_path / "out").path.read_bytes()

    def interrupted(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_module, "prove", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.gguf(tmp_path / "out", type="q8_0")
    assert (tmp_path / "out" / "tiny-f16.gguf").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "run"]
