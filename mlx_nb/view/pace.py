"""Speed and time left of a run, for all displays.

The speed counts updates only; the time left includes sampling and validation.
"""

from __future__ import annotations

from mlx_nb.events.history import History
from mlx_nb.view.metric_text import SECONDS

RECENT_UPDATES = 20
FEW_UPDATES = 5  # with fewer updates, the speed is marked as a first estimate


def time_left(history: History, iters: int) -> float:
    """Seconds for the remaining updates, rollouts and validations, at the speed of the latest ones.

    0 before the first update.
    """
    last = history.last_step
    if last is None:
        return 0.0
    recent = [event.seconds for event in history.last_steps(RECENT_UPDATES)]
    # The first update of a process is slower than later ones, so it is ignored once there are others.
    steady = recent[1:] if 1 < len(recent) < RECENT_UPDATES else recent
    updates = iters - last.step
    pace = sum(steady) / len(steady) + _rollout_seconds_per_update(history)
    evaluations = history.evaluations("valid")
    if len(evaluations) > 1 and last.step:
        # Validations are evenly spaced; the one at the start is not repeated.
        pace += evaluations[-1]["seconds"] * (len(evaluations) - 1) / last.step
    return max(0.0, updates * pace)


def tokens_per_second(history: History) -> float:
    """Tokens per second over the latest updates; 0 before the first."""
    recent = history.last_steps(RECENT_UPDATES)
    recent = recent[1:] if 1 < len(recent) < RECENT_UPDATES else recent  # the first one is slower, see `time_left`
    return sum(event.tokens for event in recent) / max(sum(event.seconds for event in recent), 1e-9)


def _rollout_seconds_per_update(history: History) -> float:
    """Seconds per update spent on sampling and rewards, over the latest updates; 0 for other methods."""
    recent = history.last_steps(RECENT_UPDATES)
    spent = [value for event in recent for name, value in event.metrics.items() if name.startswith(SECONDS)]
    # A rollout may be used for several updates, and each of them reports its time.
    share = history.rollout_count / max(1, len(history))
    return sum(spent) / max(1, len(recent)) * min(1.0, share)
