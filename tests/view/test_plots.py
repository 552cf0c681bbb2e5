"""The figure of a run: what each method measures has axes of its own, and a reward stands where a loss would."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from curve_histories import method_history, update, validation
from mlx_nb.config.methods import METHODS
from mlx_nb.events import Rewound, SettingChanged
from mlx_nb.events.history import History, smoothed
from mlx_nb.view.curves.curves import SeriesBuilder
from mlx_nb.view.curves.figure import live_svg, plot_history
from mlx_nb.view.curves.main_quantity import curve_legend
from mlx_nb.view.curves.shown_figure import drawable
from mlx_nb.view.curves.text_chart import text_chart
from mlx_nb.view.event_text import summary_rows
from places import SUPPORT


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
    history.append(Rewound(10, 30, history.in_effect.index(next(e for e in history.in_effect if e.step == 11))))
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


def luminance(color: tuple[float, float, float]) -> float:
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in color[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


@pytest.mark.parametrize("ground", [(1, 1, 1), (0x11 / 255,) * 3])
@pytest.mark.matrix(every=2)
def test_all_words_of_the_figure_can_be_read_on_a_light_and_on_a_dark_page(ground):
    figure = plot_history(method_history("dpo"), "bees: smollm2-135m", METHODS["dpo"].metrics)
    assert {figure.get_facecolor()[3], *(axes.get_facecolor()[3] for axes in figure.axes)} == {0}
    figure.draw_without_rendering()
    words = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    assert len(words) > 20
    for text in words:
        assert contrast(luminance(to_rgb(text.get_color())), luminance(ground)) > 3.8, text


@pytest.mark.long
def test_a_notebook_gets_a_picture_without_any_backend_of_pyplot():
    code = (
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "from curve_histories import method_history\n"
        "from mlx_nb.view.curves.figure import plot_history\n"
        "figure = plot_history(method_history('dpo'), 'bees: m')\n"
        "data, _ = InteractiveShell.instance().display_formatter.format(figure)\n"
        "import sys; assert 'matplotlib.pyplot' not in sys.modules\n"
        "print(sorted(data), data['image/png'][:4], data['text/plain'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SUPPORT)
    head, *chart = done.stdout.strip().splitlines()
    assert head == (
        "['image/png', 'text/plain'] b'\\x89PNG' bees: m, 60 updates (a figure: "
        '`.savefig("curves.png")` writes it to a file)'
    ), done.stderr
    assert chart[-1].strip() == "⠒ training loss   o validation"


def test_where_there_are_no_pictures_the_curve_is_drawn_in_characters():
    history = History([update(step, 4.0 - step) for step in range(1, 4)])
    chart = text_chart(history, width=12, height=3).splitlines()
    assert chart == [
        "3 │    ⠑⢄⡀",
        "  │      ⠈⠢⣀",
        "1 │         ⠉⠢⢄",
        "  └────────────",
        "   0   update 3",
        "   ⠒ training loss",
    ], "\n".join(chart)
    assert text_chart(History([update(1, 2.0)])) == ""
    flat = text_chart(History([update(1, 2.0), update(2, 2.0)]), width=20, height=3)
    assert flat.splitlines()[0].strip() == "2 │"


@pytest.mark.parametrize("name", ["模型 🐝", "a$b$c", "$\\frac{", "été"])
@pytest.mark.matrix(every=4)
def test_no_name_brings_a_warning_or_an_error_into_the_picture(name):
    history = History([update(1, 2.0, {name: 1.0}), update(2, 1.0, {name: 2.0}), SettingChanged(2, name, "a", name)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plot_history(history, f"{name}: {name}")
        assert figure._repr_png_()[:4] == b"\x89PNG"
    title = figure.axes[0].get_title(loc="left")
    assert title == f"{drawable(name)}: {drawable(name)}"
    assert len(title) == 2 * len(name) + 2


def widths(axes) -> dict[str, float]:
    return {line.get_label(): line.get_linewidth() for line in axes.get_lines()}


def test_what_is_smoothed_is_the_heavier_line_only_where_there_are_many_updates():
    few, many = (
        widths(plot_history(History(update(step, 1 / step) for step in range(1, n))).axes[0]) for n in (13, 199)
    )
    assert few["train, each update"] > few["train, smoothed"]
    assert many["train, smoothed"] > many["train, each update"]
    assert curve_legend(History(update(step, 1.0) for step in range(1, 13))) == "training loss"
    assert curve_legend(History(update(step, 1.0) for step in range(1, 199))) == "training loss, smoothed"


def test_an_average_passes_over_what_is_not_finite():
    assert smoothed([2.0, math.nan, 2.0, math.inf, 2.0]) == pytest.approx([2, math.nan, 2, math.nan, 2], nan_ok=True)


def test_the_best_mark_is_the_best_of_the_summary_and_covers_no_curve():
    history = History([replace(validation(0, 3.0), best=True)])
    for step in range(1, 9):
        history.append(update(step, 3 - step / 4))
    history.append(replace(validation(4, 2.0), best=True))
    history.append(validation(8, 1.5))  # by hand, of other rows: no adapter was kept for it
    axes = plot_history(history).axes[0]
    reported = dict(summary_rows(history))["best validation"]
    assert reported == "2.0000 at update 4"
    (ring,) = (line for line in axes.get_lines() if line.get_markersize() == 9)
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([4], [2.0])
    (label,) = (text for text in axes.texts if text.get_text() == "best 2.000")
    figure = axes.figure
    figure.draw_without_rendering()
    assert label.get_window_extent().y0 >= axes.get_window_extent().y1
    assert SeriesBuilder(history).series(8)["best"] == {"group": "loss", "step": 4}


def test_what_a_rewind_left_is_inside_the_axes_and_squeezes_what_stands_to_a_third_at_most():
    def limits(left: float) -> tuple[float, float]:
        history = History(update(step, 2 - step / 10) for step in range(1, 11))
        history.append(update(11, left))
        history.append(Rewound(10, 11, 10))
        return plot_history(history).axes[0].get_ylim()

    assert limits(2.5)[1] > 2.5
    low, high = limits(1e6)
    assert high < 4
    assert (high - low) <= 3.1 * (1.9 - 1.0)


def test_updates_are_whole_numbers_on_the_axis_and_a_steady_rate_is_reported_as_it_is():
    figure = plot_history(History([update(1, 2.0), update(2, 1.0, learning_rate=1e-4 - 1e-15)]))
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert all(float(tick) == int(tick) for tick in axes.get_xticks())
    assert "+" not in figure.axes[1].yaxis.get_offset_text().get_text()
