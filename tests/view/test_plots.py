"""The figure of a run: what each method measures has axes of its own, and a reward stands where a loss would."""

from __future__ import annotations

import pytest

from curve_histories import method_history, update, validation
from mlx_nb.config.methods import METHODS
from mlx_nb.events import Rewound
from mlx_nb.history import History
from mlx_nb.view.curves.figure import live_svg, plot_history


def titles(figure) -> list[str]:
    return [axes.get_title(loc="left") or axes.get_ylabel() for axes in figure.axes]


@pytest.mark.parametrize(
    ("method", "shown"),
    [
        ("dpo", ["loss", "accuracy", "margin", "kl"]),
        ("orpo", ["loss", "accuracy", "margin", "nll"]),
        ("kto", ["loss", "accuracy", "kl", "kl estimate"]),
        ("grpo", ["reward", "kl", "completion tokens", "loss"]),
    ],
)
def test_the_metrics_that_say_most_have_axes_of_their_own(method, shown):
    history = method_history(method)
    figure = plot_history(history, metrics=METHODS[method].metrics)
    assert titles(figure) == [*shown, "learning rate", "gradient norm"]
    small = figure.axes[1]
    assert small.get_title(loc="right") == f"healthy: {METHODS[method].metrics[shown[1]].healthy}"
    raw, trend, valid = small.get_lines()
    assert list(raw.get_ydata()) == history[shown[1]]
    assert list(raw.get_xdata()) == list(trend.get_xdata()) == history["step"]
    assert list(valid.get_ydata()) == [row[shown[1]] for row in history.evaluations("valid")]


def test_rows_to_imitate_have_the_loss_alone():
    figure = plot_history(History([update(1, 2.0), update(2, 1.0), validation(2, 1.5)]))
    assert titles(figure) == ["loss (nats per token)", "learning rate", "gradient norm"]


def test_the_best_reward_is_the_highest_and_no_loss_is_minus_a_reward():
    history = method_history("grpo")
    figure = plot_history(history, metrics=METHODS["grpo"].metrics)
    rewards = [row["reward"] for row in history.evaluations("valid")]
    assert f"best {max(rewards):.3f}" in [text.get_text() for text in figure.axes[0].texts]
    loss = figure.axes[titles(figure).index("loss")]
    assert [line.get_ydata()[0] for line in loss.get_lines()] == [0.7, 0.7]


def test_what_a_rewind_left_stays_in_the_figure_of_rewards():
    history = method_history("grpo", 30)
    history.append(Rewound(10, 30, history.standing.index(next(e for e in history.standing if e.step == 11))))
    left = next(line for line in plot_history(history).axes[0].get_lines() if line.get_label() == "rewound")
    assert list(left.get_xdata()) == list(range(11, 31))


def test_the_small_curve_is_of_the_reward_where_there_is_one_and_reaches_below_zero():
    svg = live_svg(method_history("grpo"), 100)
    assert "training reward, now" in svg
    assert svg.count("<circle") == 4
    assert "training loss, now" in live_svg(method_history("dpo"), 100)
    falling = live_svg(History(update(step, -step) for step in range(1, 5)), 10)
    points = falling.split('points="')[1].split('"')[0].split()
    assert len({point.split(",")[1] for point in points}) == 4
