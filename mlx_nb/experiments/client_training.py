"""Trains an adapter pass by pass and step by step, in the words of tinker."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlx_nb.config.run_config import RunConfig
from mlx_nb.errors import CheckpointError, CommandError
from mlx_nb.experiments.client_data import batch_of, output_of, refuse_empty, weights_of
from mlx_nb.experiments.client_losses import LINEAR, WEIGHTS, Loss, loss_named, objective_of
from mlx_nb.experiments.client_sampling import SamplingClient
from mlx_nb.experiments.client_types import (
    AdamParams,
    APIFuture,
    Datum,
    ForwardBackwardOutput,
    LoadWeightsResponse,
    OptimStepResponse,
    SaveWeightsResponse,
)
from mlx_nb.files.places import folder_of, run_folder, working_folder
from mlx_nb.files.whole_files import write_whole
from mlx_nb.model.adapters import attach_adapter
from mlx_nb.model.lanes import lane_count
from mlx_nb.model.logprobs import TargetScorer
from mlx_nb.model.randomness import random_stream, seed_for
from mlx_nb.model.trees import held_arrays
from mlx_nb.run.inputs import RunInputs
from mlx_nb.run.saved_model import SavedModel
from mlx_nb.train.optimizer import build_optimizer, gradient_norm, scalar
from mlx_nb.train.step import Stepper, evaluate_batch

_STATE, _ABOUT = "state.safetensors", "state.json"


class TrainingClient:
    """Trains one adapter: `forward_backward` adds up gradients, `optim_step` applies them.

    Losses are sums over target tokens, not means, as in tinker, so `weights` of 1 / (number of targets) make a mean.
    Everything is computed at the call. After an error nothing has changed.
    """

    def __init__(self, inputs: RunInputs, config: RunConfig) -> None:
        loaded = inputs.loaded
        self._inputs, self.config, self.model = inputs, config, loaded.model
        with random_stream(seed_for(config.seed, "adapter")):
            self._keys = attach_adapter(self.model, config)
            mx.eval(held_arrays(self.model))
        self.model.eval()
        self._scorer = TargetScorer(self.model)
        objective = objective_of(*loss_named("cross_entropy", None))
        self._stepper = Stepper(
            self.model, build_optimizer(config), objective, self._scorer, compiled=False, lanes=lane_count()
        )
        self._gradients: Any = None
        self._steps = 0

    def result(self, timeout: float | None = None) -> TrainingClient:
        """Itself, because creating it has waited already."""
        return self

    def __await__(self) -> Generator[Any, None, TrainingClient]:
        return APIFuture(self).__await__()

    def get_tokenizer(self) -> Any:
        """The tokenizer of the base, as transformers has it."""
        return self._inputs.tokenizer

    def weights(self) -> dict[str, mx.array]:
        """The weights of the adapter by name, as they are now."""
        return self._stepper.arrays()["parameters"]

    # Passes

    def forward(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, Any] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """The loss and the log-probability of every target, without gradients. Raises CommandError."""
        refuse_empty(data)
        loss, options = loss_named(loss_fn, loss_fn_config)
        return APIFuture(self._forward(data, loss, options))

    def _forward(self, data: Sequence[Datum], loss: Loss, options: Mapping[str, float]) -> ForwardBackwardOutput:
        batch = batch_of(data, loss, range(len(data)), everywhere=True)
        found = evaluate_batch(objective_of(loss, options), self._scorer, batch, lane_count())
        return output_of(data, batch, range(len(data)), found.row_losses, found.total)

    def forward_backward(
        self, data: Sequence[Datum], loss_fn: str, loss_fn_config: Mapping[str, Any] | None = None
    ) -> APIFuture[ForwardBackwardOutput]:
        """Add the gradient of the summed loss to those since the last `optim_step`. Raises CommandError.

        `loss_fn` is cross_entropy, importance_sampling, ppo, cispo or dro. Targets whose weight is 0 are not computed;
        their log-probability is given as 0.
        """
        refuse_empty(data)
        loss, options = loss_named(loss_fn, loss_fn_config)
        return APIFuture(self._forward_backward(data, loss, options))

    def _forward_backward(
        self, data: Sequence[Datum], loss: Loss, options: Mapping[str, float]
    ) -> ForwardBackwardOutput:
        used = [place for place, datum in enumerate(data) if weights_of(datum).any()]
        if not used:
            raise CommandError("no target has a weight, so there is nothing to learn.")
        batch = batch_of(data, loss, used)
        self._stepper.objective = objective_of(loss, options)
        found = self._stepper.summed_gradients([batch], seed_for(self.config.seed, "dropout", self._steps))
        before = self._gradients
        self._gradients = found.gradients if before is None else tree_map(mx.add, before, found.gradients)
        mx.eval(self._gradients)
        return output_of(data, batch, used, found.row_losses, found.loss)

    def forward_backward_custom(
        self,
        data: Sequence[Datum],
        loss_fn: Callable[[Sequence[Datum], list[mx.array]], tuple[mx.array, dict[str, Any]]],
    ) -> APIFuture[ForwardBackwardOutput]:
        """`forward_backward` with a function `(data, logprobs) -> (loss, metrics)`, by one more forward pass.

        `logprobs` has an mlx array for each datum, and the loss is computed from it with `mlx.core`.
        """
        refuse_empty(data)
        outputs = self._forward(data, *loss_named("cross_entropy", None)).loss_fn_outputs
        there = [mx.array(one["logprobs"].to_numpy()) for one in outputs]
        value, metrics = loss_fn(data, there)
        slopes = mx.grad(lambda logprobs: loss_fn(data, logprobs)[0])(there)
        sloped = [
            Datum(one.model_input, {**one.loss_fn_inputs, WEIGHTS: np.ones(len(slope)), "slopes": np.array(slope)})
            for one, slope in zip(data, slopes)
        ]
        outputs = self._forward_backward(sloped, LINEAR, {}).loss_fn_outputs
        numbers = {"loss:sum": scalar(value), **{name: float(number) for name, number in metrics.items()}}
        return APIFuture(ForwardBackwardOutput("ArrayRecord", outputs, numbers))

    def optim_step(
        self, optim_params: AdamParams | None = None, *, adam_params: AdamParams | None = None
    ) -> APIFuture[OptimStepResponse]:
        """Apply the gradients since the last step with AdamW. Raises CommandError if there are none.

        `adam_params` is another name of `optim_params`, as in tinker.
        """
        if self._gradients is None:
            raise CommandError("there are no gradients. Call forward_backward before optim_step.")
        params = optim_params or adam_params or AdamParams()
        optimizer: Any = self._stepper.optimizer
        optimizer.betas, optimizer.eps = [params.beta1, params.beta2], params.eps
        optimizer.weight_decay = params.weight_decay
        norm = gradient_norm(self._gradients)
        self._stepper.apply(
            self._gradients, norm, learning_rate=params.learning_rate, grad_clip=params.grad_clip_norm or None
        )
        self._gradients = None
        self._steps += 1
        return APIFuture(OptimStepResponse({"grad_norm": scalar(norm)}))

    # Saving

    def save_state(self, name: str, overwrite: bool = False) -> APIFuture[SaveWeightsResponse]:
        """Save weights and optimizer to a folder: `name` is a path, or a name in adapters/.

        Raises CheckpointError if it is there already, unless `overwrite`.
        """
        folder = state_folder(name)
        if (folder / _ABOUT).exists() and not overwrite:
            raise CheckpointError(f"{folder} has a state already. Give another name, or overwrite=True.")
        folder.mkdir(parents=True, exist_ok=True)
        arrays = self._stepper.arrays()
        flat = {f"{group}/{key}": array for group, named in arrays.items() for key, array in named.items()}
        about = {"settings": self.config.changed(), "steps": self._steps}
        write_whole(folder / _STATE, lambda file: mx.save_safetensors(file, flat))
        write_whole(folder / _ABOUT, lambda file: file.write(json.dumps(about).encode()))
        return APIFuture(SaveWeightsResponse(str(folder)))

    def load_state(self, path: str) -> APIFuture[LoadWeightsResponse]:
        """Load the weights of a saved state; the optimizer stays as it is. Raises CheckpointError."""
        return self._load(path, optimizer=False)

    def load_state_with_optimizer(self, path: str) -> APIFuture[LoadWeightsResponse]:
        """Load the weights and the optimizer of a saved state. Raises CheckpointError."""
        return self._load(path, optimizer=True)

    def _load(self, path: str, *, optimizer: bool) -> APIFuture[LoadWeightsResponse]:
        folder = state_folder(path)
        about = about_state(folder)
        groups: dict[str, dict[str, mx.array]] = {"parameters": {}, "optimizer": {}}
        try:
            loaded: Any = mx.load(str(folder / _STATE))
        except Exception as error:
            raise CheckpointError(f"{folder / _STATE} cannot be read: {error}") from None
        for key, array in loaded.items():
            group, _, name = key.partition("/")
            groups[group][name] = array
        self._stepper.refuse_mismatch(about["steps"], groups["parameters"], groups["optimizer"])
        kept = groups["optimizer"] if optimizer else self._stepper.arrays()["optimizer"]
        self._stepper.restore(groups["parameters"], kept)
        self._gradients = None
        self._steps = about["steps"] if optimizer else self._steps
        return APIFuture(LoadWeightsResponse(str(folder)))

    def save_weights_for_sampler(self, name: str) -> APIFuture[SaveWeightsResponse]:
        """Save the adapter in mlx-lm's format to a folder, for `mlx_nb.load` and mlx-lm. Raises FolderError."""
        saved = SavedModel(self._inputs, self._keys, None, self._steps)
        saved.config = self.config
        return APIFuture(SaveWeightsResponse(str(saved.save(state_folder(name)))))

    def save_weights_and_get_sampling_client(self, name: str | None = None) -> SamplingClient:
        """A client that samples from the weights as they are now, whatever is trained later. Writes nothing."""
        shared = {id(array): array for array in held_arrays(self.model)}
        return SamplingClient(copy.deepcopy(self.model, shared), self._inputs.tokenizer)


def state_folder(name: str | Path) -> Path:
    """The folder that a name or path of a state means."""
    return folder_of(str(name), working_folder()) if "/" in str(name) else run_folder(str(name), working_folder())


def about_state(folder: Path) -> dict[str, Any]:
    """What is recorded about a saved state. Raises CheckpointError if there is none."""
    try:
        found = json.loads((folder / _ABOUT).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no saved state ({error}). `save_state` returns its path.") from None
    if not isinstance(found, dict) or not {"settings", "steps"} <= found.keys():
        raise CheckpointError(f"{folder / _ABOUT} is not of a saved state.")
    return found
