"""The data of the low-level client as batches, and the log-probabilities of a batch as outputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_nb.data.examples.batches import TokenBatch, pad
from mlx_nb.data.examples.imitation import TokenizedExample
from mlx_nb.errors import CommandError
from mlx_nb.experiments.client_losses import WEIGHTS, Loss
from mlx_nb.experiments.client_types import Datum, ForwardBackwardOutput, TensorData


def refuse_empty(data: Sequence[Datum]) -> None:
    """Raise CommandError if there are no data."""
    if not data:
        raise CommandError("there are no data. Give a list with at least one Datum.")


def weights_of(datum: Datum) -> np.ndarray:
    """(N,) weight of each target, 1 unless given."""
    given = datum.loss_fn_inputs.get(WEIGHTS)
    return np.ones(datum.model_input.length, np.float32) if given is None else given.to_numpy().astype(np.float32)


def batch_of(data: Sequence[Datum], loss: Loss, places: Sequence[int], *, everywhere: bool = False) -> TokenBatch:
    """The data at `places` as one padded batch; with `everywhere` each target counts, whatever its weight.

    Raises CommandError, with the number of the datum, for one that cannot be computed.
    """
    examples, values = [], []
    for place in places:
        inputs, length = data[place].loss_fn_inputs, data[place].model_input.length
        for name in ("target_tokens", *loss.needs):
            if name not in inputs:
                raise CommandError(f"datum {place}: this loss needs {name!r} in loss_fn_inputs.")
        for name in ("target_tokens", WEIGHTS, *loss.needs):
            if name in inputs and len(inputs[name]) != length:
                raise CommandError(
                    f"datum {place}: {name} has {len(inputs[name])} numbers, and model_input {length} tokens."
                )
        tokens = np.asarray(data[place].model_input.to_ints(), np.int32)
        targets = inputs["target_tokens"].to_numpy().astype(np.int32)
        if not np.array_equal(targets[:-1], tokens[1:]):
            raise CommandError(f"datum {place}: target_tokens must be the tokens that follow those of model_input.")
        mask = np.ones(length, np.float32) if everywhere else weights_of(data[place])
        examples.append(
            TokenizedExample(np.append(tokens, targets[-1]), np.concatenate([[np.float32(0)], mask]), row=place)
        )
        values.append({name: inputs[name].to_numpy().astype(np.float32) for name in loss.needs})
    batch = pad(examples)
    by_name = {name: np.zeros(batch.tokens_BT.shape, np.float32) for name in loss.needs}
    for line, one in enumerate(values):
        for name, numbers in one.items():
            by_name[name][line, 1 : len(numbers) + 1] = numbers
    return batch._replace(token_values=by_name)


def output_of(
    data: Sequence[Datum], batch: TokenBatch, places: Sequence[int], logprobs: Sequence[float], total: float
) -> ForwardBackwardOutput:
    """The log-probabilities of the targets in the batch, in their places; 0 elsewhere."""
    found = [np.zeros(datum.model_input.length, np.float32) for datum in data]
    for line, column, logprob in zip(*np.nonzero(batch.loss_mask_BT[:, 1:]), logprobs):
        found[places[line]][column] = logprob
    outputs = [{"logprobs": TensorData.from_numpy(one)} for one in found]
    return ForwardBackwardOutput("ArrayRecord", outputs, {"loss:sum": total})
