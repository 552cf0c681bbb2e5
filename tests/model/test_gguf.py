"""A GGUF file converted and opened by mlx-lm computes what its weights compute, and reads text as before."""

from __future__ import annotations

import importlib
import json
import threading

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from gguf_files import (
    FEED_FORWARD,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    PRE,
    Q,
    byte_level_metadata,
    float_weights,
    model_settings,
    sentencepiece_metadata,
    synthetic,
    tokenizer_metadata,
    write_gguf,
)
from mlx_nb.errors import ModelError
from mlx_nb.model.gguf.convert import convert_gguf
from mlx_nb.model.gguf.tokenizer import build_tokenizer, end_of_turn_ids


def reference_model(architecture: str, reference: dict, vocabulary: int, **settings):
    """mlx-lm's own model, given the float weights directly; `settings` are more of its arguments."""
    model_type = "gemma3_text" if architecture == "gemma3" else architecture
    module = importlib.import_module(f"mlx_lm.models.{model_type}")
    arguments = {
        "model_type": model_type,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS[architecture],
        "intermediate_size": FEED_FORWARD,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-6,
        "vocab_size": vocabulary,
        "rope_theta": 20000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": "lm_head.weight" not in reference,
    }
    if architecture == "gemma3":
        arguments |= {"query_pre_attn_scalar": HEAD_DIM, "sliding_window": 4, "sliding_window_pattern": 6}
    model = module.Model(module.ModelArgs.from_dict(arguments | settings))
    weights = {name: mx.array(values) for name, values in reference.items()}
    model.load_weights(list(model.sanitize(weights).items()))
    return model


def logits_in_float32(model, tokens) -> np.ndarray:
    model.apply(lambda array: array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array)
    return np.array(model(mx.array([tokens])))


CASES = [
    *[(architecture, Q.Q4_0) for architecture in PRE],
    ("llama", Q.Q4_1),
    ("gemma3", Q.Q4_1),
    ("llama", Q.Q8_0),
    ("qwen2", Q.Q8_0),
    ("qwen2", Q.Q5_0),
    ("llama", Q.Q6_K),
    ("qwen3", Q.Q4_K),
    ("qwen2", Q.F16),
    ("gemma3", Q.BF16),
    ("llama", Q.F32),
]


@pytest.mark.parametrize(("architecture", "kind"), CASES, ids=lambda value: getattr(value, "name", value))
@pytest.mark.matrix(every=7)
def test_a_converted_file_computes_the_logits_of_its_dequantized_weights(tmp_path, architecture, kind):
    reference, vocabulary = synthetic(tmp_path / "model.gguf", architecture, kind)
    folder = convert_gguf(tmp_path / "model.gguf", tmp_path / "out")
    model, _ = mlx_lm.load(str(folder))
    weights = float_weights(model)
    assert weights.keys() == reference.keys()
    half = 2.0**-8 if architecture == "gemma3" else 2.0**-10
    for name, values in reference.items():
        # A Q4_1 weight is minimum + 15 steps at most: of opposite signs, each rounded to the stored type on its own.
        atol = 4 * half * np.abs(values).max() if kind is Q.Q4_1 else 1e-5
        np.testing.assert_allclose(weights[name], values, rtol=half, atol=atol, err_msg=name)
    tokens = [5, 80, 17, 200, 3, 44, 91, 120]
    ours = logits_in_float32(model, tokens)
    # The reference is given the very weights, rounded as stored: what is left is the arithmetic.
    same = reference_model(architecture, weights, vocabulary)
    np.testing.assert_allclose(ours, np.array(same(mx.array([tokens]))), atol=2e-3 * np.abs(ours).max())
    theirs = np.array(reference_model(architecture, reference, vocabulary)(mx.array([tokens])))
    assert np.linalg.norm(ours - theirs) < (0.02 if architecture == "gemma3" else 0.003) * np.linalg.norm(theirs)


def assert_same_logits(path, reference, vocabulary, architecture, **settings):
    """The converted file computes what mlx-lm's model computes from the reference weights; all are float32."""
    tokens = [5, 80, 17, 200, 3, 44, 91, 120]
    model, _ = mlx_lm.load(str(convert_gguf(path, path.with_suffix(""))))
    theirs = np.array(reference_model(architecture, reference, vocabulary, **settings)(mx.array([tokens])))
    np.testing.assert_allclose(np.array(model(mx.array([tokens]))), theirs, atol=2e-3 * np.abs(theirs).max())
    return theirs


@pytest.mark.parametrize("architecture", [name for name in PRE if name != "gemma3"])  # which has none
def test_an_output_matrix_of_its_own_makes_the_logits(tmp_path, architecture):
    reference, vocabulary = synthetic(tmp_path / "model.gguf", architecture, Q.F32, untied=True)
    own = assert_same_logits(tmp_path / "model.gguf", reference, vocabulary, architecture)
    del reference["lm_head.weight"]
    tied = np.array(reference_model(architecture, reference, vocabulary)(mx.array([[5, 80]])))
    assert np.abs(own[:, :2] - tied).max() > 0.1


def test_biases_of_a_llama_are_turned_back_like_its_rows(tmp_path):
    reference, vocabulary = synthetic(tmp_path / "model.gguf", "llama", Q.F32, biases=True)
    settings = {"attention_bias": True, "mlp_bias": True}
    assert_same_logits(tmp_path / "model.gguf", reference, vocabulary, "llama", **settings)


@pytest.mark.parametrize("architecture", PRE)
def test_linear_rope_scaling_reaches_the_logits(tmp_path, architecture):
    keys = {f"{architecture}.rope.scaling.type": "linear", f"{architecture}.rope.scaling.factor": 8.0}
    reference, vocabulary = synthetic(tmp_path / "model.gguf", architecture, Q.F32, settings=keys)
    scaling = {"type": "linear", "factor": 8.0}
    scaled = assert_same_logits(tmp_path / "model.gguf", reference, vocabulary, architecture, rope_scaling=scaling)
    plain = np.array(reference_model(architecture, reference, vocabulary)(mx.array([[5, 80, 17, 200, 3, 44, 91, 120]])))
    assert np.abs(scaled - plain).max() > 0.01


@pytest.mark.parametrize("kind", [Q.Q4_0, Q.Q4_1, Q.Q8_0], ids=lambda kind: kind.name)
def test_repacked_blocks_keep_every_value_to_the_bit(tmp_path, kind):
    reference, _ = synthetic(tmp_path / "model.gguf", "llama", kind)
    model, _ = mlx_lm.load(str(convert_gguf(tmp_path / "model.gguf", tmp_path / "out")))
    weights = float_weights(model)
    for name in reference:
        if not name.endswith("norm.weight"):
            np.testing.assert_array_equal(weights[name], reference[name], err_msg=name)


def test_matrices_of_different_bits_are_each_loaded_with_their_own(tmp_path):
    synthetic(tmp_path / "model.gguf", "llama", Q.Q4_1, embedding=Q.Q8_0, untied=True)
    folder = convert_gguf(tmp_path / "model.gguf", tmp_path / "out")
    quantization = json.loads((folder / "config.json").read_text())["quantization"]
    assert quantization["bits"] == 4
    assert quantization["model.embed_tokens"]["bits"] == 8
    model, _ = mlx_lm.load(str(folder))
    assert (model.model.embed_tokens.bits, model.lm_head.bits, model.layers[0].mlp.up_proj.bits) == (8, 4, 4)


def test_a_matrix_that_is_not_packed_stays_float_beside_packed_ones(tmp_path):
    synthetic(tmp_path / "model.gguf", "qwen3", Q.Q4_0, embedding=Q.Q6_K)
    model, _ = mlx_lm.load(str(convert_gguf(tmp_path / "model.gguf", tmp_path / "out")))
    assert "scales" not in model.model.embed_tokens
    assert model.layers[0].self_attn.q_proj.bits == 4


@pytest.mark.parametrize(
    ("kind", "dtype"), [(Q.F32, mx.float32), (Q.F16, mx.float16), (Q.BF16, mx.bfloat16), (Q.Q6_K, mx.float16)]
)
def test_floats_keep_the_precision_of_the_file(tmp_path, kind, dtype):
    synthetic(tmp_path / "model.gguf", "llama", kind)
    weights = mx.load(str(convert_gguf(tmp_path / "model.gguf", tmp_path / "out") / "model.safetensors"))
    assert {array.dtype for array in weights.values()} == {dtype}


def test_processes_that_convert_at_once_leave_one_whole_folder(tmp_path):
    synthetic(tmp_path / "model.gguf", "llama", Q.Q4_0)
    failures = []

    def convert() -> None:
        try:
            convert_gguf(tmp_path / "model.gguf", tmp_path / "cache" / "out")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=convert) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == ["out"]
    mlx_lm.load(str(tmp_path / "cache" / "out"))


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path):
    metadata = {**byte_level_metadata("unheard-of"), **model_settings("llama")}
    path = write_gguf(tmp_path / "model.gguf", metadata, {"token_embd.weight": (np.ones((8, 32), np.float32), None)})
    with pytest.raises(ModelError):
        convert_gguf(path, tmp_path / "cache" / "out")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("most", [0, 100, 5000, 20_000, 400_000])
def test_a_disk_that_fills_midway_leaves_no_folder_and_says_so(tmp_path, most):
    import resource

    synthetic(tmp_path / "model.gguf", "llama", Q.Q4_0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))  # a file that grows past `most` bytes fails
    try:
        with pytest.raises(ModelError) as caught:
            convert_gguf(tmp_path / "model.gguf", tmp_path / "cache" / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").iterdir())
    mlx_lm.load(str(convert_gguf(tmp_path / "model.gguf", tmp_path / "cache" / "out")))


def test_two_conversions_of_a_file_are_the_same_to_the_byte(tmp_path):
    synthetic(tmp_path / "model.gguf", "llama", Q.Q4_0, embedding=Q.Q8_0)
    one, two = (convert_gguf(tmp_path / "model.gguf", tmp_path / name) for name in ("one", "two"))
    assert {file.name for file in one.iterdir()} == {file.name for file in two.iterdir()}
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes(), file.name


def without(metadata: dict, key: str) -> dict:
    return {name: value for name, value in metadata.items() if name != key}


LLAMA = {**byte_level_metadata("smollm"), **model_settings("llama")}
EMBEDDING = {"token_embd.weight": (np.ones((8, 32), np.float32), None)}
REFUSED = {
    "architecture": ({**LLAMA, "general.architecture": "mamba"}, EMBEDDING, ["'mamba'", "llama, qwen2, qwen3, gemma3"]),
    "pre-tokenizer": ({**LLAMA, "tokenizer.ggml.pre": "viking"}, EMBEDDING, ["'viking'", "smollm", "qwen2"]),
    "tokenizer": ({**LLAMA, "tokenizer.ggml.model": "t5"}, EMBEDDING, ["'t5'", "gpt2", "llama"]),
    "no vocabulary": (without(LLAMA, "tokenizer.ggml.tokens"), EMBEDDING, ["no tokenizer"]),
    "bad merge": ({**LLAMA, "tokenizer.ggml.merges": ["th zz"]}, EMBEDDING, ["'th zz'"]),
    "no setting": (without(LLAMA, "llama.block_count"), EMBEDDING, ["llama.block_count"]),
    "no embedding": (LLAMA, {"output_norm.weight": (np.ones(32, np.float32), None)}, ["token_embd.weight"]),
    "experts": (LLAMA, {**EMBEDDING, "blk.0.ffn_up_exps.weight": (np.ones((2, 4, 32), np.float32), None)}, ["exps"]),
    "rope scaling": ({**LLAMA, "llama.rope.scaling.type": "yarn"}, EMBEDDING, ["'yarn'", "llama3"]),
    "partial rope": ({**LLAMA, "llama.rope.dimension_count": 16}, EMBEDDING, ["rope.dimension_count", "16", "64"]),
    "parts": ({**LLAMA, "split.count": 3}, EMBEDDING, ["3 parts", "merge"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_named_in_one_line(tmp_path, case):
    metadata, tensors, words = REFUSED[case]
    path = write_gguf(tmp_path / "model.gguf", metadata, tensors)
    with pytest.raises(ModelError) as caught:
        convert_gguf(path, tmp_path / "out")
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists()


def test_qwen2_with_another_pre_tokenizer_is_refused_because_transformers_would_replace_it(tmp_path):
    metadata = {**byte_level_metadata("gpt-2", architecture="qwen2"), **model_settings("qwen2")}
    with pytest.raises(ModelError, match="'gpt-2' is not supported for the architecture qwen2"):
        convert_gguf(write_gguf(tmp_path / "model.gguf", metadata, EMBEDDING), tmp_path / "out")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.3, 0.6, 0.999])
def test_a_file_cut_short_anywhere_is_refused(tmp_path, share):
    synthetic(tmp_path / "whole.gguf", "llama", Q.Q4_0)
    content = (tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ModelError) as caught:
        convert_gguf(tmp_path / "cut.gguf", tmp_path / "out")
    assert "cut.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_llama3_rope_factors_become_llama3_rope_scaling(tmp_path):
    from mlx_lm.models.rope_utils import Llama3RoPE

    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    wanted = Llama3RoPE(dims=HEAD_DIM, max_position_embeddings=512, traditional=False, base=5e5, scaling_config=scaling)
    plain = 5e5 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    factors = (np.array(wanted._freqs) / plain).astype(np.float32)
    base = {"llama.rope.freq_base": 5e5}
    path = tmp_path / "model.gguf"
    reference, vocabulary = synthetic(path, "llama", Q.F32, settings=base, rope_factors=factors)
    assert_same_logits(path, reference, vocabulary, "llama", rope_theta=5e5, rope_scaling=scaling)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["rope_scaling"] == scaling
    synthetic(path, "llama", Q.F32, settings=base, rope_factors=factors * np.float32(1.5))
    with pytest.raises(ModelError, match="not those of Llama 3"):
        convert_gguf(path, tmp_path / "other")


TEXTS = ["the café in 1212", "été 12\n\n  the", "日本語 🙂", "a" * 40, "", "\t tabs\r\n", "'ll they're 3.14"]


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "default", "llama-bpe", "llama3", "qwen2"])
@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_text_comes_back_whole(pre, text):
    tokenizer = build_tokenizer(byte_level_metadata(pre))
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_text_comes_back_whole(text, prefix):
    tokenizer = build_tokenizer(sentencepiece_metadata(add_space_prefix=prefix))
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["1", "2", "1", "2"]),
        ("qwen2", ["1", "2", "1", "2"]),
        ("gpt-2", ["12", "12"]),
        ("llama-bpe", ["12", "1", "2"]),
    ],
)
def test_digits_are_divided_as_the_pre_tokenizer_says(pre, pieces):
    assert build_tokenizer(byte_level_metadata(pre)).tokenize("1212") == pieces


def test_merges_apply_in_order_and_bytes_stand_for_what_is_not_merged():
    tokenizer = build_tokenizer(byte_level_metadata("smollm"))
    assert tokenizer.tokenize("the then é日") == ["the", "Ġthe", "n", "Ġ", "Ã©", "æ", "Ĺ", "¥"]


def test_sentencepiece_merges_the_best_score_first_and_falls_back_to_bytes():
    tokenizer = build_tokenizer(sentencepiece_metadata())
    assert tokenizer.tokenize("the  cost é") == [
        *["▁the", "▁▁", "c", "o", "s", "t", "▁", "<0xC3>", "<0xA9>"],
    ]


def test_special_tokens_are_single_tokens_and_only_control_tokens_are_skipped():
    metadata = byte_level_metadata("smollm")
    tokenizer = build_tokenizer(metadata)
    ids = tokenizer.encode("<|im_start|>the<tool><|im_end|>", add_special_tokens=False)
    tokens = metadata["tokenizer.ggml.tokens"]
    assert [tokens[index] for index in ids] == ["<|im_start|>", "the", "<tool>", "<|im_end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the<tool>"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")


@pytest.mark.parametrize(
    ("metadata", "begins"),
    [
        (byte_level_metadata("smollm"), False),
        (byte_level_metadata("llama-bpe"), True),
        (byte_level_metadata("llama3"), True),
        ({**byte_level_metadata("smollm"), "tokenizer.ggml.add_bos_token": True}, True),
        ({**byte_level_metadata("llama-bpe"), "tokenizer.ggml.add_bos_token": False}, False),
        (sentencepiece_metadata(), True),
        (without(sentencepiece_metadata(), "tokenizer.ggml.add_bos_token"), True),
        ({**sentencepiece_metadata(), "tokenizer.ggml.add_bos_token": False}, False),
    ],
)
def test_bos_begins_a_text_where_the_file_or_llama_cpp_says_so(metadata, begins):
    tokenizer = build_tokenizer(metadata)
    ids = tokenizer.encode("the")
    assert (ids[0] == metadata["tokenizer.ggml.bos_token_id"]) == begins
    assert ids[int(begins) :] == tokenizer.encode("the", add_special_tokens=False)


def test_generation_stops_at_the_end_of_sequence_and_of_turn():
    metadata = sentencepiece_metadata()
    assert end_of_turn_ids(metadata) == [2, metadata["tokenizer.ggml.tokens"].index("<end_of_turn>")]
    assert end_of_turn_ids({**byte_level_metadata("smollm"), "tokenizer.ggml.eot_token_id": 7})[0] == 7


@pytest.mark.parametrize("architecture", PRE)
def test_the_tokenizer_that_mlx_lm_reads_back_is_the_one_that_was_built(tmp_path, architecture):
    synthetic(tmp_path / "model.gguf", architecture, Q.Q4_0)
    _, read_back = mlx_lm.load(str(convert_gguf(tmp_path / "model.gguf", tmp_path / "out")))
    built = build_tokenizer(tokenizer_metadata(architecture))
    for text in TEXTS:
        assert read_back.encode(text) == built.encode(text)
        assert read_back.decode(built.encode(text, add_special_tokens=False)) == text
    assert read_back.chat_template == built.chat_template
    assert (read_back.bos_token_id, read_back.eos_token_id) == (built.bos_token_id, built.eos_token_id)


@pytest.mark.parametrize("architecture", PRE)
def test_a_converted_model_stops_at_the_tokens_of_its_file(tmp_path, architecture):
    synthetic(tmp_path / "model.gguf", architecture, Q.Q4_0)
    _, tokenizer = mlx_lm.load(str(convert_gguf(tmp_path / "model.gguf", tmp_path / "out")))
    tokens = tokenizer_metadata(architecture)["tokenizer.ggml.tokens"]
    stops = {"</s>", "<end_of_turn>"} if architecture == "gemma3" else {"<|im_end|>"}
    assert {tokens[index] for index in tokenizer.eos_token_ids} == stops
