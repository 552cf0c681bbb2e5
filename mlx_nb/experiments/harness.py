"""Runs tasks of lm-evaluation-harness on a run or a saved adapter, through mlx-lm's own evaluator."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from mlx_nb.errors import CommandError, shown
from mlx_nb.model.randomness import random_stream
from mlx_nb.run.run import Run
from mlx_nb.run.saved_model import SavedModel, load

_MISSING = "lm-evaluation-harness is missing. Run: pip install 'mlx-nb[harness]'"
_SEED = 123  # that of mlx_lm.evaluate
_NORMAL = 1.959964  # 97.5% quantile


@dataclass(frozen=True, eq=False)
class HarnessResults:
    """What lm-evaluation-harness measured.

    name     of the run or adapter
    results  {task: {"acc,none": value, "acc_stderr,none": standard error, ...}}, as the harness gives them
    """

    name: str
    results: Mapping[str, Mapping[str, Any]]

    @property
    def table(self) -> list[tuple[str, str, float, float | None]]:
        """(task, metric, value, standard error or None) of each number."""
        lines = []
        for task, numbers in self.results.items():
            for key, value in numbers.items():
                metric, _, filtered = key.partition(",")
                if not isinstance(value, float | int) or not filtered or metric.endswith("_stderr"):
                    continue
                error = numbers.get(f"{metric}_stderr,{filtered}")
                words = metric if filtered == "none" else f"{metric} ({filtered})"
                lines.append((task, words, float(value), float(error) if isinstance(error, float | int) else None))
        return lines

    def __repr__(self) -> str:
        lines = [f"{self.name}, lm-evaluation-harness"]
        for task, metric, value, error in self.table:
            interval = (
                ""
                if error is None
                else f"   95% interval {value - _NORMAL * error:.4f} to {value + _NORMAL * error:.4f}"
            )
            lines.append(f"  {task:<24} {metric:<20} {value:.4f}{interval}")
        return "\n".join(lines)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": repr(self), "text/html": f"<pre>{escape(repr(self))}</pre>"}


def lm_eval(
    model: Run | SavedModel | str | Path,
    tasks: str | Sequence[str],
    *,
    base: bool = False,
    num_fewshot: int | None = None,
    limit: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 8,
    chat_template: bool | None = None,
    include_path: str | Path | None = None,
) -> HarnessResults:
    """Measure tasks of lm-evaluation-harness: `mlx_nb.lm_eval(run, "arc_easy", limit=100)`.

    `model` is a run, what `mlx_nb.load` gave, or the folder of an adapter; `base` measures without the adapter. The
    numbers are those of `mlx_lm.evaluate` with the same arguments on the same weights: greedy, seed 123, with the chat
    template if the model has one and prompts are not raw text, unless `chat_template` says otherwise. `include_path` is
    a folder with tasks of your own. Nothing of the run and no random stream is changed. Raises CommandError if the
    harness is not installed, or for an unknown task. Tasks of the harness are downloaded from the hub.
    """
    if not isinstance(model, Run | SavedModel | str | Path):
        raise CommandError(f"lm_eval takes a run, a loaded adapter or its folder, not {shown(model)}.")
    try:
        import lm_eval as harness
        from lm_eval.tasks import TaskManager
        from mlx_lm.evaluate import MLXLM
        from mlx_lm.sample_utils import make_sampler
    except ImportError as error:
        raise CommandError(f"{_MISSING} ({error})") from None

    names = [tasks] if isinstance(tasks, str) else list(tasks)
    path = None if include_path is None else str(include_path)
    # To read the harness's own thousands of tasks takes much longer than one of the person's.
    managers = [TaskManager(include_path=path, include_defaults=False)] if path is not None else []
    if not managers or any(not managers[0].match_tasks([name]) for name in names):
        managers.append(TaskManager(include_path=path))
    manager = managers[-1]
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise CommandError(f"lm-evaluation-harness has no task {unknown[0]!r}. `lm_eval ls tasks` lists them.")

    class LiveModel(MLXLM):
        """mlx-lm's evaluator on a model in memory."""

        def __init__(self, model: Any, tokenizer: Any, use_chat_template: bool) -> None:
            super(MLXLM, self).__init__()
            self._model, self.tokenizer = model, tokenizer
            self._max_tokens, self._batch_size = max_tokens, batch_size
            self.use_chat_template = use_chat_template
            self._sampler = make_sampler(temp=0.0)

    with _measured(model, base) as (name, live, tokenizer, has_chat):
        use_chat = has_chat if chat_template is None else chat_template
        found = harness.simple_evaluate(
            model=LiveModel(live, tokenizer, use_chat),
            tasks=manager.match_tasks(names),
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=use_chat,
            random_seed=_SEED,
            numpy_random_seed=_SEED,
            torch_random_seed=_SEED,
            fewshot_random_seed=_SEED,
        )
    return HarnessResults(name, found["results"])


@contextmanager
def _measured(model: Run | SavedModel | str | Path, base: bool) -> Iterator[tuple[str, Any, Any, bool]]:
    """(name, mlx model in evaluation mode, tokenizer, whether it is asked through its chat template) of a model.

    Python's, numpy's and mlx's random streams are restored.
    """
    if isinstance(model, str | Path):
        model = load(model)
    if base and model.config.fine_tune_type == "full":
        raise CommandError("full fine-tuning changes the base itself, so there is no base left to measure.")
    before = random.getstate(), np.random.get_state()
    try:
        with random_stream(_SEED):
            if isinstance(model, SavedModel):
                yield _parts(repr(model), model, base)
            else:
                _ = model.trainer
                with model.turns.turn():
                    yield _parts(model.name, model, base)
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def _parts(name: str, model: Run | SavedModel, base: bool) -> tuple[str, Any, Any, bool]:
    inputs = model.inputs
    live = inputs.base_model if base else model.model
    live.eval()
    tokenizer = model.tokenizer
    has_chat = tokenizer.chat_template is not None and not inputs.prompt_rendering.is_raw(tokenizer)
    return f"{name}, base" if base else name, live, tokenizer, has_chat
