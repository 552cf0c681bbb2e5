"""What a planned run could change: settings that need less memory, and the longest rows and largest batches that fit.

`completing` does this in pieces, because each alternative is planned by recording graphs, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from mlx_nb.config.methods import method_named
from mlx_nb.config.settings import LoraParameters
from mlx_nb.errors import ConfigError, ModelError, OutOfMemory
from mlx_nb.model.backend import is_cpu
from mlx_nb.model.limits import context_of
from mlx_nb.process.pieces import finished
from mlx_nb.train.memory_plan import (
    SNAPSHOTS,
    MemoryPlan,
    MemoryPlanner,
    Suggestion,
    sequences_in,
    shape_with_share,
)
from mlx_nb.train.update_memory import BatchShape

_STEP = 64  # tokens: the longest row that fits is found in these steps
_MOST_ROWS = 1024
_WORTH_SUGGESTING = 0.03  # share of the peak
_MOST_SUGGESTIONS = 3


def completed(plan: MemoryPlan, planner: MemoryPlanner) -> MemoryPlan:
    """The plan with the longest rows and largest batches that fit, and suggestions."""
    return finished(completing(plan, planner))


def completing(plan: MemoryPlan, planner: MemoryPlanner) -> Generator[MemoryPlan, None, MemoryPlan]:
    """Compute `completed`, yielding the plan as far as it is known after each piece."""
    for found in suggesting(plan, planner):
        if found is not None:
            plan = replace(plan, suggestions=found)
        yield plan
    if plan.budget is None:
        return plan
    budget, shape, share = plan.budget, plan.shape, plan.shape.trained / plan.shape.tokens
    for _ in planner.recording(shape, rough_share=share):
        yield plan

    def fits(sequences: int, tokens: int) -> bool:
        return sum(planner.peak(shape_with_share(sequences, tokens, share), rough_share=share).values()) <= budget

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


class _Change(NamedTuple):
    """A line to type, and how to plan the peak after that change; `saves` if no plan is needed."""

    line: str
    planner: Callable[[], MemoryPlanner]
    shape: BatchShape
    accumulates: bool | None = None
    saves: int | None = None


def suggesting(plan: MemoryPlan, planner: MemoryPlanner) -> Iterator[tuple[Suggestion, ...] | None]:
    """Find the changes that save most, most first. Yields None after each piece, and the suggestions so far."""
    found: list[Suggestion] = []
    for change in _changes(plan, planner):
        saves = change.saves
        try:
            if saves is None:
                of_change = change.planner()
                for _ in of_change.recording(change.shape):
                    yield None
                saves = plan.peak - sum(of_change.peak(change.shape, accumulates=change.accumulates).values())
        except (ConfigError, ModelError, ValueError):  # settings that do not go together, or no graph can be recorded
            continue
        if saves > _WORTH_SUGGESTING * plan.peak:
            found.append(Suggestion(change.line, saves))
        yield tuple(sorted(found, key=lambda one: -one.saves)[:_MOST_SUGGESTIONS])


def _changes(plan: MemoryPlan, planner: MemoryPlanner) -> Iterator[_Change]:
    """The changes that may need less memory."""
    config, shape, rows = planner.config, plan.shape, planner.config.batch_size

    def change(line: str, **changes: Any) -> _Change:
        return _Change(line, lambda: MemoryPlanner(planner.description, config.replace(**changes)), shape)

    if not config.grad_checkpoint:
        yield change("grad_checkpoint: true", grad_checkpoint=True)
    elif not config.efficient_long_context:
        yield change("efficient_long_context: true", efficient_long_context=True)
    if rows > 1 and not method_named(config.method).kind.sampled:
        steps = config.grad_accumulation_steps * rows
        alone = replace(shape, sequences=max(1, shape.sequences // rows))
        yield _Change(f"batch_size: 1, grad_accumulation_steps: {steps}", lambda: planner, alone, accumulates=True)
    if shape.tokens >= 2 * _STEP:
        half = replace(shape, tokens=shape.tokens // 2, trained=max(1, shape.trained // 2))
        yield _Change(f"max_seq_length: {half.tokens}", lambda: planner, half)
    if config.fine_tune_type == "full":
        yield change("fine_tune_type: lora", fine_tune_type="lora")
    elif config.lora_parameters.rank > (usual := LoraParameters().rank):
        lower = replace(config.lora_parameters, rank=usual)
        yield change(f"lora_parameters: {{rank: {usual}}}", lora_parameters=lower)
    if config.load_in_bits is None and not is_cpu() and config.fine_tune_type != "full":
        yield change("load_in_bits: 4", load_in_bits=4)
    if snapshots := plan.parts.get(SNAPSHOTS, 0):
        yield _Change("snapshot_memory: 0", lambda: planner, shape, saves=snapshots)


def refuse_beyond_budget(plan: MemoryPlan, planner: MemoryPlanner) -> None:
    """Raise OutOfMemory in one line, with suggestions, if the plan exceeds its budget."""
    if not plan.fits:
        found = [some for some in suggesting(plan, planner) if some is not None]
        raise OutOfMemory(replace(plan, suggestions=found[-1] if found else ()).refusal)
