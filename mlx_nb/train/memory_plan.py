"""Plans a run's memory before anything is loaded: its peak by part, what fits, and which settings need less."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from mlx_nb.config.memory_limit import AUTO, OFF, bytes_of
from mlx_nb.config.methods import method_named
from mlx_nb.config.run_config import RunConfig
from mlx_nb.config.settings import LoraParameters
from mlx_nb.errors import ConfigError, ModelError, OutOfMemory
from mlx_nb.model.backend import is_cpu
from mlx_nb.model.graph_memory import Peak
from mlx_nb.model.limits import context_of
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
_STEP = 64  # tokens: the longest row that fits is found in these steps
_MOST_ROWS = 1024
_WORTH_SUGGESTING = 0.03  # share of the peak
_MOST_SUGGESTIONS = 3


@dataclass(frozen=True)
class Suggestion:
    """Settings that need less memory, as a line to type, and the bytes that they save."""

    line: str
    saves: int


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
        advice = "; ".join(f"`{one.line}` saves {gigabytes(one.saves)}" for one in self.suggestions)
        return (
            f"this run needs {gigabytes(self.peak)} at its peak ({_sequences(self.shape)}), and "
            f"{gigabytes(self.budget)} may be used (memory_limit). {advice or 'Use a smaller model'}."
        )

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {self.parameters:,} parameters, {self.trained:,} trained",
            f"peak of an update, with {_sequences(self.shape)}: {gigabytes(self.peak)}",
            *(f"  {name:16} {gigabytes(self.parts[name]):>10}" for name in PARTS if self.parts.get(name)),
        ]
        if self.budget is not None:
            lines.append(f"may use {gigabytes(self.budget)}: {'it fits' if self.fits else 'IT DOES NOT FIT'}")
            lines.append(f"  longest max_seq_length that fits: {_limit(self.longest)}")
            lines.append(f"  largest batch_size that fits: {_limit(self.most_rows)}")
        if self.seconds is not None:
            lines.append(f"an update takes {self.seconds:.3g} s")
        if self.suggestions:
            lines.append("to use less:")
            lines += [f"  {one.line:48} saves {gigabytes(one.saves)}" for one in self.suggestions]
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

    def peak(self, shape: BatchShape, *, accumulates: bool | None = None, rough: bool = False) -> dict[str, int]:
        """The peak memory of an update with micro-batches of this shape, by part.

        `accumulates` says whether it has several micro-batches; None = as in the settings. A `rough` peak is
        interpolated from those of a few shapes.
        """
        whole, config = self.whole, self.config
        backward = self._interpolated(shape) if rough else self._backward(shape)
        if config.grad_accumulation_steps > 1 if accumulates is None else accumulates:
            backward = with_more(backward, GRADIENTS, whole.trained_bytes)
        highest = max(backward, self._step, key=lambda peak: peak.total)
        snapshot = whole.trained_bytes + whole.state_bytes
        own = {WEIGHTS: whole.weight_bytes, TRAINED: whole.trained_bytes}
        parts = {**own, **highest.by_kind, STATE: highest.by_kind.get(STATE, 0) + whole.state_bytes}
        updates = config.iters if config.iters is not None else _MOST_ROWS
        parts[SNAPSHOTS] = min(config.snapshot_memory * 1024**2, snapshot * updates)
        return {name: parts[name] for name in PARTS if parts.get(name)}

    def _interpolated(self, shape: BatchShape) -> Peak:
        """The peak from those of one and two sequences, linear in their number, and of the recorded lengths."""
        share, points = self._share(shape), []
        each = sequences_in(self.config, 1)
        for sequences in (each, 2 * each):
            of_lengths = [self._of_layers(_shape(sequences, tokens, share)) for tokens in _RECORDED_TOKENS]
            points.append(_combined(of_lengths, lambda sizes: _along(_RECORDED_TOKENS, sizes, shape.tokens)))
        return _combined(points, lambda sizes: sizes[0] + (sizes[1] - sizes[0]) * (shape.sequences / each - 1))

    def _share(self, shape: BatchShape) -> float:
        """The share of trained tokens of the recorded shapes; 1 if logits are in chunks, so that theirs are too."""
        in_chunks = shape.sequences * shape.trained > targets_at_once(self.whole.scorer.sizes.vocabulary)
        return 1.0 if in_chunks else shape.trained / shape.tokens

    @cached_property
    def _step(self) -> Peak:
        return self.whole.step()

    def _backward(self, shape: BatchShape) -> Peak:
        if shape.tokens <= _RECORDED_TOKENS[-1]:
            return self._of_layers(shape)
        points = [self._of_layers(_shape(shape.sequences, tokens, self._share(shape))) for tokens in _RECORDED_TOKENS]
        return _combined(points, lambda sizes: _along(_RECORDED_TOKENS, sizes, shape.tokens))

    def _of_layers(self, shape: BatchShape) -> Peak:
        """The peak for all layers, from that of a few if all are alike."""
        model, config = self.whole.model, self.config
        layers = len(model.layers)
        adapted = layers if config.num_layers == -1 else config.num_layers
        one, other = (count * max(1, config.segment_size) for count in _RECORDED_LAYERS)
        if adapted <= other or not self._layers_are_alike:
            return self._recorded(shape, None)
        frozen = min(1, layers - adapted)
        points = [self._recorded(shape, frozen + count) for count in (one, other)]
        return _combined(points, lambda sizes: sizes[0] + (sizes[1] - sizes[0]) * (adapted - one) / (other - one))

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


def _shape(sequences: int, tokens: int, share: float) -> BatchShape:
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
    """The plan of a run with batches of this shape, without limits and suggestions (see `completed`)."""
    model = planner.whole.model
    counts = [
        sum(array.size for _, array in named_arrays(tree))
        for tree in (model.parameters(), model.trainable_parameters())
    ]
    return MemoryPlan(name, counts[0], counts[1], planner.peak(shape), shape, budget, seconds=seconds)


def completed(plan: MemoryPlan, planner: MemoryPlanner) -> MemoryPlan:
    """The plan with the longest rows and largest batches that fit, and suggestions."""
    plan = replace(plan, suggestions=suggestions_for(plan, planner))
    if plan.budget is None:
        return plan
    budget, shape, share = plan.budget, plan.shape, plan.shape.trained / plan.shape.tokens

    def fits(sequences: int, tokens: int) -> bool:
        return sum(planner.peak(_shape(sequences, tokens, share), rough=True).values()) <= budget

    most = context_of(planner.description) or 2**17
    steps = _largest(lambda count: fits(shape.sequences, count * _STEP), max(1, most // _STEP))
    each = sequences_in(planner.config, 1)
    rows = _largest(lambda count: fits(count * each, shape.tokens), _MOST_ROWS)
    return replace(plan, longest=None if steps is None else steps * _STEP, most_rows=rows)


def _largest(fits: Callable[[int], bool], most: int) -> int | None:
    """The largest number up to `most` that fits, 0 if none does, None if `most` does."""
    if fits(most):
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def suggestions_for(plan: MemoryPlan, planner: MemoryPlanner) -> tuple[Suggestion, ...]:
    """The changes that save most, most first."""
    found = []
    for line, peak in _changes(plan, planner):
        try:
            saves = plan.peak - sum(peak().values())
        except (ConfigError, ModelError, ValueError):  # settings that do not go together, or no graph can be recorded
            continue
        if saves > _WORTH_SUGGESTING * plan.peak:
            found.append(Suggestion(line, saves))
    return tuple(sorted(found, key=lambda one: -one.saves)[:_MOST_SUGGESTIONS])


def _changes(plan: MemoryPlan, planner: MemoryPlanner) -> Iterator[tuple[str, Callable[[], dict[str, int]]]]:
    """Lines to type, with functions that plan the peak after that change."""
    config, shape, rows = planner.config, plan.shape, planner.config.batch_size

    def changed(**changes: Any) -> Callable[[], dict[str, int]]:
        return lambda: MemoryPlanner(planner.description, config.replace(**changes)).peak(shape)

    if not config.grad_checkpoint:
        yield "grad_checkpoint: true", changed(grad_checkpoint=True)
    elif not config.efficient_long_context:
        yield "efficient_long_context: true", changed(efficient_long_context=True)
    if rows > 1 and not method_named(config.method).kind.sampled:
        steps = config.grad_accumulation_steps * rows
        alone = replace(shape, sequences=max(1, shape.sequences // rows))
        line = f"batch_size: 1, grad_accumulation_steps: {steps}"
        yield line, lambda: planner.peak(alone, accumulates=True)
    if shape.tokens >= 2 * _STEP:
        half = replace(shape, tokens=shape.tokens // 2, trained=max(1, shape.trained // 2))
        yield f"max_seq_length: {half.tokens}", lambda: planner.peak(half)
    if config.fine_tune_type == "full":
        yield "fine_tune_type: lora", changed(fine_tune_type="lora")
    elif config.lora_parameters.rank > (usual := LoraParameters().rank):
        lower = replace(config.lora_parameters, rank=usual)
        yield f"lora_parameters: {{rank: {usual}}}", changed(lora_parameters=lower)
    if config.load_in_bits is None and not is_cpu() and config.fine_tune_type != "full":
        yield "load_in_bits: 4", changed(load_in_bits=4)
    if snapshots := plan.parts.get(SNAPSHOTS, 0):
        yield "snapshot_memory: 0", lambda: {"peak": plan.peak - snapshots}


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


def refuse_beyond_budget(plan: MemoryPlan, planner: MemoryPlanner) -> None:
    """Raise OutOfMemory in one line, with suggestions, if the plan exceeds its budget."""
    if not plan.fits:
        raise OutOfMemory(replace(plan, suggestions=suggestions_for(plan, planner)).refusal)
