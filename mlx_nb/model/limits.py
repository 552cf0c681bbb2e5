"""Finds the vocabulary and length limits of a model, by recording what reaches its embeddings for a few tokens.

An embedding that receives the token ids is a token embedding; one that receives consecutive numbers is a position
embedding. mlx is lazy, so nothing of the model is computed and no weight is read from disk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_nb.data.examples.limits import ModelLimits
from mlx_nb.errors import ModelError
from mlx_nb.model.unloaded import config_json_of, unloaded_model

_PROBE = (5, 2, 7, 3, 1)


class _Recorder(nn.Module):
    """An embedding that records the ids it receives, and never reads beyond its rows."""

    def __init__(self, table: nn.Module, record: Callable[[mx.array], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.table = table
        self._record = record

    def __call__(self, ids: mx.array, *arguments: Any, **named: Any) -> mx.array:
        self._record(ids)
        result: mx.array = self["table"](mx.clip(ids, 0, self["table"].weight.shape[0] - 1), *arguments, **named)
        return result

    def __getattr__(self, name: str) -> Any:
        if name in self or "table" not in self:
            return super().__getattr__(name)
        return getattr(self["table"], name)


def limits_of(model: nn.Module, description: Mapping[str, Any] | None = None) -> ModelLimits:
    """The limits of `model`; `description` is its config.json. The model is not changed."""
    tables = {path: module for path, module in model.named_modules() if _is_table(module)}
    probe = np.array(_PROBE)
    seen, logits = _ids_seen(model, tables, probe)
    rows = {path: tables[path].weight.shape[0] for path in tables}
    of_tokens = [path for path, ids in seen.items() if np.array_equal(ids, probe)]
    starts = {path: int(ids[0]) for path, ids in seen.items() if np.array_equal(ids - ids[0], np.arange(len(probe)))}
    if len({rows[path] for path in of_tokens}) > 1:
        # A table with fewer rows may be for some ids only; then other ids never reach it.
        largest = np.full(len(probe), max(rows[path] for path in of_tokens) - 1)
        reached, _ = _ids_seen(model, tables, largest)
        of_tokens = [path for path in of_tokens if path in reached and np.array_equal(reached[path], largest)]
    return ModelLimits(
        ids=min((rows[path] for path in of_tokens), default=None),
        targets=logits,
        positions=min((rows[path] - start for path, start in starts.items()), default=None),
        context=context_of(description or {}),
    )


def limits_by_name(model: str) -> ModelLimits:
    """The limits of a model, from its config.json; all None for one that cannot be opened. Reads no weights."""
    try:
        description = config_json_of(model)
        return limits_of(unloaded_model(description), description)
    except ModelError:
        return ModelLimits()


def context_of(description: Mapping[str, Any]) -> int | None:
    """The context length of a model in tokens, from its config.json, including rope scaling."""
    inner = description.get("text_config")
    if isinstance(inner, Mapping):
        return context_of({**inner, **{key: description[key] for key in ("rope_scaling",) if key in description}})
    length = description.get("max_position_embeddings")
    if not isinstance(length, int):
        return None
    scaling = description.get("rope_scaling") or description.get("rope_parameters")
    if not isinstance(scaling, Mapping) or not isinstance(factor := scaling.get("factor"), int | float):
        return length
    return max(length, int(factor * (scaling.get("original_max_position_embeddings") or length)))


def _is_table(module: nn.Module) -> bool:
    return hasattr(module, "as_linear") and "weight" in module


def _ids_seen(
    model: nn.Module, tables: Mapping[str, nn.Module], tokens: np.ndarray
) -> tuple[dict[str, np.ndarray], int | None]:
    """The ids that each table receives when the model reads `tokens`, and the number of logits."""
    seen: dict[str, np.ndarray] = {}
    logits: Any = None

    def recorder(path: str, table: nn.Module) -> _Recorder:
        def record(ids: mx.array) -> None:
            seen[path] = np.array(ids).reshape(-1)

        return _Recorder(table, record)

    recorders = {path: recorder(path, table) for path, table in tables.items()}
    # Errors of the model's code are ignored here; they are raised again when it is used.
    with _replaced(model, recorders, tables), contextlib.suppress(Exception):
        logits = model(mx.array(tokens[None]))
    return seen, logits.shape[-1] if isinstance(logits, mx.array) else None


@contextlib.contextmanager
def _replaced(model: nn.Module, modules: Mapping[str, nn.Module], before: Mapping[str, nn.Module]) -> Iterator[None]:
    try:
        model.update_modules(tree_unflatten(list(modules.items())))
        yield
    finally:
        model.update_modules(tree_unflatten(list(before.items())))
