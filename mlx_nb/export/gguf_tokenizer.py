"""The tokenizer of a trained model as metadata of a GGUF file: vocabulary, merges, end tokens and chat template."""

from __future__ import annotations

import json
import re
from typing import Any

from mlx_nb.export.gguf_families import Unwritable
from mlx_nb.model.gguf.tokenizer import LLAMA3_WORDS, QWEN2_WORDS

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT4O_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's names for a way to split text before merging: (regular expression, whether digits are split first).
_WAYS = {
    (_GPT2_WORDS, False): "gpt-2",
    (_GPT2_WORDS, True): "smollm",
    (LLAMA3_WORDS, False): "llama-bpe",
    (QWEN2_WORDS, False): "qwen2",
    (_GPT4O_WORDS, False): "gpt-4o",
    (_TEKKEN_WORDS, False): "tekken",
}


def tokenizer_metadata(tokenizer: Any, vocabulary_size: int) -> dict[str, Any]:
    """The `tokenizer.*` keys of a tokenizer in mlx-lm's wrapper, for a model with `vocabulary_size` rows.

    Raises Unwritable for a tokenizer that llama.cpp does not have.
    """
    fast = plain_tokenizer(tokenizer)
    if not hasattr(fast, "backend_tokenizer"):
        raise Unwritable("its tokenizer is not a fast one")
    described = json.loads(fast.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise Unwritable(f"its tokenizer is of the kind {model['type']}, and only BPE is supported")
    tokens, types = _tokens(fast, described, vocabulary_size)
    found: dict[str, Any] = {"ggml.tokens": tokens, "ggml.token_type": types}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        found |= {"ggml.model": "llama", "ggml.pre": "default", "ggml.scores": _scores(tokens, merges)}
        found["ggml.add_space_prefix"] = _adds_space(described)
    else:
        found |= {"ggml.model": "gpt2", "ggml.pre": _pre_tokenizer(described), "ggml.merges": merges}
    found |= _special_ids(tokenizer, fast)
    if template := getattr(fast, "chat_template", None):
        found["chat_template"] = template
    return {f"tokenizer.{name}": value for name, value in found.items()}


def plain_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer inside mlx-lm's wrapper."""
    return tokenizer if hasattr(type(tokenizer), "backend_tokenizer") else getattr(tokenizer, "_tokenizer", tokenizer)


def _tokens(fast: Any, described: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """The text and the type of every token. Rows of the model without a token are `[PAD...]`."""
    by_id = {index: token for token, index in fast.get_vocab().items()}
    if by_id and max(by_id) >= size:
        by_id = {index: token for index, token in by_id.items() if index < size}
    added = {one["id"]: one for one in described["added_tokens"]}
    unknown = described["model"].get("unk_token")
    tokens, types = [], []
    for index in range(size):
        token = by_id.get(index)
        if token is None:
            tokens.append(f"[PAD{index}]")
            types.append(_UNUSED)
            continue
        tokens.append(token)
        if token == unknown:
            types.append(_UNKNOWN)
        elif index in added:
            types.append(_CONTROL if added[index]["special"] else _USER_DEFINED)
        else:
            types.append(_BYTE if _BYTE_TOKEN.fullmatch(token) else _NORMAL)
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """A score for each token, so that the merge that comes first has the highest score; others come last."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        rank.setdefault(left + right, number)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _adds_space(described: dict[str, Any]) -> bool:
    """Whether a text is tokenized as if it began with a space."""
    steps = [
        *_steps(described.get("normalizer"), "normalizers"),
        *_steps(described.get("pre_tokenizer"), "pretokenizers"),
    ]
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme") in ("always", "first"))
        for step in steps
    )


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return list(part[inner]) if part["type"] == "Sequence" else [part]


def _pre_tokenizer(described: dict[str, Any]) -> str:
    """llama.cpp's name for the way in which a byte-level tokenizer splits text."""
    words: str | None = None
    digits = False
    for step in _steps(described.get("pre_tokenizer"), "pretokenizers"):
        match step:
            case {"type": "Digits", "individual_digits": True} | {"type": "Split", "pattern": {"Regex": r"\p{N}"}}:
                digits = True
            case {"type": "Split", "pattern": {"Regex": pattern}}:
                words = pattern
            case {"type": "ByteLevel", "add_prefix_space": False}:
                words = _GPT2_WORDS if step.get("use_regex", True) and words is None else words
            case _:
                raise Unwritable(f"its tokenizer splits text by {step['type']}, which llama.cpp does not do")
    if words is None or (words, digits) not in _WAYS:
        raise Unwritable("its tokenizer splits text by a regular expression that llama.cpp does not have")
    return _WAYS[words, digits]


def _special_ids(tokenizer: Any, fast: Any) -> dict[str, Any]:
    """The special tokens. The end of a turn that the model was trained with is the end token of the file."""
    ends = end_tokens(tokenizer)
    found = {"bos": fast.bos_token_id, "unknown": fast.unk_token_id, "padding": fast.pad_token_id}
    if ends:
        found["eos"] = ends[0]
    if len(ends) > 1:
        found["eot"] = ends[1]
    ids: dict[str, Any] = {f"ggml.{name}_token_id": int(one) for name, one in found.items() if one is not None}
    begun = fast("a")["input_ids"]
    return {
        **ids,
        "ggml.add_bos_token": bool(begun) and begun[0] == fast.bos_token_id,
        "ggml.add_eos_token": False,
    }


def end_tokens(tokenizer: Any) -> list[int]:
    """The ids that end an answer, the one that ends a turn in the chat template first."""
    fast = plain_tokenizer(tokenizer)
    ends = sorted(getattr(tokenizer, "eos_token_ids", None) or [fast.eos_token_id])
    ends = [one for one in ends if one is not None]
    try:
        conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        written = fast.apply_chat_template(conversation, tokenize=False)
        written = written[written.rindex("b") :]
    except Exception:  # without a chat template, or with one that refuses this conversation
        return ends
    named = fast.convert_ids_to_tokens(ends)
    first = [one for one, token in zip(ends, named) if token in written]
    return [*first, *(one for one in ends if one not in first)]
