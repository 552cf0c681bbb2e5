"""What an update must not be: not a number, a loss far above those before it, or too large. Pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_nb.data.examples.batches import TokenBatch
from mlx_nb.errors import LossRaised, LossSpike, ModelChanged, NonFiniteLoss, OutOfMemory, TrainingError
from mlx_nb.model.memory import is_out_of_memory

RECENT_LOSSES = 32  # updates that a loss is compared with
REMEMBERED_LOSSES = 8 * RECENT_LOSSES  # of all lengths together
FEWEST_LOSSES = 8  # before so many there is nothing to compare with
FIRST_UPDATES = 5  # in which a rate that is far too high shows
SMALLEST_DEVIATION = 0.1  # nats; a run whose loss hardly moves is not stopped by a small bump
DEVIATIONS_PER_MAD = 1.4826  # of a normal distribution

Refusal = tuple[type[TrainingError], str]


def refusal(loss: float, gradient_norm: float) -> Refusal | None:
    """Why an update with this loss and gradient must not be kept, whatever came before it, or None."""
    if not math.isfinite(loss):
        return NonFiniteLoss, f"loss is {loss}"
    if not math.isfinite(gradient_norm):
        return NonFiniteLoss, f"gradient norm is {gradient_norm}"
    return None


def length_class(tokens: int, rows: int) -> int:
    """Which losses an update is compared with: those of rows of about this length, to a factor of 2."""
    return round(math.log2(max(1, tokens) / max(1, rows)))


def spike(loss: float, alike: Sequence[float], loss_spike: float | None) -> str | None:
    """In words, how far `loss` is above those of the updates before with rows of its length class; None = usual.

    A spike is a loss above median + `loss_spike` * max(0.1, 1.4826 * MAD) of the last 32, where MAD is the median
    absolute deviation from the median: one hard batch among them does not move either. Length classes keep rows that
    differ by nature apart, since batches are made of rows of similar length. `loss_spike` None = no such check.
    """
    recent = alike[-RECENT_LOSSES:]
    if loss_spike is None or len(recent) < FEWEST_LOSSES:
        return None
    usual = statistics.median(recent)
    deviation = DEVIATIONS_PER_MAD * statistics.median(abs(value - usual) for value in recent)
    limit = usual + loss_spike * max(SMALLEST_DEVIATION, deviation)
    if loss <= limit:
        return None
    return (
        f"loss is {loss:.3f}, where the {len(recent)} updates before with rows of about this length had a median of "
        f"{usual:.3f} (more than {limit:.3f} is a spike, see loss_spike)"
    )


@dataclass
class SpikeWatch:
    """Judges the loss of one update; `found` says in words that it is a spike.

    alike     losses of the updates before with rows of about this length
    before    spikes in a row until now;  patience: as many in a row are not kept any more
    """

    alike: Sequence[float]
    before: int
    loss_spike: float | None
    patience: int
    found: str | None = None

    def judge(self, loss: float, gradient_norm: float) -> Refusal | None:
        """Why the update must not be kept, or None."""
        if (refused := refusal(loss, gradient_norm)) is not None:
            return refused
        self.found = spike(loss, self.alike, self.loss_spike)
        if self.found is None or self.before + 1 < self.patience:
            return None
        lasting = f", for {self.patience} updates in a row," if self.patience > 1 else ""
        return LossSpike, f"{self.found}{lasting}"

    @property
    def in_a_row(self) -> int:
        """Spikes in a row, this update included; one that could not be compared changes nothing."""
        if self.found is not None:
            return self.before + 1
        return 0 if len(self.alike) >= FEWEST_LOSSES else self.before


def advice(kind: type[TrainingError], step: int = FIRST_UPDATES, learning_rate: float = 0.0) -> str:
    """What a person can do about an update that was not kept, after `step` updates, the last at this rate."""
    if kind is LossRaised:
        return "The update was not applied. Mend the function, run its cell again, and then `%finetune resume`."
    if kind is ModelChanged:
        return "The update was not applied."
    if kind is NonFiniteLoss and step < FIRST_UPDATES:
        return (
            f"The update was not applied. So early in a run the learning rate ({learning_rate:.3g}) and the base are "
            "suspected before the rows: see what `%finetune generate hello --base` answers, and try a tenth of the "
            "rate with `%finetune rewind --to 0` and `%finetune set learning_rate=...`. `%finetune skip` leaves this "
            "batch out; then `%finetune run`."
        )
    again = ", or `%finetune set loss_spike=null` to take what comes" if kind is LossSpike else ""
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
