"""A tiny run of each method after a few updates, for tests of displays."""

from __future__ import annotations

import pytest

from mlx_nb import Run, RunConfig
from tiny import tiny_labels, tiny_pairs, tiny_prompts

MADE = {"dpo": tiny_pairs, "kto": tiny_labels, "grpo": tiny_prompts}


def short(completions):
    return [1.0 if len(text) < 10 else 0.5 for text in completions]


def letters(completion, answer):
    return sum(letter in completion for letter in answer) / len(answer) if len(completion) % 5 else None


@pytest.fixture
def make_run(tiny_folder, tmp_path):
    def make(method: str, **settings) -> Run:
        rollouts = (
            {"rewards": [short, letters], "group_size": 3, "max_completion_length": 6} if method == "grpo" else {}
        )
        base = {"model": str(tiny_folder), "data": MADE[method](), "val_set_size": 4, "iters": 4, "batch_size": 2}
        folder = str(tmp_path / "adapter")
        return Run(
            RunConfig(
                **{
                    **base,
                    **(rollouts if method == "grpo" else {}),
                    "method": method,
                    "adapter_path": folder,
                    **settings,
                }
            ),
            name=method,
        )

    return make
