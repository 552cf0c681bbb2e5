"""Writes trl.json: what TRL's own loss functions say of a few fixed log-probabilities, and the gradients of that.

    python -m venv trl && trl/bin/pip install torch trl==1.16.0
    trl/bin/python tests/objectives/goldens/make_goldens.py

Needs torch and TRL, not mlx_nb, and is run by hand; test_goldens.py compares mlx_nb with the file. Nothing of
TRL is written again here: its trainers are made without their `__init__`, hold only the settings that a loss reads, and
get a model that answers with the fixed numbers. Where TRL has no such loss the equation is written out, and the case
says so. Options bear mlx_nb's names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import trl
from completion_losses import completion_case, completion_cases
from fixed_numbers import COMPLETIONS, LABELS, PAIRS, TARGETS
from label_losses import LABEL_CASES, label_case
from pair_losses import PAIR_CASES, pair_case
from target_losses import TARGET_CASES, target_case
from trl import DPOConfig, GRPOConfig, KTOConfig
from trl.experimental.cpo import CPOConfig
from trl.experimental.orpo import ORPOConfig

DIGITS = 7  # significant; a hundred times finer than what is compared

DEFAULTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "dpo": (DPOConfig, ("beta", "label_smoothing")),
    "cpo": (CPOConfig, ("beta", "label_smoothing", "cpo_alpha", "simpo_gamma")),
    "orpo": (ORPOConfig, ("beta",)),
    "kto": (KTOConfig, ("beta", "desirable_weight", "undesirable_weight")),
    "grpo": (
        GRPOConfig,
        ("loss_type", "beta", "epsilon", "epsilon_high", "importance_sampling_level", "max_completion_length"),
    ),
}


def default_options(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: config.__dataclass_fields__[name].default for name in names}


def main() -> None:
    torch.set_default_dtype(torch.float64)
    versions = {module.__name__: module.__version__ for module in (torch, trl, transformers, np)}
    goldens = {
        "made_with": versions,
        "defaults": {name: default_options(*of) for name, of in DEFAULTS.items()},
        "pairs": PAIRS,
        "pair_cases": {name: pair_case(*case) for name, case in PAIR_CASES.items()},
        "labels": LABELS,
        "label_cases": {name: label_case(**case) for name, case in LABEL_CASES.items()},
        "completions": COMPLETIONS,
        "completion_cases": {name: completion_case(**case) for name, case in completion_cases().items()},
        "targets": TARGETS,
        "target_cases": {name: target_case(name, options) for name, options in TARGET_CASES.items()},
    }
    path = Path(__file__).with_name("trl.json")
    path.write_text(as_text(goldens), encoding="utf-8")
    print(f"{path.name}: {path.stat().st_size} bytes, made with {versions}")


def as_text(goldens: dict[str, Any]) -> str:
    """JSON with a line for each case."""
    lines = []
    for name, values in goldens.items():
        inner = [f"  {json.dumps(key)}: {json.dumps(rounded(value))}" for key, value in values.items()]
        lines.append(f" {json.dumps(name)}: {{\n" + ",\n".join(inner) + "\n }")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") + 0.0 if isinstance(value, float) else value  # + 0.0: no -0.0


if __name__ == "__main__":
    main()
