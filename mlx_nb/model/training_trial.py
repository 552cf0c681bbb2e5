"""A gradient on a few random tokens before anything is trained: what fails does so here, in one line and by name."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_nb.config.run_config import RunConfig
from mlx_nb.errors import MlxNbError, ModelError, and_more
from mlx_nb.model.adapters import attach_adapter
from mlx_nb.model.loading import LoadedModel
from mlx_nb.model.memory import is_out_of_memory
from mlx_nb.model.passes import family_of, is_half, one_line, random_tokens
from mlx_nb.model.randomness import random_stream
from mlx_nb.model.shared_base import twin
from mlx_nb.model.trees import named_arrays

_ROWS, _TOKENS = 2, 8
# An expert that none of a few tokens is sent to has no gradient either.
_MORE_DRAWS, _MORE_TOKENS = 4, 32
_MOST_NAMES = 3


def training_notes(loaded: LoadedModel, config: RunConfig) -> list[str]:
    """What a person should know of the training of this model, tried on a twin that shares its arrays.

    Raises ModelError for a family that cannot be trained in this way.
    """
    kind = {"lora": "LoRA", "dora": "DoRA", "full": "fine_tune_type: full"}[config.fine_tune_type]
    try:
        with random_stream(0):
            model = twin(loaded).model
            attach_adapter(model, config)
            if not named_arrays(model.trainable_parameters()):
                raise ModelError(f"{family_of(model)} has no module that mlx-lm can adapt. Choose another model.")
            idle = _without_gradient(model)
    except MlxNbError:
        raise
    except Exception as error:  # whatever a family's own code raises
        if is_out_of_memory(error):
            raise
        raise _refusal(loaded.model, kind, one_line(error).rstrip(".")) from error
    if not idle:
        return []
    count = len(named_arrays(model.trainable_parameters()))
    if len(idle) == count:
        raise _refusal(loaded.model, kind, "nothing that would be trained has a gradient")
    return [
        f"{len(idle)} of {count} trained tensors never get a gradient in {family_of(model)}, and stay as they are: "
        f"{and_more(idle, _MOST_NAMES)}."
    ]


def _refusal(model: nn.Module, kind: str, reason: str) -> ModelError:
    advice = "another model" if kind.startswith("fine") else "another model, or other modules (lora_parameters.keys)"
    return ModelError(f"{family_of(model)} cannot be trained by {kind} with this mlx-lm: {reason}. Choose {advice}.")


def _without_gradient(model: nn.Module) -> list[str]:
    """Names of the trained arrays whose gradient is 0 on every draw of tokens."""
    parameters = model.trainable_parameters()
    # An adapter begins with a factor of zeros, which hides the gradient of the other.
    moved = tree_map(lambda array: array if mx.any(array).item() else array + _small_noise(array), parameters)
    model.train()
    idle = _idle_on(model, moved, _TOKENS, 0)
    for draw in range(1, _MORE_DRAWS + 1):
        if not idle:
            break
        now = set(_idle_on(model, moved, _MORE_TOKENS, draw))
        idle = [name for name in idle if name in now]
    return idle


def _small_noise(array: mx.array) -> mx.array:
    return 0.02 * mx.random.normal(array.shape).astype(array.dtype)


def _idle_on(model: nn.Module, parameters: Any, length: int, draw: int) -> list[str]:
    tokens_BT = mx.array([random_tokens(model, length, _ROWS * draw + row) for row in range(_ROWS)])

    def loss(parameters: Any) -> mx.array:
        model.update(parameters)
        return nn.losses.cross_entropy(model(tokens_BT[:, :-1]).astype(mx.float32), tokens_BT[:, 1:]).mean()

    _, gradients = mx.value_and_grad(loss)(parameters)
    arrays = named_arrays(gradients)
    facts = [(name, mx.any(array != 0), mx.all(mx.isfinite(array))) for name, array in arrays]
    mx.eval([fact for _, *both in facts for fact in both])
    if not is_half(model) and (bad := [name for name, _, finite in facts if not finite.item()]):
        raise ValueError(f"the gradient of {and_more(bad, _MOST_NAMES)} is not finite")
    return [name for name, moves, _ in facts if not moves.item()]
