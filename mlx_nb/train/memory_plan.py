"""Plans a run's memory before anything is loaded: its peak by part, what fits, and which settings need less."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any

from mlx_nb.config.memory_limit import AUTO, OFF, bytes_of
from mlx_nb.config.methods import method_named
from mlx_nb.config.run_config import RunConfig
from mlx_nb.model.graph_memory import Peak
from mlx_nb.model.memory import gigabytes
from mlx_nb.model.trees import named_arrays
from mlx_nb.model.unloaded import keep_layers, layers_are_alike, unloaded_model
from mlx_nb.model.vocabulary_chunks import targets_at_once
from mlx_nb.train.update_memory import (
    ACTIVATIONS,
    GRADIENTS,
    LOGITS,
    NEW,
    STATE,
    BatchShape,
    UpdateMemory,
    with_more,
)

WEIGHTS, TRAINED, SNAPSHOTS = "weights", "trained weights", "snapshots"
PARTS = (WEIGHTS, TRAINED, GRADIENTS, STATE, NEW, ACTIVATIONS, LOGITS, SNAPSHOTS)
_RECORDED_LAYERS = (2, 3)  # of a model with more layers, which are all alike; or as many segments of layers
# Longer rows are extrapolated from these: enough tokens for logits in chunks with most vocabularies.
_RECORDED_TOKENS = (384, 640, 1024)
_MOST_SNAPSHOTS = 1024


@dataclass(frozen=True)
class Suggestion:
    """Settings that need less memory, as a line to type, and the bytes that they save."""

    line: str
    saves: int

    @property
    def saving(self) -> str:
        """`saves` as text."""
        return gigabytes(self.saves)


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a run. Sizes are in bytes.

    parameters, trained  numbers of parameters
    parts                the peak of an update, by part
    shape                the largest batch: sequences and tokens of the longest
    budget               the memory that the run may use; None = no limit
    longest, most_rows   the longest `max_seq_length` and the largest `batch_size` that fit into the budget; 0 = none,
                         None = no limit was found
    seconds              per update, if some were measured
    updates_left         until the end of the run, if its time was measured
    suggestions          what needs less, most first
    """

    model: str
    parameters: int
    trained: int
    parts: Mapping[str, int]
    shape: BatchShape
    budget: int | None = None
    longest: int | None = None
    most_rows: int | None = None
    seconds: float | None = None
    updates_left: int | None = None
    suggestions: tuple[Suggestion, ...] = field(default=())

    @property
    def peak(self) -> int:
        """The peak memory of an update."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the peak is within the budget."""
        return self.budget is None or self.peak <= self.budget

    @property
    def note(self) -> str:
        """One line for the notes of a run."""
        largest = sorted(self.parts.items(), key=lambda part: -part[1])[:3]
        parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in largest if size)
        within = "" if self.budget is None else f" of {gigabytes(self.budget)}"
        return f"Planned peak memory: {gigabytes(self.peak)}{within} ({parts}). `%finetune plan` shows more."

    @property
    def refusal(self) -> str:
        """One line that says why the run does not fit, and what to change."""
        assert self.budget is not None
        advice = "; ".join(f"`{one.line}` saves {one.saving}" for one in self.suggestions)
        return (
            f"this run needs {gigabytes(self.peak)} at its peak ({_sequences(self.shape)}), and "
            f"{gigabytes(self.budget)} may be used (memory_limit). {advice or 'Use a smaller model'}."
        )

    @property
    def verdict(self) -> str:
        """Whether an update fits, and what it needs, in one sentence."""
        needs = f"{gigabytes(self.peak)} at the peak of an update, with {_sequences(self.shape)}"
        if self.budget is None:
            return f"It needs {needs}; there is no limit (memory_limit)."
        if self.fits:
            return f"It fits: {needs}. {gigabytes(self.budget)} may be used."
        return f"It does not fit: it needs {needs}, and {gigabytes(self.budget)} may be used (memory_limit)."

    @property
    def sizes(self) -> list[tuple[str, str]]:
        """The parts of the peak, with their sizes as text."""
        return [(name, gigabytes(self.parts[name])) for name in PARTS if self.parts.get(name)]

    @property
    def limits(self) -> list[tuple[str, str]]:
        """What fits into the budget: two labels, each with its number as text."""
        return [
            ("longest max_seq_length that fits", _limit(self.longest)),
            ("largest batch_size that fits", _limit(self.most_rows)),
        ]

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {self.parameters:,} parameters, {self.trained:,} trained",
            f"peak of an update, with {_sequences(self.shape)}: {gigabytes(self.peak)}",
            *(f"  {name:16} {size:>10}" for name, size in self.sizes),
        ]
        if self.budget is not None:
            lines.append(f"may use {gigabytes(self.budget)}: {'it fits' if self.fits else 'IT DOES NOT FIT'}")
            lines += [f"  {label}: {number}" for label, number in self.limits]
        if self.seconds is not None:
            lines.append(f"an update takes {self.seconds:.3g} s ({1 / self.seconds:.3g} updates a second)")
        if self.seconds is not None and self.updates_left is not None:
            total = timedelta(seconds=round(self.updates_left * self.seconds))
            lines.append(f"  {self.updates_left:,} updates are left: {total} without validations and samples")
        if self.suggestions:
            lines.append("to use less:")
            lines += [f"  {one.line:48} saves {one.saving}" for one in self.suggestions]
        return "\n".join(lines)


def _sequences(shape: BatchShape) -> str:
    sequences = f"{shape.sequences:,} sequence{'s' if shape.sequences > 1 else ''}"
    return f"{sequences} of {shape.tokens:,} tokens at a time"


def _limit(value: int | None) -> str:
    return "more than was tried" if value is None else f"{value:,}" if value else "none"


class MemoryPlanner:
    """Plans runs of one model. `description` is its config.json. Raises ModelError for a model that mlx-lm lacks."""

    def __init__(self, description: Mapping[str, Any], config: RunConfig) -> None:
        self.description = description
        self.config = config
        self._known: dict[tuple[BatchShape, int | None], Peak] = {}
        self._memories: dict[int | None, UpdateMemory] = {}

    @cached_property
    def whole(self) -> UpdateMemory:
        """The memory of the whole model."""
        return UpdateMemory(unloaded_model(self.description, self.config.load_in_bits), self.config)

    def peak(
        self, shape: BatchShape, *, accumulates: bool | None = None, rough_share: float | None = None
    ) -> dict[str, int]:
        """The peak memory of an update with micro-batches of this shape, by part.

        `accumulates` says whether it has several micro-batches; None = as in the settings. With `rough_share`, the
        share of trained tokens, the peak is interpolated from those of a few shapes.
        """
        whole, config = self.whole, self.config
        backward = self._backward(shape) if rough_share is None else self._interpolated(shape, rough_share)
        if config.grad_accumulation_steps > 1 if accumulates is None else accumulates:
            backward = with_more(backward, GRADIENTS, whole.trained_bytes)
        highest = max(backward, self._step, key=lambda peak: peak.total)
        snapshot = whole.trained_bytes + whole.state_bytes
        own = {WEIGHTS: whole.weight_bytes, TRAINED: whole.trained_bytes}
        parts = {**own, **highest.by_kind, STATE: highest.by_kind.get(STATE, 0) + whole.state_bytes}
        updates = config.iters if config.iters is not None else _MOST_SNAPSHOTS
        parts[SNAPSHOTS] = min(config.snapshot_memory * 1024**2, snapshot * updates)
        return {name: parts[name] for name in PARTS if parts.get(name)}

    def recording(self, shape: BatchShape, *, rough_share: float | None = None) -> Iterator[None]:
        """Record the graphs that `peak` needs, one at a time: the work of planning in pieces.

        With `rough_share` those of every rough peak.
        """
        shapes = self._lengths(shape)
        if rough_share is not None:
            shapes = [one for share in {rough_share, 1.0} for one in self._interpolation(share)]
        for one in shapes:
            for layers in self._layer_counts:
                self._recorded(one, layers)
                yield
        _ = self._step
        yield

    def _interpolation(self, share: float) -> list[BatchShape]:
        each = sequences_in(self.config, 1)
        return [shape_with_share(count, tokens, share) for count in (each, 2 * each) for tokens in _RECORDED_TOKENS]

    def _interpolated(self, shape: BatchShape, share: float) -> Peak:
        """The peak from those of one and two sequences, linear in their number, and of the recorded lengths."""
        share = 1.0 if self._in_chunks(shape) else share
        peaks, lengths = [*map(self._of_layers, self._interpolation(share))], len(_RECORDED_TOKENS)
        each = sequences_in(self.config, 1)
        points = [
            _combined(some, lambda sizes: _along(_RECORDED_TOKENS, sizes, shape.tokens))
            for some in (peaks[:lengths], peaks[lengths:])
        ]
        return _combined(points, lambda sizes: sizes[0] + (sizes[1] - sizes[0]) * (shape.sequences / each - 1))

    def _in_chunks(self, shape: BatchShape) -> bool:
        """Whether logits are computed in chunks, so that all tokens of the recorded shapes are to be trained."""
        return shape.sequences * shape.trained > targets_at_once(self.whole.scorer.sizes.vocabulary)

    @cached_property
    def _step(self) -> Peak:
        return self.whole.step()

    def _lengths(self, shape: BatchShape) -> list[BatchShape]:
        """The shape, or those from which a longer one is extrapolated."""
        if shape.tokens <= _RECORDED_TOKENS[-1]:
            return [shape]
        share = 1.0 if self._in_chunks(shape) else shape.trained / shape.tokens
        return [shape_with_share(shape.sequences, tokens, share) for tokens in _RECORDED_TOKENS]

    def _backward(self, shape: BatchShape) -> Peak:
        points = [self._of_layers(one) for one in self._lengths(shape)]
        if len(points) == 1:
            return points[0]
        return _combined(points, lambda sizes: _along(_RECORDED_TOKENS, sizes, shape.tokens))

    @property
    def _adapted(self) -> int:
        layers = len(self.whole.model.layers)
        return layers if self.config.num_layers == -1 else self.config.num_layers

    @property
    def _layer_counts(self) -> list[int | None]:
        """The numbers of layers to record: a few if all are alike, otherwise all (None)."""
        if self._adapted <= self._few_layers[-1] or not self._layers_are_alike:
            return [None]
        frozen = min(1, len(self.whole.model.layers) - self._adapted)
        return [frozen + count for count in self._few_layers]

    @property
    def _few_layers(self) -> list[int]:
        return [count * max(1, self.config.segment_size) for count in _RECORDED_LAYERS]

    def _of_layers(self, shape: BatchShape) -> Peak:
        """The peak for all layers, from that of a few if all are alike."""
        one, other = self._few_layers
        points = [self._recorded(shape, count) for count in self._layer_counts]
        if len(points) == 1:
            return points[0]
        return _combined(points, lambda sizes: sizes[0] + (sizes[1] - sizes[0]) * (self._adapted - one) / (other - one))

    @cached_property
    def _layers_are_alike(self) -> bool:
        return layers_are_alike(unloaded_model(self.description))

    def _recorded(self, shape: BatchShape, layers: int | None) -> Peak:
        if (shape, layers) not in self._known:
            if layers not in self._memories:
                self._memories[layers] = self.whole if layers is None else self._with_layers(layers)
            self._known[shape, layers] = self._memories[layers].backward(shape)
        return self._known[shape, layers]

    def _with_layers(self, layers: int) -> UpdateMemory:
        model, config = unloaded_model(self.description, self.config.load_in_bits), self.config
        keep_layers(model, layers)
        if config.num_layers != -1:
            config = config.replace(num_layers=layers - min(1, len(self.whole.model.layers) - config.num_layers))
        return UpdateMemory(model, config)


def _combined(points: Sequence[Peak], value: Callable[[list[float]], float]) -> Peak:
    kinds = sorted({kind for point in points for kind in point.by_kind})
    sizes = {kind: max(0, round(value([point.by_kind.get(kind, 0) for point in points]))) for kind in kinds}
    return Peak(sum(sizes.values()), sizes)


def shape_with_share(sequences: int, tokens: int, share: float) -> BatchShape:
    """A shape of which this share of the tokens is trained."""
    return BatchShape(sequences, tokens, max(1, round(share * tokens)))


def _along(at: Sequence[int], values: Sequence[float], x: float) -> float:
    """The value at x: on the lines between the points, and beyond the last one on the parabola through three."""
    for place in range(1, len(at)):
        if x <= at[place]:
            (low, high), (one, other) = at[place - 1 : place + 1], values[place - 1 : place + 1]
            return one + (other - one) * (x - low) / (high - low)
    total = 0.0
    for place, one in enumerate(at):
        term = values[place]
        for other in at:
            if other != one:
                term *= (x - other) / (one - other)
        total += term
    return total


def sequences_in(config: RunConfig, rows: int) -> int:
    """The number of sequences that the model reads for `rows` rows of a micro-batch."""
    return rows * (2 if method_named(config.method).kind.pairs else 1)


def full_shape(config: RunConfig) -> BatchShape:
    """The largest batch that the settings allow, every token of it trained."""
    completion = config.max_completion_length if method_named(config.method).kind.sampled else 0
    tokens = config.max_seq_length + completion
    return BatchShape(sequences_in(config, config.batch_size), tokens, completion or tokens)


def planned(
    name: str, planner: MemoryPlanner, shape: BatchShape, budget: int | None, seconds: float | None = None
) -> MemoryPlan:
    """The plan of a run with batches of this shape, without limits and suggestions (see `memory_advice`)."""
    model = planner.whole.model
    counts = [
        sum(array.size for _, array in named_arrays(tree))
        for tree in (model.parameters(), model.trainable_parameters())
    ]
    return MemoryPlan(name, counts[0], counts[1], planner.peak(shape), shape, budget, seconds=seconds)


def budget_of(limit: str, available: Callable[[], int]) -> int | None:
    """The bytes that `memory_limit` allows; None = no limit. `auto` is what is `available`."""
    if limit == OFF:
        return None
    return available() if limit == AUTO else bytes_of(limit)


def rough_peak(description: Mapping[str, Any], config: RunConfig, shape: BatchShape) -> int | None:
    """A fast estimate, usually about twice the peak; None for a model whose sizes cannot be found."""
    sizes = [size for name in _ROUGH_SIZES if isinstance(size := description.get(name), int)]
    if len(sizes) < len(_ROUGH_SIZES) or any("expert" in name for name in description):
        return _rough_peak_from_modules(description, config, shape)
    width, inner, layers, heads, vocabulary = sizes
    numbers = layers * (4 * width + 3 * inner) * width + 2 * vocabulary * width
    trained = numbers if config.fine_tune_type == "full" else 0.03 * numbers * max(1, config.lora_parameters.rank / 8)
    of_token = layers * (30 * width + 12 * inner + 3 * heads * shape.tokens) + 8 * vocabulary
    return int(4 * (numbers + 10 * trained + shape.sequences * shape.tokens * of_token))


def _rough_peak_from_modules(description: Mapping[str, Any], config: RunConfig, shape: BatchShape) -> int | None:
    try:
        whole = MemoryPlanner(description, config).whole
        sizes = whole.scorer.sizes
    except Exception:  # mlx-lm's model code may raise anything
        return None
    of_layer = 150 * sizes.hidden + 3 * -(-sizes.hidden // 32) * shape.tokens
    of_token = sizes.layers * of_layer + 8 * sizes.vocabulary
    fixed = whole.weight_bytes + 8 * (whole.trained_bytes + whole.state_bytes)
    return int(fixed + 4 * shape.sequences * shape.tokens * of_token)


_ROUGH_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def shape_of(config: RunConfig, examples: Sequence[Any]) -> BatchShape:
    """The shape of the largest batch of these tokenized rows."""
    sampled = method_named(config.method).kind.sampled
    if sampled:
        longest = max(len(one.tokens) for example in examples for one in example.sequences)
        return BatchShape(config.batch_size, longest + config.max_completion_length, config.max_completion_length)
    sequences = [one for example in examples for one in example.sequences]
    trained = max(int(len(one.tokens) - int((one.loss_mask != 0).argmax())) for one in sequences)
    rows = min(config.batch_size, len(examples))
    return BatchShape(sequences_in(config, rows), max(len(one.tokens) for one in sequences), trained)
