"""Plans the memory of a run from its settings and the model's config.json, and refuses one that cannot fit."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

from mlx_nb.config.memory_limit import AUTO, OFF
from mlx_nb.data.sources.splits import is_local
from mlx_nb.errors import CommandError, ModelError
from mlx_nb.events import Event, Progress
from mlx_nb.process.pieces import on_thread, relayed
from mlx_nb.run.inputs import RunInputs

if TYPE_CHECKING:
    from mlx_nb.train.memory_plan import MemoryPlan
    from mlx_nb.train.time_probe import Pace
    from mlx_nb.train.trainer import Trainer

_WORTH_A_NOTE = 10**9  # bytes; below, or below a quarter of the limit, a plan takes longer than it is worth


def plan_of(inputs: RunInputs, memory: str | None, seconds: float | None) -> MemoryPlan:
    """The whole plan of a run. `memory` replaces `memory_limit`. Loads no weights.

    The largest batch is that of the rows if they are tokenized already, otherwise the largest that the settings allow.
    """
    from mlx_nb.train.memory_advice import completed
    from mlx_nb.train.memory_plan import MemoryPlanner, full_shape, planned, shape_of

    config = inputs.config
    known = inputs.examples.train if "examples" in inputs.__dict__ else []
    shape = shape_of(config, known) if known else full_shape(config)
    planner = MemoryPlanner(inputs.description, config)
    return completed(planned(config.model, planner, shape, _budget(inputs, memory), seconds), planner)


def plans_in_pieces(inputs: RunInputs) -> Generator[Progress | MemoryPlan, None, MemoryPlan | None]:
    """`plan_of` for a notebook that stays responsive: yields Progress and, as soon as possible, incomplete plans.

    Local rows of a local model are tokenized first, because most rows are shorter than `max_seq_length` allows.
    Downloads at most the config.json of a hub model. The result is None if even that is not here yet.
    """
    from mlx_nb.model.mlx_lm_import import import_mlx_lm
    from mlx_nb.model.model_source import is_at_hand, is_hub_id, model_named

    config, model = inputs.config, model_named(inputs.config)
    at_hand = is_at_hand(model)
    if not at_hand and not is_hub_id(model):
        return None
    yield from _on_thread("loading mlx_lm", import_mlx_lm)
    from mlx_nb.train.memory_advice import completing
    from mlx_nb.train.memory_plan import MemoryPlanner, full_shape, planned, shape_of

    yield from _on_thread("reading config.json", lambda: inputs.description)
    shape = full_shape(config)
    if at_hand and is_local(config.data, inputs.namespace, config.working_folder):
        yield from _on_thread("loading the tokenizer", lambda: inputs.tokenizer)
        yield from tokenizing(inputs)
        shape = shape_of(config, inputs.examples.train)
    planner = MemoryPlanner(inputs.description, config)
    for _ in planner.recording(shape):
        yield Progress(0, "planning the memory", 0, 0)
    plan = planned(config.model, planner, shape, _budget(inputs))
    yield plan
    return (yield from completing(plan, planner))


def _on_thread(words: str, function: Callable[[], object]) -> Iterator[Progress]:
    yield from relayed(on_thread(function), lambda _: Progress(0, words, 0, 0))


def pace_of(trainer: Trainer, notify: Callable[[Event], None]) -> Pace:
    """The measured pace of a run's next updates, which are undone. SIGINT is raised once everything is restored."""
    from mlx_nb.train.interrupts import Interrupts
    from mlx_nb.train.shared_work import Aborted
    from mlx_nb.train.time_probe import PROBED_UPDATES, measured_pace

    if trainer.rollouts is not None:
        raise CommandError(
            "the time of updates is measured on rows, and the method samples completions. `%finetune step` shows it."
        )

    def done(number: int) -> None:
        notify(Progress(trainer.state.step, "updates to time", number, PROBED_UPDATES))

    with Interrupts(lambda pause: None) as interrupts:
        try:
            return measured_pace(trainer, lambda: interrupts.count > 0, done)
        except Aborted:
            pass
    raise KeyboardInterrupt


def _budget(inputs: RunInputs, memory: str | None = None) -> int | None:
    from mlx_nb.train.memory_guard import memory_in_reach
    from mlx_nb.train.memory_plan import budget_of

    limit = inputs.config.memory_limit if memory is None else memory
    return budget_of(AUTO if limit == OFF and memory is not None else limit, memory_in_reach)


def refusing_what_cannot_fit(inputs: RunInputs) -> Generator[Progress, None, None]:
    """Raise OutOfMemory if the plan of the run exceeds `memory_limit`, before any weight is read. Yields Progress.

    A rough estimate comes first; rows are tokenized only if it leaves a doubt, and then the plan is made for them.
    """
    from mlx_nb.model.loading import fetched_folder
    from mlx_nb.model.model_source import model_named
    from mlx_nb.train.memory_advice import refuse_beyond_budget
    from mlx_nb.train.memory_plan import MemoryPlanner, full_shape, planned, rough_peak, shape_of

    config, budget = inputs.config, _budget(inputs)
    if budget is None or "loaded" in inputs.__dict__:
        return
    rough = rough_peak(inputs.description, config, full_shape(config))
    if rough is not None and rough <= budget:
        return
    yield from fetched_folder(model_named(config))
    yield from tokenizing(inputs)
    shape = shape_of(config, inputs.examples.train)
    rough = rough_peak(inputs.description, config, shape)
    if rough is not None and rough <= budget:
        return
    yield Progress(0, "loading a plan of the memory", 0, 0)
    try:
        planner = MemoryPlanner(inputs.description, config)
        inputs.memory_plan = planned(config.model, planner, shape, budget)
    except Exception:  # model code may raise anything; a note will say so, and other checks of memory remain
        return
    refuse_beyond_budget(inputs.memory_plan, planner)


def tokenizing(inputs: RunInputs) -> Iterator[Progress]:
    """Tokenize the rows, yielding Progress. Their source may run user code, which a pause interrupts."""
    pieces = inputs.tokenizing()
    while True:
        with inputs.reading:
            progress = next(pieces, None)
        if progress is None:
            return
        yield progress


def description_if_known(inputs: RunInputs) -> dict[str, Any] | None:
    """The config.json of the model; None if it cannot be read."""
    try:
        return inputs.description
    except ModelError:
        return None


def plan_notes(inputs: RunInputs) -> list[str]:
    """A line about the planned memory; none for a run that needs little, or whose model cannot be planned."""
    from mlx_nb.train.memory_plan import MemoryPlanner, planned, rough_peak, shape_of

    config, rows = inputs.config, inputs.examples.train
    if config.memory_limit == OFF or not rows:
        return []
    try:
        shape = shape_of(config, rows)
        rough = rough_peak(inputs.description, config, shape)
        if rough is not None and rough < max(_WORTH_A_NOTE, (_budget(inputs) or 0) // 4):
            return []
        plan = inputs.memory_plan
        if plan is None or plan.shape != shape:
            plan = planned(config.model, MemoryPlanner(inputs.description, config), shape, _budget(inputs))
    except Exception as error:  # the plan is only information, and model code may raise anything
        return [f"The memory of this run could not be planned ({_one_line(error)})."]
    return [plan.note]


def _one_line(error: Any) -> str:
    from mlx_nb.model.model_source import one_line

    return one_line(error)
