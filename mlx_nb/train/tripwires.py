"""What an update must not be: not a number, a loss far above those before it, or too large. Pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from mlx_nb.data.batches import TokenBatch
from mlx_nb.errors import LossSpike, NonFiniteLoss, OutOfMemory, TrainingError
from mlx_nb.model.memory import is_out_of_memory

RECENT_LOSSES = 32  # updates that a loss is compared with
FEWEST_LOSSES = 8  # before so many there is nothing to compare with
SMALLEST_DEVIATION = 0.1  # nats; a run whose loss hardly moves is not stopped by a small bump
DEVIATIONS_PER_MAD = 1.4826  # of a normal distribution

Refusal = tuple[type[TrainingError], str]


def refusal(loss: float, gradient_norm: float, recent: Sequence[float], loss_spike: float | None) -> Refusal | None:
    """Why an update with this loss and gradient must not be kept, or None.

    A spike is a loss above median + `loss_spike` * max(0.1, 1.4826 * MAD) of the `recent` losses, where MAD is the
    median absolute deviation from the median: one hard batch among them does not move either. None = no such check.
    """
    if not math.isfinite(loss):
        return NonFiniteLoss, f"loss is {loss}"
    if not math.isfinite(gradient_norm):
        return NonFiniteLoss, f"gradient norm is {gradient_norm}"
    if loss_spike is None or len(recent) < FEWEST_LOSSES:
        return None
    usual = statistics.median(recent)
    deviation = DEVIATIONS_PER_MAD * statistics.median(abs(value - usual) for value in recent)
    limit = usual + loss_spike * max(SMALLEST_DEVIATION, deviation)
    if loss <= limit:
        return None
    return LossSpike, (
        f"loss is {loss:.3f}, where the {len(recent)} updates before had a median of {usual:.3f} "
        f"(more than {limit:.3f} is a spike, see loss_spike)"
    )


def advice(kind: type[TrainingError]) -> str:
    """What a person can do about an update that was not kept."""
    again = ", or `%finetune set loss_spike=null` to take it as it is" if kind is LossSpike else ""
    return (
        "The update was not applied. `%finetune skip` leaves this batch out, `%finetune rewind 10` goes back, "
        f"`%finetune set learning_rate=...` lowers the rate{again}; then `%finetune run`."
    )


def out_of_memory(error: MemoryError | RuntimeError, batches: Sequence[TokenBatch]) -> OutOfMemory:
    """What mlx's error means; `batches` are those of the update, none outside of one.

    Raises any other RuntimeError again.
    """
    if not is_out_of_memory(error):
        raise error
    rows = tuple(dict.fromkeys(row for batch in batches for row in batch.rows))
    where = "outside an update, while rows were measured or completions sampled"
    if batches:
        longest = max(length for batch in batches for length in batch.lengths)
        where = f"in a batch with rows {', '.join(map(str, rows))}, the longest of {longest} tokens"
    return OutOfMemory(
        f"memory ran out ({' '.join(str(error).split())}) {where}. A new run with a lower batch_size and more "
        "grad_accumulation_steps, or a lower max_seq_length, needs less.",
        rows,
    )
