"""The history as a table: rewinds cut it back, and asking it costs the same however long it is."""

from __future__ import annotations

import time

import pytest

from made_events import evaluation, update
from mlx_nb.events import Rewound, SettingChanged
from mlx_nb.events.history import History
from mlx_nb.view.curves.figure import plot_history


def test_a_rewind_cuts_the_columns_back_and_keeps_the_branch():
    history = History([update(1, 3.0), evaluation(1, 2.5), update(2, 2.0), evaluation(2, 1.5), update(3, 1.0)])
    history.append(Rewound(1, 3, 2))
    assert history["loss"] == [3.0]
    assert len(history) == 1
    assert history.last_step.step == 1
    assert [row["loss"] for row in history.evaluations()] == [2.5]
    assert [row["loss"] for row in history.abandoned()[0]] == [2.0, 1.0]
    history.append(update(2, 2.2))
    assert history["loss"] == [3.0, 2.2]
    assert History(history.events)["loss"] == history["loss"]


def test_tables_show_the_last_updates_with_the_methods_metrics():
    history = History([update(step, 1 / step, margin=0.5 * step) for step in range(1, 8)])
    assert history.columns[-1] == "margin"
    table = history.tail(2)
    assert [row["step"] for row in table.rows] == [6, 7]
    assert "the last 2 of 7 updates" in repr(table)
    assert "margin" in history._repr_html_()
    frame = history.to_pandas()
    assert list(frame.index) == list(range(1, 8))
    assert frame["margin"].iloc[-1] == pytest.approx(3.5)
    assert frame["loss"].iloc[0] == 1.0


def test_the_figure_marks_where_a_setting_was_changed():
    history = History([update(step, 1 / step) for step in range(1, 8)])
    history.append(SettingChanged(7, "learning_rate", 1e-4, 5e-5))
    history.append(update(8, 0.1))
    loss = plot_history(history).axes[0]
    assert any(text.get_text() == "learning_rate 5e-05" for text in loss.texts)
    assert any(list(line.get_xdata()) == [7, 7] for line in loss.get_lines())


def test_asking_a_long_history_costs_what_asking_a_short_one_does():
    def seconds(count):
        history = History([update(step) for step in range(1, count + 1)])
        started = time.perf_counter()
        for _ in range(200):
            _ = len(history), history.last_step, history.last_steps(20), history.tail(5), history.iters
        return time.perf_counter() - started

    assert min(seconds(20_000) for _ in range(3)) < 5 * min(seconds(200) for _ in range(3))
