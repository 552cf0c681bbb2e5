"""Builds a fast Hugging Face tokenizer from the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlx_nb.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
# Pre-tokenization of each kind of byte-level BPE: (regular expression or None, whether digits are split first).
_PRE_TOKENIZERS: dict[str, tuple[str | None, bool]] = {
    "default": (None, False),
    "gpt-2": (None, False),
    "smollm": (None, True),
    **dict.fromkeys(_LLAMA3, (LLAMA3_WORDS, False)),
    "qwen2": (QWEN2_WORDS, False),
}


def build_tokenizer(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer with its special tokens and chat template.

    Raises ModelError for an unsupported kind or an incomplete vocabulary.
    """
    from transformers import PreTrainedTokenizerFast

    kind = metadata.get("tokenizer.ggml.model")
    if "tokenizer.ggml.tokens" not in metadata:
        raise ModelError("there is no tokenizer in the file. Use a GGUF file with its vocabulary in it.")
    if kind == "gpt2":
        tokenizer = _byte_level_bpe(metadata)
    elif kind == "llama":
        tokenizer = _sentencepiece_bpe(metadata)
    else:
        raise ModelError(
            f"tokenizer {kind!r} is not supported; supported are gpt2 (byte-level) and llama (SentencePiece)."
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    _add_special_tokens(tokenizer, metadata)
    _add_bos(tokenizer, metadata, default=kind == "llama")
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {}
    for name, key in names.items():
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None and 0 <= token < len(tokens):
            special[name] = tokens[token]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
    if "tokenizer.chat_template" in metadata:
        fast.chat_template = metadata["tokenizer.chat_template"]
    return fast


def end_of_turn_ids(metadata: Mapping[str, Any]) -> list[int]:
    """The ids that stop generation: end of sequence, and end of turn by the file's key or by common names."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot")]
    ids = {int(metadata[key]) for key in keys if key in metadata}
    types = metadata.get("tokenizer.ggml.token_type", [])
    for index, (token, kind) in enumerate(zip(metadata.get("tokenizer.ggml.tokens", []), types)):
        if kind == _CONTROL and token in _END_OF_TURN:
            ids.add(index)
    return sorted(ids)


def _byte_level_bpe(metadata: Mapping[str, Any]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        known = ", ".join(_PRE_TOKENIZERS)
        raise ModelError(f"pre-tokenizer {pre!r} is not supported; supported are {known}.")
    if metadata.get("general.architecture") == "qwen2" and pre != "qwen2":
        # transformers always uses the qwen2 pre-tokenizer for model type qwen2.
        raise ModelError(f"pre-tokenizer {pre!r} is not supported for the architecture qwen2; supported is qwen2.")
    words, single_digits = _PRE_TOKENIZERS[pre]
    vocabulary = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = []
    for merge in metadata["tokenizer.ggml.merges"]:
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocabulary.keys():
            raise ModelError(f"the merge {merge!r} makes a token that is not in the vocabulary. Is the file complete?")
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _LLAMA3))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if single_digits else []
    if words is not None:
        steps.append(pre_tokenizers.Split(Regex(words), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(metadata: Mapping[str, Any]) -> Any:
    """BPE with byte fallback; pairs are merged in order of the score of the merged token."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges_by_score(vocabulary, scores),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
    decoding: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*decoding, decoders.Strip(" ", 1, 0)] if prefix else decoding)
    return tokenizer


def _merges_by_score(vocabulary: Mapping[str, int], scores: Any) -> list[tuple[str, str]]:
    merges: list[tuple[float, int, int, str, str]] = []
    for token, index in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-float(scores[index]), vocabulary[left], vocabulary[right], left, right))
    merges.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in merges]


def _add_special_tokens(tokenizer: Any, metadata: Mapping[str, Any]) -> None:
    from tokenizers import AddedToken

    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type", [])
    control = [token for token, kind in zip(tokens, types) if kind in (_UNKNOWN, _CONTROL)]
    defined = [token for token, kind in zip(tokens, types) if kind == _USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in defined])


def _add_bos(tokenizer: Any, metadata: Mapping[str, Any], *, default: bool) -> None:
    from tokenizers import processors

    bos = metadata.get("tokenizer.ggml.bos_token_id")
    add = metadata.get("tokenizer.ggml.add_bos_token", default or metadata.get("tokenizer.ggml.pre") in _LLAMA3)
    if not add or bos is None:
        return
    token = metadata["tokenizer.ggml.tokens"][bos]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", token, "$B"], special_tokens=[(token, int(bos))]
    )
