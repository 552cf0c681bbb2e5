"""Tries a gradient on a few random tokens before training, so that unsupported models fail early with a clear error."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_unflatten

from mlx_nb.config.run_config import RunConfig
from mlx_nb.errors import MlxNbError, ModelError, and_more
from mlx_nb.events import Progress
from mlx_nb.model.adapters import attach_adapter
from mlx_nb.model.backend import one_blas_thread
from mlx_nb.model.cpu_kernels import kernels_are_verified
from mlx_nb.model.layer_checkpoints import refuse_unverified_checkpoints
from mlx_nb.model.loading import LoadedModel
from mlx_nb.model.memory import is_out_of_memory
from mlx_nb.model.once_per_model import once_per_model, trained_shapes
from mlx_nb.model.packing import packing_is_verified
from mlx_nb.model.passes import family_of, is_half, one_line, random_tokens
from mlx_nb.model.randomness import random_stream
from mlx_nb.model.recomputing import recomputed_by
from mlx_nb.model.shared_base import shared_copy
from mlx_nb.model.token_chunks import refuse_unverified_chunks
from mlx_nb.model.trees import named_arrays
from mlx_nb.process.pieces import finished

_ROWS, _TOKENS = 2, 8
# More tokens are needed for experts, which have no gradient if no token is routed to them.
_MORE_DRAWS, _MORE_TOKENS = 4, 32
_MOST_NAMES = 3
# The endings of adapter tensor names that mlx-lm's loader accepts.
_READ_BY_MLX_LM = ("lora_a", "lora_b", "m")


def training_notes(
    loaded: LoadedModel, config: RunConfig, check_size: Callable[[nn.Module, RunConfig], None]
) -> list[str]:
    """Notes about training this model, from trials on a copy that shares its arrays.

    `check_size` raises for an adapter that is too large to train, before it is computed. Raises ModelError for a family
    that cannot be trained with these settings.
    """
    return finished(training_notes_in_pieces(loaded, config, check_size))


def training_notes_in_pieces(
    loaded: LoadedModel, config: RunConfig, check_size: Callable[[nn.Module, RunConfig], None]
) -> Generator[Progress, None, list[str]]:
    """`training_notes` in pieces, yielding Progress before each trial."""
    kind = {"lora": "LoRA", "dora": "DoRA", "full": "fine_tune_type: full"}[config.fine_tune_type]

    def refuse(reason: str) -> ModelError:
        return _refusal(loaded.model, kind, reason)

    with _trial(refuse):
        model = shared_copy(loaded).model
        attach_adapter(model, config)
        check_size(model, config)
        if not named_arrays(model.trainable_parameters()):
            raise ModelError(f"{family_of(model)} has no module that mlx-lm can adapt. Choose another model.")
    packed = False
    if config.packing is not False:
        yield _trying("faster attention")
        with _trial(refuse):
            kernels_are_verified(model)
        yield _trying("packed rows")
        with _trial(refuse):
            packed = packing_is_verified(model)
    if config.packing is True and not packed:
        raise ModelError(
            f"packing cannot be used with {family_of(model)}: packed rows do not give the same loss and "
            "gradient as separate rows. Set packing: auto."
        )
    yield _trying("a gradient")
    with _trial(refuse):
        idle = _without_gradient(model, trained_shapes(model))
        recomputed = recomputed_by(config)
        if recomputed.segment:
            refuse_unverified_checkpoints(model, recomputed)
        if recomputed.tokens:
            refuse_unverified_chunks(model)
        if config.fine_tune_type == "full" and _keeps_weights(model, trained_shapes(model)):
            raise refuse("in evaluation it uses weights that it cached before an update")
    names = [name for name, _ in named_arrays(model.trainable_parameters())]
    if len(idle) == len(names):
        raise refuse("no trained parameter has a gradient")
    notes = []
    if config.packing is not False and not packed:
        notes.append(
            f"{family_of(model)}: rows are not packed, because packed rows do not give the same loss as separate rows."
        )
    if idle:
        notes.append(
            f"{len(idle)} of {len(names)} trained tensors never get a gradient in {family_of(model)} and do not "
            f"change: {and_more(idle, _MOST_NAMES)}."
        )
    foreign = [name for name in names if name.rsplit(".", 1)[-1] not in _READ_BY_MLX_LM]
    if foreign and config.fine_tune_type != "full":
        notes.append(
            f"mlx_lm.load cannot read this adapter: for {family_of(model)} it does not know "
            f"{and_more(foreign, _MOST_NAMES)}. mlx_nb can train, resume and load it."
        )
    return notes


def _trying(what: str) -> Progress:
    return Progress(0, f"loading {what}, tried on a few tokens", 0, 0)


@contextmanager
def _trial(refuse: Callable[[str], ModelError]) -> Iterator[None]:
    """A context for one trial, with its own random stream. An error of the model code becomes a refusal."""
    try:
        # More threads are not faster here, and slower when other programs run.
        with random_stream(0), one_blas_thread():
            yield
    except MlxNbError:
        raise
    except Exception as error:  # model code may raise anything
        if is_out_of_memory(error):
            raise
        raise refuse(one_line(error).rstrip(".")) from error


def _refusal(model: nn.Module, kind: str, reason: str) -> ModelError:
    advice = "another model" if kind.startswith("fine") else "another model, or other modules (lora_parameters.keys)"
    return ModelError(f"{family_of(model)} cannot be trained by {kind} with this mlx-lm: {reason}. Choose {advice}.")


@once_per_model(good=lambda idle: not idle, from_json=list)
def _without_gradient(model: nn.Module, _trained: tuple[Any, ...]) -> list[str]:
    """The names of trained arrays whose gradient is 0 on every draw of tokens."""
    parameters = model.trainable_parameters()
    # A new adapter has one factor of zeros, which hides the gradient of the other factor.
    perturbed = tree_map(lambda array: array if mx.any(array).item() else array + _small_noise(array), parameters)
    model.train()
    idle = _idle_on(model, perturbed, _TOKENS, 0)
    for draw in range(1, _MORE_DRAWS + 1):
        if not idle:
            break
        now = set(_idle_on(model, perturbed, _MORE_TOKENS, draw))
        idle = [name for name in idle if name in now]
    return idle


@once_per_model(good=lambda kept: not kept, from_json=bool)
def _keeps_weights(model: nn.Module, _trained: tuple[Any, ...]) -> bool:
    """Whether logits depend on the values that vectors (norms, biases) had in an earlier pass in training mode."""
    tokens = mx.array([random_tokens(model, _TOKENS, 0)])
    vectors = [(name, array) for name, array in named_arrays(model.trainable_parameters()) if array.ndim == 1]

    def logits(*, training: bool, factor: float) -> mx.array:
        model.train(training)
        model.update(tree_unflatten([(name, array * factor) for name, array in vectors]))
        result: mx.array = model(tokens)
        mx.eval(result)
        return result

    expected = logits(training=True, factor=1.0)
    logits(training=True, factor=2.0)
    found = logits(training=False, factor=1.0)
    most = (1e-3, 0.05)[is_half(model)] * mx.abs(expected).max()
    return bool((mx.abs(found - expected).max() > most).item())


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
    return [name for name, is_nonzero, _ in facts if not is_nonzero.item()]
