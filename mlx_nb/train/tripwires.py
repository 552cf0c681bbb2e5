"""Tripwires: reasons not to apply an update, such as a non-finite loss or a loss spike. Pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_nb.data.examples.batches import TokenBatch
from mlx_nb.errors import LossRaised, LossSpike, ModelChanged, NonFiniteLoss, OutOfMemory, TrainingError
from mlx_nb.model.memory import is_out_of_memory

RECENT_LOSSES = 32  # number of earlier losses that a loss is compared with
REMEMBERED_LOSSES = 8 * RECENT_LOSSES  # over all length classes
FEWEST_LOSSES = 8  # with fewer earlier losses there is no comparison
FIRST_UPDATES = 5  # in these a far too high learning rate shows
SMALLEST_DEVIATION = 0.1  # in nats, so that a small bump does not stop a run with a nearly constant loss
DEVIATIONS_PER_MAD = 1.4826  # of a normal distribution

Refusal = tuple[type[TrainingError], str]


def refusal(loss: float, gradient_norm: float) -> Refusal | None:
    """Why an update with a non-finite loss or gradient must not be applied; None if both are finite."""
    if not math.isfinite(loss):
        return NonFiniteLoss, f"loss is {loss}"
    if not math.isfinite(gradient_norm):
        return NonFiniteLoss, f"gradient norm is {gradient_norm}"
    return None


def length_class(tokens: int, rows: int) -> int:
    """The length class of an update: its mean row length to a factor of 2. Losses are compared within a class."""
    return round(math.log2(max(1, tokens) / max(1, rows)))


def spike(loss: float, comparable_losses: Sequence[float], loss_spike: float | None) -> str | None:
    """A message if `loss` is a spike among `comparable_losses`, the earlier ones of its length class; otherwise None.

    A spike is a loss above median + `loss_spike` * max(0.1, 1.4826 * MAD) of the last 32 losses, where MAD is the
    median absolute deviation; both are robust to a single hard batch. Length classes keep different kinds of rows
    apart, because a batch has rows of similar length. `loss_spike` None disables the check.
    """
    recent = comparable_losses[-RECENT_LOSSES:]
    if loss_spike is None or len(recent) < FEWEST_LOSSES:
        return None
    usual = statistics.median(recent)
    deviation = DEVIATIONS_PER_MAD * statistics.median(abs(value - usual) for value in recent)
    limit = usual + loss_spike * max(SMALLEST_DEVIATION, deviation)
    if loss <= limit:
        return None
    return (
        f"loss is {loss:.3f}; the last {len(recent)} updates with rows of about this length had a median of "
        f"{usual:.3f} (above {limit:.3f} is a spike, see loss_spike)"
    )


@dataclass
class SpikeWatch:
    """Judges the loss of one update. `found` is a message if it is a spike.

    comparable_losses  losses of earlier updates in the same length class
    before             number of consecutive spikes before this update
    patience           number of consecutive spikes at which the update is not applied
    """

    comparable_losses: Sequence[float]
    before: int
    loss_spike: float | None
    patience: int
    found: str | None = None

    def judge(self, loss: float, gradient_norm: float) -> Refusal | None:
        """Why the update must not be applied; None if it may."""
        if (refused := refusal(loss, gradient_norm)) is not None:
            return refused
        self.found = spike(loss, self.comparable_losses, self.loss_spike)
        if self.found is None or self.before + 1 < self.patience:
            return None
        lasting = f", for {self.patience} updates in a row," if self.patience > 1 else ""
        return LossSpike, f"{self.found}{lasting}"

    @property
    def in_a_row(self) -> int:
        """Number of consecutive spikes including this update. Updates without a comparison do not count."""
        if self.found is not None:
            return self.before + 1
        return 0 if len(self.comparable_losses) >= FEWEST_LOSSES else self.before


def advice(
    kind: type[TrainingError], step: int = FIRST_UPDATES, learning_rate: float = 0.0, *, doubtful: bool = False
) -> str:
    """Advice about an update that was not applied, after `step` updates at `learning_rate`.

    `doubtful` says that there is a warning about this rate.
    """
    if kind is LossRaised:
        return "The update was not applied. Correct the function, run its cell again, and then `%finetune resume`."
    if kind is ModelChanged:
        return "The update was not applied."
    if kind is NonFiniteLoss and (doubtful or step < FIRST_UPDATES):
        when = "This early in a run the" if step < FIRST_UPDATES else "The"
        return (
            f"The update was not applied. {when} likely cause is the learning rate "
            f"({learning_rate:.3g}) or the base model, not the rows: check `%finetune generate hello --base`, and "
            "try a tenth of the rate with `%finetune rewind --to 0` and `%finetune set learning_rate=...`. "
            "`%finetune skip` skips this batch; then `%finetune run`."
        )
    again = ", or `%finetune set loss_spike=null` disables this check" if kind is LossSpike else ""
    return (
        "The update was not applied. `%finetune skip` skips this batch, `%finetune rewind 10` goes back, "
        f"`%finetune set learning_rate=...` lowers the rate{again}; then `%finetune run`."
    )


def out_of_memory(error: MemoryError | RuntimeError, batches: Sequence[TokenBatch]) -> OutOfMemory:
    """Convert mlx's error to OutOfMemory. `batches` are those of the update; empty outside an update.

    Raises any other RuntimeError again.
    """
    if not is_out_of_memory(error):
        raise error
    rows = tuple(dict.fromkeys(row for batch in batches for row in batch.rows))
    where = "outside an update, during evaluation or sampling"
    if batches:
        longest = max(length for batch in batches for length in batch.lengths)
        where = f"in a batch with rows {', '.join(map(str, rows))}, the longest of {longest} tokens"
    return OutOfMemory(
        f"memory ran out ({' '.join(str(error).split())}) {where}. A new run with a lower batch_size and more "
        "grad_accumulation_steps, or a lower max_seq_length, needs less.",
        rows,
    )
