"""The plan of the memory in the new-run form, made in pieces on the kernel's event loop while the form is used."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Mapping
from typing import Any

from mlx_nb.config.yaml_text import load_mapping
from mlx_nb.errors import MlxNbError, on_one_line
from mlx_nb.events import Progress
from mlx_nb.run.planning import plans_in_pieces
from mlx_nb.run.run import Run

Shown = Mapping[str, Any]  # state, verdict, and of a plan: sizes, limits, changes
# Fields that a plan does not depend on, besides through the rows that `data` names.
_WITHOUT_MEMORY = frozenset({"name", "learning_rate", "sample_prompts"})
SECONDS_OF_REST = 0.4  # after the last change, before the planning begins
_SECONDS_BETWEEN_PIECES = 0.001  # with 0, messages of the page would wait for three or four pieces
_NOT_HERE = "The plan follows when the model is here: it is downloaded by `Show the rows`, `%finetune plan` or the run."


def planned_from(given: Mapping[str, str]) -> dict[str, str]:
    """The typed values that a plan depends on."""
    return {name: text for name, text in given.items() if name not in _WITHOUT_MEMORY and text.strip()}


def shown_plans(run: Run) -> Generator[Shown, None, None]:
    """What the form shows while the plan of a run is made, and at its end."""
    shown: Shown = {"state": "planning", "verdict": "planning the memory …"}
    pieces = plans_in_pieces(run.inputs)
    try:
        while True:
            yield shown
            found = next(pieces)
            if isinstance(found, Progress):
                count = f" {found.done:,} of {found.total:,}" if found.total else ""
                shown = {"state": "planning", "verdict": f"{found.what}{count} …"}
            else:
                shown = _words_of(found)
    except StopIteration as end:
        yield {"state": "unknown", "verdict": _NOT_HERE} if end.value is None else _words_of(end.value, complete=True)
    except MlxNbError as error:
        yield {"state": "unknown", "verdict": str(error)}
    except Exception as error:  # the plan is only information, and model code may raise anything
        yield {"state": "unknown", "verdict": f"The memory could not be planned: {on_one_line(str(error))}"}


def _words_of(plan: Any, *, complete: bool = False) -> Shown:
    return {
        "state": "fits" if plan.fits else "too large",
        "verdict": plan.verdict,
        "sizes": [list(one) for one in plan.sizes],
        "changes": [[one.line, one.saving, _typed(one.line)] for one in plan.suggestions],
        "limits": [list(one) for one in plan.limits] if complete and plan.budget is not None else [],
        "complete": complete,
    }


def _typed(line: str) -> dict[str, str]:
    """The fields of the form that a line of settings fills."""
    typed: dict[str, str] = {}
    for name, value in load_mapping(f"{{{line}}}").values.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        typed |= {f"{name}.{key}" if key else name: _as_text(one) for key, one in inner}
    return typed


def _as_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


async def pump(shown: Callable[[], Generator[Shown, None, None]], show: Callable[[Shown], None]) -> None:
    """Show one plan after the other, letting the kernel do other work in between."""
    await asyncio.sleep(SECONDS_OF_REST)
    for one in shown():
        show(one)
        await asyncio.sleep(_SECONDS_BETWEEN_PIECES)
