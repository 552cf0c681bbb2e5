"""The report about a fused model: what each precision loses, what is recommended, and what was measured."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_nb.export.fused_weights import ModuleLoss, share_lost

KEPT_ENOUGH = 0.95  # share of the gain in validation loss that a recommended precision keeps
LOST_TOO_MUCH = 0.2  # without validation rows: share of the fine-tune that a recommended precision may lose
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.")


@dataclass(frozen=True)
class Candidate:
    """One precision: the size of the model in bytes, what each fused module loses, and the predicted loss."""

    precision: str
    bytes: int
    modules: tuple[ModuleLoss, ...]
    predicted: float | None

    @property
    def lost(self) -> float:
        """The share of the fine-tune that is lost, 0 to 1."""
        return share_lost(list(self.modules))

    @property
    def layers(self) -> dict[str, float]:
        """The share of the fine-tune that is lost, by layer number, or by path for a module outside the layers."""
        grouped: dict[str, list[ModuleLoss]] = {}
        for module in self.modules:
            found = _LAYER.match(module.path)
            grouped.setdefault(found[1] if found else module.path, []).append(module)
        ordered = sorted(grouped, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0))
        return {name: share_lost(grouped[name]) for name in ordered}


@dataclass(frozen=True)
class FuseReport:
    """What `Run.fuse` found and wrote. Losses are validation losses; None without validation rows.

    candidates        each precision with its size, its loss by layer and its predicted loss
    adapter_loss      of the model with its adapter, on the rows of the prediction; `base_loss` without it
    recommended, why  the precision to take, and the reason
    chosen            the precision that was written
    path              the folder of the fused model; None if nothing was written
    measured          loss of the model as read from `path`, `measured_adapter` that of the adapter on the same rows
    """

    candidates: tuple[Candidate, ...]
    adapter_loss: float | None
    base_loss: float | None
    recommended: str
    why: str
    chosen: str
    path: Path | None = None
    measured: float | None = None
    measured_adapter: float | None = None

    def candidate(self, precision: str) -> Candidate:
        """The candidate of this precision."""
        return next(one for one in self.candidates if one.precision == precision)

    def __str__(self) -> str:
        lost = ", ".join(f"{name} {share:.0%}" for name, share in self.candidates[0].layers.items())
        by_layer = [f"Lost in {self.candidates[0].precision}, by layer: {lost}."] if self.candidates[0].lost else []
        lines = [*self._table(), "", *by_layer, f"Recommended: {self.recommended}, because {self.why}."]
        if self.path is not None:
            size = self.candidate(self.chosen).bytes / 1e6
            lines.append(f"Written in {self.chosen} to {self.path} ({size:,.0f} MB).")
        if self.measured is not None:
            lines.append(
                f"Validation loss, measured: {self.measured:.4f} fused, {self.measured_adapter:.4f} with the adapter."
            )
        return "\n".join(lines)

    __repr__ = __str__

    @property
    def how_to_use(self) -> str:
        """How to use the written model, in Python and in a terminal."""
        there = self.path or Path("FOLDER")
        place = str(there.relative_to(Path.cwd()) if there.is_relative_to(Path.cwd()) else there)
        return (
            f"In Python:      from mlx_lm import load; model, tokenizer = load({place!r})\n"
            f"In a terminal:  mlx_lm.generate --model {shlex.quote(place)} --prompt Hello"
        )

    def _table(self) -> list[str]:
        rows = [("precision", "size", "fine-tune lost", "worst layer", "validation loss, predicted")]
        for one in self.candidates:
            worst = max(one.layers.items(), key=lambda pair: pair[1], default=("-", 0.0))
            predicted = "-" if one.predicted is None else f"{one.predicted:.4f}"
            where = f"{worst[0]}: {worst[1]:.0%}" if one.modules else "-"
            rows.append((one.precision, f"{one.bytes / 1e6:,.0f} MB", f"{one.lost:.0%}", where, predicted))
        if self.adapter_loss is not None:
            rows.append(("with the adapter", "", "", "", f"{self.adapter_loss:.4f}"))
        if self.base_loss is not None:
            rows.append(("base alone", "", "", "", f"{self.base_loss:.4f}"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]


def recommended(
    candidates: Sequence[Candidate], adapter_loss: float | None, base_loss: float | None
) -> tuple[str, str]:
    """The precision to take, and why: the smallest that keeps the fine-tune. `candidates` are ordered by size."""
    if len(candidates) == 1:
        return candidates[0].precision, "it is the type of the base, and nothing is quantized"
    last = candidates[-1]
    for one in candidates:
        if adapter_loss is None or base_loss is None or one.predicted is None or base_loss <= adapter_loss:
            if one.lost <= LOST_TOO_MUCH or one is last:
                return one.precision, f"it loses {one.lost:.0%} of the fine-tune"
            continue
        kept = (base_loss - one.predicted) / (base_loss - adapter_loss)
        if kept >= KEPT_ENOUGH or one is last:
            return one.precision, f"it keeps {min(kept, 1):.0%} of what the fine-tune gained on the validation rows"
    raise AssertionError("there is at least one candidate")
