"""One token per row, drawn from logits by numbers that are given: no generator, no hidden state."""

from __future__ import annotations

import mlx.core as mx

# The vocabulary is searched in two stages, a block and a token in it: one pass over it, and sums stay exact.
_BLOCK = 256
# A nucleus is looked for among this many of the likeliest tokens first: sorting a whole vocabulary is slow.
_LIKELIEST = 1024


def draw_tokens(
    logits_BV: mx.array, uniform_B2: mx.array, temperature: float, top_k: int | None = None, top_p: float = 1.0
) -> tuple[mx.array, mx.array]:
    """A token for each row of logits and its behaviour log-probability: (B,) int32, (B,) float32.

    The token is drawn from softmax(logits / temperature), restricted to the `top_k` likeliest and of those to the
    smallest set that holds `top_p` of their probability (in this order, as TRL and vLLM do; tokens as likely as the
    last one are kept too). Temperature 0 takes the likeliest. The log-probability is that of the whole
    softmax(logits / temperature), at temperature 0 of softmax(logits).
    uniform_B2 holds multiples of 2^-23 in [0, 1): equal numbers draw equal tokens.
    """
    scaled_BV = logits_BV.astype(mx.float32)
    if temperature > 0:
        scaled_BV = scaled_BV * (1 / temperature)
    likeliest_B1 = mx.argmax(scaled_BV, axis=-1, keepdims=True)
    scaled_BV = scaled_BV - mx.take_along_axis(scaled_BV, likeliest_B1, axis=-1)
    weight_BKN = _in_blocks(mx.exp(scaled_BV))
    block_BK = weight_BKN.sum(axis=-1)
    total_B1 = block_BK.sum(axis=-1, keepdims=True)
    if temperature == 0:
        token_B1 = likeliest_B1
    else:
        threshold_B1 = _threshold(scaled_BV, total_B1, top_k, top_p)
        if threshold_B1 is not None:
            weight_BKN = mx.where(_in_blocks(scaled_BV) >= threshold_B1[..., None], weight_BKN, 0)
            block_BK = weight_BKN.sum(axis=-1)
        token_B1 = _drawn(weight_BKN, block_BK, uniform_B2, likeliest_B1)
    logprob_B1 = mx.take_along_axis(scaled_BV, token_B1, axis=-1) - mx.log(total_B1)
    return token_B1[:, 0].astype(mx.int32), logprob_B1[:, 0]


def _in_blocks(value_BV: mx.array) -> mx.array:
    """(B, K, 256) of (B, V); zeros behind the vocabulary's end."""
    rows, vocabulary = value_BV.shape
    if padding := -vocabulary % _BLOCK:
        value_BV = mx.pad(value_BV, ((0, 0), (0, padding)))
    return value_BV.reshape(rows, -1, _BLOCK)


def _drawn(weight_BKN: mx.array, block_BK: mx.array, uniform_B2: mx.array, likeliest_B1: mx.array) -> mx.array:
    """(B, 1) index of a token, drawn in proportion to its weight."""
    chosen_B1 = _first_above(block_BK, uniform_B2[:, :1])
    weight_BN = mx.take_along_axis(weight_BKN, chosen_B1[..., None], axis=1)[:, 0]
    inside_B1 = _first_above(weight_BN, uniform_B2[:, 1:])
    # A GPU's running sums may fall by a rounding and so point at a token without weight.
    possible_B1 = mx.take_along_axis(weight_BN, inside_B1, axis=-1) > 0
    return mx.where(possible_B1, chosen_B1 * _BLOCK + inside_B1, likeliest_B1)


def _first_above(weight_BN: mx.array, uniform_B1: mx.array) -> mx.array:
    """(B, 1) the first index whose running sum of weights is above that share of their total."""
    running_BN = mx.cumsum(weight_BN, axis=-1)
    index_B1 = (running_BN <= uniform_B1 * running_BN[:, -1:]).sum(axis=-1, keepdims=True)
    return mx.minimum(index_B1, weight_BN.shape[-1] - 1).astype(mx.int32)


def _threshold(scaled_BV: mx.array, total_B1: mx.array, top_k: int | None, top_p: float) -> mx.array | None:
    """(B, 1) the lowest logit that may be drawn, None when all may; logits are relative to the largest."""
    vocabulary = scaled_BV.shape[-1]
    if top_k is not None and top_k < vocabulary:
        likeliest_BK = mx.topk(scaled_BV, top_k, axis=-1)
        if top_p >= 1:
            return likeliest_BK.min(axis=-1, keepdims=True)
        return _nucleus_threshold(likeliest_BK, mx.exp(likeliest_BK).sum(axis=-1, keepdims=True), top_p)
    if top_p >= 1:
        return None
    if vocabulary > _LIKELIEST:
        likeliest_BK = mx.topk(scaled_BV, _LIKELIEST, axis=-1)
        if mx.all(mx.exp(likeliest_BK).sum(axis=-1, keepdims=True) >= top_p * total_B1).item():
            return _nucleus_threshold(likeliest_BK, total_B1, top_p)
    return _nucleus_threshold(scaled_BV, total_B1, top_p)


def _nucleus_threshold(scaled_BK: mx.array, total_B1: mx.array, top_p: float) -> mx.array:
    """(B, 1) the lowest logit of the smallest set of the likeliest that holds `top_p` of the total."""
    falling_BK = -mx.sort(-scaled_BK, axis=-1)
    weight_BK = mx.exp(falling_BK)
    before_BK = mx.cumsum(weight_BK, axis=-1) - weight_BK
    count_B1 = (before_BK < top_p * total_B1).sum(axis=-1, keepdims=True)
    return mx.take_along_axis(falling_BK, mx.maximum(count_B1, 1) - 1, axis=-1)
