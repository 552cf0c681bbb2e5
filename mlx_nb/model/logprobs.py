"""Computes log-probabilities of target tokens. This is the only place in the package with the next-token shift.

Only positions that predict a trained token are projected to the vocabulary. For half-masked rows this halves the
largest matrix product of a small model and saves its memory.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_nb.data.examples.batches import TokenBatch
from mlx_nb.data.examples.packing import PackedLines, pack_lines, scored_lines
from mlx_nb.errors import DataError
from mlx_nb.model import backend
from mlx_nb.model.batch_memory import ModelSizes, refuse_beyond_memory
from mlx_nb.model.cpu_kernels import kernels, kernels_are_verified
from mlx_nb.model.custom_functions import custom_function
from mlx_nb.model.lanes import in_lanes
from mlx_nb.model.layer_checkpoints import checkpointed_layers, refuse_unverified_checkpoints
from mlx_nb.model.packing import Layout, layout_of, mixing_lines, packing_is_verified
from mlx_nb.model.passes import refuse_cache_mismatch
from mlx_nb.model.recomputing import NOTHING, Recomputed
from mlx_nb.model.text_model import TextModel, text_model
from mlx_nb.model.token_chunks import layers_of, refuse_unverified_chunks, token_chunks
from mlx_nb.model.vocabulary_chunks import TargetFunction, head_arrays, over_chunks, targets_at_once

_SUMMED_AT_ONCE = 512
_IS_X86 = platform.machine() in ("x86_64", "AMD64")


class TargetInputs(NamedTuple):
    """A batch as input of the model.

    tokens_BT    (B, T) int32, inputs: the lines of the batch, or one row with all of them if they are packed
    position_S   (S,) int32, index into the flattened (B * T) outputs of the position that predicts each target
    target_S     (S,) int32, the token to predict
    weight_S     (S,) float32, its weight in the loss; 0 on padding of S
    row_values   {name: (R,) float32}, token_values {name: (S,) float32}: constants that an objective needs
    layout       positions of the lines in a packed row; None if they are not packed
    """

    tokens_BT: mx.array
    position_S: mx.array
    target_S: mx.array
    weight_S: mx.array
    row_values: dict[str, mx.array]
    token_values: dict[str, mx.array]
    layout: Layout | None = None

    @property
    def lines(self) -> int:
        """The number of lines in the batch."""
        lines: int = (self.tokens_BT if self.layout is None else self.layout.position_RL).shape[0]
        return lines

    @property
    def line_S(self) -> mx.array:
        """(S,) int32, the line of each target."""
        return self.position_S // self.tokens_BT.shape[1] if self.layout is None else self.layout.line_S


def target_inputs(batch: TokenBatch, targets_to_multiple: int = 1, width_to_multiple: int = 1) -> TargetInputs:
    """THE next-token shift: the output at position t predicts the token at t + 1, weighted by that token's mask.

    Columns after the last position that predicts a target are cut; in a causal model they have no effect. The width is
    rounded up to `width_to_multiple`, within the batch, and the number of targets to `targets_to_multiple`. In a packed
    batch each line is cut in this way, and the rests are joined to one row. Raises DataError for a batch without
    targets.
    """
    row_S, column_S = np.nonzero(batch.loss_mask_BT[:, 1:])
    if not len(row_S):
        raise DataError(f"rows {', '.join(map(str, batch.rows))}: no token is trained. Exclude these rows.")
    packed = _packed(batch, width_to_multiple) if batch.packed else None
    if packed is None:
        width = int(column_S.max()) + 1
        width = min(-(-width // width_to_multiple) * width_to_multiple, batch.tokens_BT.shape[1])
        tokens_BT = batch.tokens_BT[:, :width]
        position_S = row_S * width + column_S
    else:
        tokens_BT = packed.tokens_N[None]
        position_S = np.concatenate([at[column_S[row_S == line]] for line, at in enumerate(packed.positions)])
    weight_S = batch.loss_mask_BT[row_S, column_S + 1]
    target_S = batch.tokens_BT[row_S, column_S + 1]
    padding = -len(position_S) % targets_to_multiple

    def padded(array_S: np.ndarray, dtype: type) -> mx.array:
        return mx.array(np.pad(array_S, (0, padding)).astype(dtype))

    return TargetInputs(
        mx.array(np.ascontiguousarray(tokens_BT)),
        padded(position_S, np.int32),
        padded(target_S, np.int32),
        padded(weight_S, np.float32),
        {name: mx.array(value_R.astype(np.float32)) for name, value_R in batch.row_values.items()},
        {name: padded(value_BT[row_S, column_S + 1], np.float32) for name, value_BT in batch.token_values.items()},
        None if packed is None else layout_of(packed, padded(row_S, np.int32), width_to_multiple),
    )


def _packed(batch: TokenBatch, width_to_multiple: int) -> PackedLines:
    """The lines joined to one row, whose length is rounded up by padding the shortest line."""
    lines = scored_lines(batch)
    shortest = min(range(len(lines)), key=lambda line: len(lines[line]))
    missing = -len(pack_lines(lines).tokens_N) % width_to_multiple
    lines[shortest] = np.pad(lines[shortest], (0, missing))
    return pack_lines(lines)


def target_values(parts: Sequence[TokenBatch], function: Callable[[TargetInputs], mx.array]) -> list[np.ndarray]:
    """Compute `function` for each part in lanes. Returns (S,) float32 values of the targets of each part, in order.

    The numbers of a part do not depend on the other parts.
    """
    found = in_lanes(lambda part: function(target_inputs(part)), parts)
    with backend.one_blas_thread():
        mx.eval(found)
    return [np.array(value_S, dtype=np.float32) for value_S in found]


class TargetScorer:
    """Computes log-probabilities of targets under a model, with its current parameters at each call.

    The head is computed only at targets if a test on a few tokens gives the model's own logits; otherwise the whole
    model is run. `recomputed` is what is computed again for the gradient in training mode. Raises ModelError for a
    family with a cache mismatch (see passes), or whose parts cannot be recomputed.
    """

    def __init__(self, model: nn.Module, recomputed: Recomputed = NOTHING) -> None:
        refuse_cache_mismatch(model)
        if recomputed.segment:
            refuse_unverified_checkpoints(model, recomputed)
        if recomputed.tokens:
            refuse_unverified_chunks(model)
        self.model = model
        self._recomputed = recomputed
        self._text = text_model(model)
        self._has_kernels = kernels_are_verified(model)
        self.trained_head = head_arrays(self._text, self.sizes.hidden) if self._text is not None else []

    @classmethod
    def assuming(
        cls, model: nn.Module, text: TextModel | None, *, has_kernels: bool, recomputed: Recomputed
    ) -> TargetScorer:
        """A scorer of a model without weights, on which nothing can be tested, with a frozen head."""
        scorer = cls.__new__(cls)
        scorer.model, scorer._text, scorer._has_kernels = model, text, has_kernels
        scorer._recomputed = recomputed
        scorer.trained_head = []
        scorer.can_pack = True
        return scorer

    @property
    def projects_targets_only(self) -> bool:
        """Whether the head is computed only at targets."""
        return self._text is not None

    @cached_property
    def can_pack(self) -> bool:
        """Whether packed lines give the same numbers as separate lines."""
        return packing_is_verified(self.model)

    @cached_property
    def sizes(self) -> ModelSizes:
        """The sizes of the model that determine the memory of a batch."""
        return ModelSizes.of(self.model, self._text)

    def refuse_beyond_memory(self, batch: TokenBatch, *, trained: bool = False) -> None:
        """Raise OutOfMemory for a batch that cannot fit; with `trained` its gradient is included."""
        refuse_beyond_memory(batch, self.sizes, trained=trained, targets_only=self.projects_targets_only)

    def logprobs(self, inputs: TargetInputs) -> mx.array:
        """(S,) float32: log p(target | the tokens before it)."""
        [logprob_S] = self.at_targets(inputs, lambda logits_CV, target_C: (target_logprobs(logits_CV, target_C),))
        return logprob_S

    def at_targets(self, inputs: TargetInputs, function: TargetFunction, *values_S: mx.array) -> tuple[mx.array, ...]:
        """Apply `function(logits (C, V), target (C,), values (C,) ...)` to all targets. Returns its arrays as (S,).

        If the logits are large it is called with chunks of the targets, so each result may depend only on its own
        target. Gradients flow only through the first array.
        """
        targets = (inputs.target_S, *values_S)
        layout = inputs.layout
        with self._fast(self.model), self._recomputing(layout), mixing_lines(self.model, layout):
            return self._at_targets(inputs, function, targets)

    def _fast(self, module: nn.Module) -> AbstractContextManager[None]:
        return kernels(module) if self._has_kernels else nullcontext()

    @contextmanager
    def _recomputing(self, layout: Layout | None) -> Iterator[None]:
        segment, _, tokens = self._recomputed
        if not self.model.training or not segment + tokens:
            yield
            return

        @contextmanager
        def again(layer: nn.Module) -> Iterator[None]:
            with self._fast(layer), token_chunks([layer], tokens, self._fast), mixing_lines(layer, layout):
                yield

        layers = checkpointed_layers(self.model, again, self._recomputed) if segment else nullcontext()
        with token_chunks(layers_of(self.model), tokens, self._fast), layers:
            yield

    def _at_targets(
        self, inputs: TargetInputs, function: TargetFunction, targets: tuple[mx.array, ...]
    ) -> tuple[mx.array, ...]:
        size = targets_at_once(self.sizes.vocabulary)
        if self._text is not None and len(inputs.target_S) > size:
            hidden = self._text.hidden(inputs.tokens_BT, inputs.position_S)
            if isinstance(hidden, mx.array):
                own, at_once = self.trained_head, self.model.training
                return over_chunks(self._text, function, hidden, targets, own, size=size, at_once=at_once)
        first, *others = function(self.logits(inputs), *targets)
        return first, *(mx.stop_gradient(other) for other in others)

    def token_losses(self, tokens: np.ndarray) -> np.ndarray:
        """(T,) float32: loss in nats of each token given the tokens before it; NaN for the first."""
        row = TokenBatch(tokens[None], np.ones((1, len(tokens)), np.float32), (0,), (len(tokens),))
        inputs = target_inputs(row)
        losses = np.full(len(tokens), np.nan, np.float32)
        losses[1:] = -np.array(self.logprobs(inputs))
        return losses

    def logits(self, inputs: TargetInputs) -> mx.array:
        """(S, V) logits at the predicting positions, in the model's dtype."""
        if self._text is None:
            logits_BTV = self.model(inputs.tokens_BT)
            result: mx.array = logits_BTV.reshape(-1, logits_BTV.shape[-1])[inputs.position_S]
            return result
        return self._text.logits_at(inputs.tokens_BT, inputs.position_S)


def target_logprobs(logits_SV: mx.array, target_S: mx.array) -> mx.array:
    """(S,) float32: log-softmax of each row of logits at its target, with mlx's own summation."""
    if not backend.is_cpu() and hasattr(mx.fast, "cross_entropy"):
        return -mx.fast.cross_entropy(logits_SV, target_S)  # fused, in float32 from logits of any precision
    logits_SV = logits_SV.astype(mx.float32)
    return _at_target(logits_SV, target_S) - _logsumexp(logits_SV)


def accurate_target_logprobs(logits_SV: mx.array, target_S: mx.array) -> mx.array:
    """Like `target_logprobs`, with more accurate sums, for probability ratios where the fourth decimal matters."""
    logits_SV = logits_SV.astype(mx.float32)
    return _at_target(logits_SV, target_S) - accurate_logsumexp(logits_SV)


def accurate_logsumexp(logits_SV: mx.array) -> mx.array:
    """(S,) log of the sum of exponentials of each row, summed in blocks.

    On a CPU mlx adds the terms sequentially in float32; for 49,152 terms the error is up to 2e-4.
    """
    block = math.gcd(logits_SV.shape[-1], _SUMMED_AT_ONCE)
    if block == 1:
        return _logsumexp(logits_SV)
    return mx.logsumexp(_logsumexp(mx.unflatten(logits_SV, -1, (-1, block))), axis=-1)


def _logsumexp(logits: mx.array) -> mx.array:
    """log-sum-exp over the last axis. On x86 it uses powers of 2, which mlx computes three times as fast as exp."""
    if not (_IS_X86 and backend.is_cpu()):
        return mx.logsumexp(logits, axis=-1)
    lane = mx.default_stream(mx.cpu)

    @custom_function
    def sums(logits: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        largest = logits.max(axis=-1, keepdims=True)
        largest = mx.where(mx.isfinite(largest), largest, 0.0)
        terms = mx.power(2.0, (logits - largest) * math.log2(math.e))
        total = terms.sum(axis=-1)
        return largest.squeeze(-1) + mx.log(total), terms, total

    @sums.vjp
    def _gradient(_logits: mx.array, cotangents: Any, found: Any) -> mx.array:
        _, terms, total = found
        with mx.stream(lane):
            result: mx.array = terms * mx.where(total > 0, cotangents[0] / total, 0.0)[..., None]
            return result

    found: Any = sums(logits)
    result: mx.array = found[0]
    return result


def _at_target(logits_SV: mx.array, target_S: mx.array) -> mx.array:
    return mx.take_along_axis(logits_SV, target_S[:, None], axis=-1)[:, 0]
