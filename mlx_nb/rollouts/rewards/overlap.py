"""How much of a reference answer is in a completion: ROUGE-L and chrF, computed by the packages that define them."""

from __future__ import annotations

from functools import cache
from typing import Any

from mlx_nb.errors import ConfigError


def rouge_l_score(completion: str, reference: str) -> float:
    """ROUGE-L F1 of the package rouge-score, without stemming: the longest common subsequence of words, 0 to 1."""
    return float(_rouge().score(reference, completion)["rougeL"].fmeasure)


def chrf_score(completion: str, reference: str) -> float:
    """ChrF (character 6-grams, beta 2) of the package sacrebleu, divided by 100: 0 to 1."""
    return float(_chrf().sentence_score(completion, [reference]).score) / 100


@cache
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise missing("rouge_l", "rouge-score") from None
    return RougeScorer(["rougeL"])


@cache
def _chrf() -> Any:
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError:
        raise missing("chrf", "sacrebleu") from None
    return CHRF()


def missing(name: str, package: str) -> ConfigError:
    """The error for a function whose package is not installed."""
    return ConfigError(f"{name} needs the package {package}. Run: pip install 'mlx-nb[metrics]'.")
