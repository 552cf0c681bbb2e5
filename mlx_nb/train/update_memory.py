"""The peak memory of one update, by part, from the graphs that the update would evaluate. Computes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_nb.config.methods import method_named
from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.examples.batches import TokenBatch
from mlx_nb.data.examples.imitation import TokenizedExample
from mlx_nb.model import backend
from mlx_nb.model.adapters import attach_adapter
from mlx_nb.model.graph_memory import Peak, peak_of
from mlx_nb.model.graph_record import Form, Graph, recorded
from mlx_nb.model.lanes import in_lanes, lane_count, lanes_of, one_by_one
from mlx_nb.model.logprobs import target_inputs
from mlx_nb.model.randomness import random_stream
from mlx_nb.model.recomputing import recomputed_by
from mlx_nb.model.trees import named_arrays
from mlx_nb.model.unloaded import unloaded_scorer
from mlx_nb.objectives.base import joined
from mlx_nb.objectives.build import objective_for
from mlx_nb.objectives.kinds import LOSS_KINDS
from mlx_nb.train.optimizer import build_optimizer, clip, gradient_norm
from mlx_nb.train.packing import packed_as_set
from mlx_nb.train.step import sum_and_gradients, training_mode
from mlx_nb.train.vectors import ParameterVectors, optimizer_form

GRADIENTS, ACTIVATIONS, LOGITS, STATE, NEW = "gradients", "activations", "logits", "optimizer state", "new values"


@dataclass(frozen=True)
class BatchShape:
    """The shape of a batch: sequences, tokens of the longest one, and how many of its last tokens are trained."""

    sequences: int
    tokens: int
    trained: int


class UpdateMemory:
    """The memory of updates of a model without weights (`model/unloaded.py`), to which it attaches the adapter."""

    def __init__(self, model: nn.Module, config: RunConfig) -> None:
        self.config = config
        self.model = model
        with random_stream(0):
            attach_adapter(model, config)
            model.eval()
            self.scorer = unloaded_scorer(model, recomputed_by(config))
            self.optimizer = build_optimizer(config)
            self.objective = objective_for(config)
            parameters = model.trainable_parameters()
            self.form = optimizer_form(type(self.optimizer).__name__.lower(), parameters)
            self.optimizer.init(self.form.join(parameters))
        self._width = backend.scheduling_width()
        self.trained_bytes = _bytes(parameters)
        self.state_bytes = _bytes(self.optimizer.state)
        self.weight_bytes = _bytes(model.parameters()) - self.trained_bytes

    def backward(self, shape: BatchShape) -> Peak:
        """The peak of loss and gradients of one micro-batch, besides weights and optimizer state."""
        named = named_arrays(self.model.parameters())
        trained = {name for name, _ in named_arrays(self.model.trainable_parameters())}
        batch = packed_as_set(
            planned_batch(self.config, self.scorer.sizes.vocabulary, shape), self.config.packing, self.scorer
        )
        parts = tuple(target_inputs(part) for part in lanes_of(batch, lane_count()))

        def gradients(*arrays: mx.array) -> list[mx.array]:
            given = [(name, array) for (name, _), array in zip(named, arrays)]
            self.model.update(tree_unflatten(given))
            (total, packed), slopes = sum_and_gradients(
                self.model,
                tree_unflatten([(name, array) for name, array in given if name in trained]),
                lambda: joined(in_lanes(lambda inputs: self.objective(self.scorer, inputs), parts)),
            )
            slopes = one_by_one(slopes) if len(parts) > 1 else slopes
            # The update holds the gradients in both forms until they are evaluated.
            return [*_arrays(self.form.join(slopes)), *_arrays(slopes), total, packed]

        try:
            with random_stream(0), training_mode(self.model):
                graph = recorded(gradients, [array for _, array in named])
        finally:
            self.model.update(tree_unflatten(named))
        return peak_of(graph, self._kinds(graph), width=self._width)

    def _kinds(self, graph: Graph) -> Any:
        results, vocabulary = set(graph.outputs), self.scorer.sizes.vocabulary

        def kind_of(name: str, form: Form) -> str:
            if name in results:
                return GRADIENTS
            return LOGITS if form.shape and form.shape[-1] == vocabulary else ACTIVATIONS

        return kind_of

    def step(self) -> Peak:
        """The peak of applying the gradients, which count; weights and the state before the update do not."""
        parameters = self.model.trainable_parameters()
        slopes = named_arrays(self.form.join(parameters))
        before, state = named_arrays(parameters), named_arrays(self.optimizer.state)
        counts = (len(slopes), len(before))

        def applied(*arrays: mx.array) -> list[mx.array]:
            groups = arrays[: counts[0]], arrays[counts[0] : sum(counts)], arrays[sum(counts) :]
            gradients, own, its = (
                tree_unflatten([(name, array) for (name, _), array in zip(names, group)])
                for names, group in zip((slopes, before, state), groups)
            )
            norm = gradient_norm(gradients)
            gradients = clip(gradients, norm, self.config.grad_clip or 1.0)
            self.optimizer.state = its
            new = self.form.split(self.optimizer.apply_gradients(gradients, self.form.join(own)))
            return [norm, *_arrays(gradients), *_arrays(new), *_arrays(self.optimizer.state)]

        held = self.optimizer.state
        try:
            graph = recorded(applied, [array for _, array in (*slopes, *before, *state)])
        finally:
            self.optimizer.state = held
        # The clipped gradients are held until the end; unclipped ones would be, so both need the same memory.
        norm, clipped, left = graph.outputs[:1], graph.outputs[1 : 1 + counts[0]], graph.outputs[1 + counts[0] :]
        values, its = left[: counts[1]], left[counts[1] :]
        together = isinstance(self.form, ParameterVectors)
        evaluations = [norm, *([values] if together else [[name] for name in values]), its]
        results, slots, kept, used_up = set(values), set(its), set(clipped), set(graph.inputs[: counts[0]])

        def kind_of(name: str, form: Form) -> str:
            if name in used_up or name in kept:
                return GRADIENTS
            return STATE if name in slots else NEW if name in results else ACTIVATIONS

        peak = peak_of(graph, kind_of, width=self._width, evaluations=evaluations, used_up=sorted(used_up))
        if not together:
            return peak
        # Depending on timing, the sum of the gradients is still in memory when their mean is computed.
        return with_more(peak, GRADIENTS, self.trained_bytes)


def with_more(peak: Peak, kind: str, size: int) -> Peak:
    """A peak with `size` more bytes of one kind."""
    return Peak(peak.total + size, {**peak.by_kind, kind: peak.by_kind.get(kind, 0) + size})


def planned_batch(config: RunConfig, vocabulary: int, shape: BatchShape) -> TokenBatch:
    """A batch of this shape, of random tokens."""
    random, method = np.random.default_rng(0), method_named(config.method)

    def example(row: int) -> TokenizedExample:
        loss_mask = np.zeros(shape.tokens, np.float32)
        loss_mask[max(1, shape.tokens - shape.trained) :] = 1
        return TokenizedExample(random.integers(0, vocabulary, shape.tokens).astype(np.int32), loss_mask, row)

    kind = LOSS_KINDS[method.row_kind]
    batch = kind.collate(kind.planned(example, shape.sequences), 1)
    named = ["behavior"] if method.kind.sampled else []
    named += ["reference"] if method.reference and not config.reference_free else []
    values = {name: np.zeros(batch.tokens_BT.shape, np.float32) for name in named}
    of_rows = {name: np.zeros(len(batch.tokens_BT), np.float32) for name in kind.row_values}
    return batch._replace(token_values=values, row_values={**batch.row_values, **of_rows})


def _arrays(tree: Any) -> list[mx.array]:
    return [array for _, array in named_arrays(tree)]


def _bytes(tree: Any) -> int:
    return sum(array.nbytes for array in _arrays(tree))
