"""Fingerprints of what determines the numbers of a run besides its settings, such as its rows, model and own code."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from mlx_nb.config.methods import method_named
from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.examples.batches import ORDER
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.process.user_code import code_digest, is_user_defined

if TYPE_CHECKING:
    from mlx_nb.rollouts.rewards.resolve import Reward
    from mlx_nb.train.answer_metrics import AnswerMetrics

# The inputs of a run besides its settings, by the names of their fingerprints.
MADE_FROM = (
    "data",
    "template",
    "tokenizer",
    "model",
    "mlx version",
    "row order",
    "device",
    "reference",
    "loss function",
    "reward functions",
    "metric functions",
)


def fingerprints(sources: Iterable[Any], tokenizer: Tokenizer, model: Iterable[Iterable[str]]) -> dict[str, Any]:
    """Fingerprints of everything besides the settings that determines a run's numbers, by name."""
    from mlx_nb.model import backend
    from mlx_nb.model.lanes import lane_count

    tokenizer = getattr(tokenizer, "_tokenizer", tokenizer)
    return {
        "data": [source.fingerprint() for source in sources],
        "template": _digest(str(tokenizer.chat_template)),
        "tokenizer": _digest(tokenizer.backend_tokenizer.to_str()),
        "model": [list(file) for file in model],
        "mlx version": version("mlx"),
        "row order": ORDER,
        "device": f"CPU, lanes: {lane_count()}" if backend.is_cpu() else backend.device_name(),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def own_code(config: RunConfig, rewards: Sequence[Reward], metrics: AnswerMetrics | None) -> dict[str, Any]:
    """Digests of user-defined losses, rewards and the metric that decides. The settings have only their names."""
    loss = method_named(config.method).loss(config.loss).function()
    # Of the other metrics no number of the training depends on.
    deciding = [one for one in (metrics.metrics if metrics else ()) if one.name == config.best_by]
    return {
        **({"loss function": code_digest(loss)} if is_user_defined(loss) else {}),
        **_digests("reward functions", rewards),
        **_digests("metric functions", deciding),
    }


def _digests(name: str, functions: Iterable[Reward]) -> dict[str, dict[str, str]]:
    own = {one.name: code_digest(one.function) for one in functions if is_user_defined(one.function)}
    return {name: own} if own else {}
