"""The live curves: what the browser is told of a history, and what it draws of that."""

from __future__ import annotations

import json
import math
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curve_histories import method_history, update, validation
from mlx_nb.config.methods import METHODS
from mlx_nb.events import (
    AdapterSaved,
    BatchSkipped,
    Rewound,
    RunPaused,
    SettingChanged,
)
from mlx_nb.events.history import History, smoothed
from mlx_nb.view.curves.curves import NO_METRICS, SeriesBuilder
from mlx_nb.view.curves.points import kept_points, smoothed_at
from mlx_nb.view.panel import panel

PAGE_PARTS = Path(panel.__file__).with_name("page")
# The curves alone, without the panel around them.
SCRIPT = "\n".join((PAGE_PARTS / part).read_text() for part in ("dom.js", "curves.js"))
SCRIPT += "\nexport default { render: renderCurves };"
GROUPS = ["loss", "learning rate", "gradient norm", "tokens per second", "memory (GB)"]


def series_of(history, iters, metrics=NO_METRICS):
    return SeriesBuilder(history, metrics).series(iters)


def lines_of(series: dict, group: str, role: str) -> list[list[tuple[int, float | None]]]:
    """The points of all lines of a role."""
    lines = next(one for one in series["groups"] if one["name"] == group)["lines"]
    return [list(zip(line["step"], line["value"])) for line in lines if line["role"] == role]


def some_history(seed: int, events: int = 120) -> History:
    """Updates, validations, saves and rewinds in a random order that a run could have."""
    draw, history, step = random.Random(seed), History(), 0
    stood: dict[int, int] = {0: 0}
    for _ in range(events):
        match draw.choices(["update", "valid", "save", "setting", "rewind"], [20, 3, 2, 1, 2])[0]:
            case "update":
                step += 1
                metrics = {"margin": draw.random()} if draw.random() < 0.5 else {}
                history.append(update(step, draw.choice([draw.random(), math.nan]), metrics))
                stood[step] = len(history.in_effect)
            case "valid":
                history.append(validation(step, draw.random()))
            case "save":
                history.append(AdapterSaved(step, "adapters/run", "last"))
            case "setting":
                history.append(SettingChanged(step, "learning_rate", 1e-4, 5e-5))
            case "rewind":
                back = draw.randint(0, step)
                history.append(Rewound(back, step, stood[back]))
                step = back
    return history


def test_a_short_history_is_shown_number_for_number():
    losses = [2.0, 1.5, 1.75, 1.25]
    history = History([validation(0, 2.5)])
    for step, loss in enumerate(losses, start=1):
        history.append(update(step, loss, tokens=100 * step, seconds=0.5, learning_rate=step * 1e-5))
    history.append(validation(4, 1.5))
    history.append(validation(4, 9.0, "test"))
    series = series_of(history, 10)
    assert series["iters"] == 10
    assert [group["name"] for group in series["groups"]] == GROUPS
    assert lines_of(series, "loss", "raw") == [list(enumerate(losses, start=1))]
    assert lines_of(series, "loss", "valid") == [[(0, 2.5), (4, 1.5)]]
    assert lines_of(series, "learning rate", "train") == [[(1, 1e-5), (2, 2e-5), (3, 3e-5), (4, 4e-5)]]
    assert lines_of(series, "tokens per second", "train") == [[(step, 200.0 * step) for step in range(1, 5)]]
    assert lines_of(series, "memory (GB)", "train") == [[(step, 2.0) for step in range(1, 5)]]
    (line,) = lines_of(series, "loss", "train")
    assert [value for _, value in line] == pytest.approx(smoothed(losses), rel=1e-4)
    assert series["clocks"] == [
        {"step": [1, 2, 3, 4], "tokens": [100, 300, 600, 1000], "seconds": [0.5, 1.0, 1.5, 2.0]}
    ]


def test_a_history_without_updates_has_empty_lines():
    series = series_of(History(), 10)
    assert {tuple(line["step"]) for group in series["groups"] for line in group["lines"]} == {()}
    assert series["markers"] == []


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.matrix(every=20)
def test_reading_event_by_event_is_reading_at_once(seed):
    whole, growing = some_history(seed), History()
    builder = SeriesBuilder(growing)
    for event in whole.events:
        growing.append(event)
        assert builder.series(50) == series_of(growing, 50)


@pytest.mark.parametrize("seed", range(20))
def test_a_rewind_cuts_the_lines_as_it_cuts_the_history_and_leaves_the_branches(seed):
    history = some_history(seed)
    series = series_of(history, 50)

    def rounded(rows):
        return [(row["step"], float(f"{row['loss']:.5g}") if math.isfinite(row["loss"]) else None) for row in rows]

    assert lines_of(series, "loss", "raw") == [rounded(history.steps())]
    assert lines_of(series, "loss", "valid") == [rounded(history.evaluations("valid"))]
    branches = [rounded(branch) for branch in history.abandoned()]
    # A branch that is too long is thinned out, and only the newest are told.
    told = lines_of(series, "loss", "left")
    assert [(line[0], line[-1]) for line in told] == [(line[0], line[-1]) for line in branches[-len(told) :]]
    assert len(told) == min(len(branches), 10)
    assert all(set(line) <= set(branch) for line, branch in zip(told, branches[-len(told) :]))
    assert [clock["step"][-1] for clock in series["clocks"][1:]] == [line[-1][0] for line in told]
    standing = [event for event in history.in_effect if isinstance(event, AdapterSaved | SettingChanged | Rewound)]
    if all(sum(type(event) is kind for event in standing) <= 16 for kind in (AdapterSaved, SettingChanged, Rewound)):
        assert sorted(marker["step"] for marker in series["markers"]) == sorted(event.step for event in standing)


def test_a_branch_that_was_left_keeps_its_own_tokens_and_time():
    history = History(
        [update(1, tokens=10), update(2, tokens=1000, seconds=9.0), Rewound(1, 2, 1), update(2, tokens=20)]
    )
    run, branch = series_of(history, 5)["clocks"]
    assert run == {"step": [1, 2], "tokens": [10, 30], "seconds": [0.5, 1.0]}
    assert branch == {"step": [2], "tokens": [1010], "seconds": [9.5]}


def test_what_is_not_finite_becomes_null_and_does_not_spoil_what_follows():
    history = History(
        update(step, loss) for step, loss in enumerate([2.0, math.nan, math.inf, -math.inf, 1.0], start=1)
    )
    history.append(update(6, 1.0, seconds=0.0, gradient_norm=math.nan))
    series = json.loads(json.dumps(series_of(history, 6), allow_nan=False))
    assert [value for _, value in lines_of(series, "loss", "raw")[0]] == [2.0, None, None, None, 1.0, 1.0]
    trend = [value for _, value in lines_of(series, "loss", "train")[0]]
    assert trend[1:4] == [None] * 3
    assert [trend[0], *trend[4:]] == pytest.approx(smoothed([2.0, 1.0, 1.0]), rel=1e-4)
    assert lines_of(series, "gradient norm", "train")[0][-1] == (6, None)
    assert lines_of(series, "tokens per second", "train")[0][-1] == (6, None)


def test_a_metric_has_a_group_of_its_own_with_only_the_updates_that_measured_it():
    history = History([update(1), update(2, metrics={"margin": 0.5, "weight": 3.0}), update(3), update(4)])
    history.append(update(5, metrics={"margin": math.nan, "loss": 7.0}))
    series = series_of(history, 5)
    assert [group["name"] for group in series["groups"]] == [*GROUPS, "margin", "weight (metric)", "loss (metric)"]
    assert lines_of(series, "margin", "train") == [[(2, 0.5), (5, None)]]
    assert lines_of(series, "weight (metric)", "train") == [[(2, 3.0)]]
    assert lines_of(series, "loss (metric)", "train") == [[(5, 7.0)]]
    assert lines_of(series, "loss", "raw") == [[(step, 1.0) for step in range(1, 6)]]


def test_what_the_method_declares_comes_first_with_its_words_and_times_come_last():
    series = series_of(method_history("dpo"), 60, METHODS["dpo"].metrics)
    names = [group["name"] for group in series["groups"]]
    assert names == [
        "loss",
        "accuracy",
        "margin",
        "kl",
        "rewards",
        "log-probabilities",
        *GROUPS[1:],
        "seconds_sampling",
    ]
    assert series["shown"] == names[:6]
    groups = {group["name"]: group for group in series["groups"]}
    assert groups["accuracy"]["help"].endswith("the higher implicit reward; healthy: up")
    assert [groups[name]["best"] for name in ("loss", "accuracy", "kl", "learning rate")] == ["low", "high", "", ""]
    assert groups["loss"]["label"] == "loss"
    assert series_of(method_history("dpo"), 60)["shown"] == ["loss"]
    assert series_of(History([validation(0, 2.0)]), 9)["groups"][0]["label"] == "loss (nats per token)"


def test_two_rewards_share_a_chart_and_validations_stand_beside_updates():
    history = method_history("dpo")
    groups = {group["name"]: group for group in series_of(history, 60, METHODS["dpo"].metrics)["groups"]}
    assert [(line["name"], line["role"]) for line in groups["rewards"]["lines"]] == [
        ("chosen, smoothed", "train"),
        ("chosen, validation", "valid-first"),
        ("rejected, smoothed", "second"),
        ("rejected, validation", "valid-second"),
    ]
    lines = {line["role"]: line["value"] for line in groups["rewards"]["lines"]}
    assert lines["second"] == pytest.approx(smoothed(history["reward_rejected"]), rel=1e-3, abs=1e-4)
    evaluated = [row["reward_rejected"] for row in history.evaluations("valid")]
    assert lines["valid-second"] == pytest.approx(evaluated, rel=1e-4)
    assert [line["role"] for line in groups["accuracy"]["lines"]] == ["raw", "train", "valid"]
    assert groups["accuracy"]["lines"][0]["value"] == pytest.approx(history["accuracy"], rel=1e-4)


def test_minus_a_reward_is_no_point_of_the_loss():
    series = series_of(method_history("grpo"), 60, METHODS["grpo"].metrics)
    assert lines_of(series, "loss", "valid") == [[]]
    assert len(lines_of(series, "reward", "valid")[0]) == 4
    assert series["shown"] == ["loss", "reward", "kl", "completion_tokens"]


def test_a_rewind_cuts_the_validations_of_metrics_too():
    history = method_history("dpo", 30)
    kept = history.in_effect.index(next(event for event in history.in_effect if event.step == 11))
    history.append(Rewound(10, 30, kept))
    series = series_of(history, 60, METHODS["dpo"].metrics)
    assert [step for step, _ in lines_of(series, "margin", "valid")[0]] == [0]
    assert [len(line) for line in lines_of(series, "margin", "left")] == [20]
    assert [len(line) for line in lines_of(series, "rewards", "left")] == [20, 20]


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=300))
def test_smoothing_a_few_points_is_smoothing_all(values):
    kept = np.arange(0, len(values), 7)
    assert smoothed_at(np.array(values), kept) == pytest.approx(np.array(smoothed(values))[kept], rel=1e-3, abs=0.1)


def test_smoothing_passes_over_what_is_missing():
    values = np.array([1.0, math.nan, 3.0, math.inf])
    told = smoothed_at(values, np.arange(4))
    assert told[0] == 1.0
    assert np.isnan(told[[1, 3]]).all()
    assert 1.0 < told[2] < 3.0


def test_markers_name_what_happened_and_where():
    history = History(
        [
            update(1),
            AdapterSaved(1, "adapters/run", "best"),
            SettingChanged(1, "learning_rate", 0.1, 0.2),
            RunPaused(1, "pause requested"),
            BatchSkipped(1, (3, 4)),
            update(2),
            Rewound(1, 2, 5),
            AdapterSaved(1, "adapters/" + "long " * 100, "last"),
        ]
    )
    markers = series_of(history, 3)["markers"]
    assert [(marker["step"], marker["kind"]) for marker in markers] == [
        (1, "save"),
        (1, "save"),
        (1, "rewind"),
        (1, "setting"),
        (1, "pause"),
        (1, "skip"),
    ]
    told = {marker["kind"]: marker["text"] for marker in markers}
    assert told["setting"] == "update 1: learning_rate changed from 0.1 to 0.2"
    assert told["rewind"] == "went back from update 2 to 1"
    assert max(len(marker["text"]) for marker in markers) <= 90


numbers = st.lists(st.floats(-1e6, 1e6) | st.just(math.inf) | st.just(math.nan), min_size=1, max_size=300)


@given(numbers, st.integers(4, 40))
def test_thinning_out_keeps_ends_and_spikes(values, limit):
    line = np.array(values)
    there = np.flatnonzero(~np.isnan(line))
    kept = kept_points(line, limit)
    assert len(kept) <= limit
    assert list(kept) == sorted(set(kept))
    assert set(kept) <= set(there)
    if len(there):
        assert {there[0], there[-1]} <= set(kept)
        assert (line[kept].min(), line[kept].max()) == (line[there].min(), line[there].max())


def test_every_spike_of_a_long_run_survives():
    line = np.random.default_rng(0).normal(size=100_000)
    spikes = np.arange(700, 100_000, 5_000)
    line[spikes] = 50 + np.arange(len(spikes))
    line[spikes + 2_000] = -50
    kept = set(kept_points(line, 400))
    assert set(spikes) | set(spikes + 2_000) <= kept
    assert len(kept) <= 400


def test_the_points_of_a_growing_line_stay_where_they_are():
    line = np.random.default_rng(0).normal(size=10_000)
    before, after = set(kept_points(line[:7_000], 100)), set(kept_points(line[:7_500], 100))
    assert {index for index in before if index < 7_000 // 256 * 256} <= after


def long_history(updates: int, metrics: int = 0, branches: int = 0) -> History:
    draw, history = random.Random(0), History()
    for step in range(1, updates + 1):
        measured = {f"rewards/of some name {index}": draw.gauss(0, 1e-5) for index in range(metrics)}
        loss, rate, norm = draw.gauss(0, 1e-5), 1e-5 * draw.random(), 1e-5 * draw.random()
        changed = {"learning_rate": rate, "gradient_norm": norm, "tokens": 4_000, "seconds": 1 + draw.random()}
        memory = 10**9 + draw.randrange(10**9)
        history.append(update(100_000 + step, loss, measured, **changed, peak_memory=memory))
        if step % 20 == 0:
            history.append(validation(100_000 + step, draw.random()))
            history.append(AdapterSaved(100_000 + step, "a folder of some name/" * 8, "last"))
            history.append(SettingChanged(100_000 + step, "learning_rate", 1e-4, "some long value " * 10))
            history.append(RunPaused(100_000 + step, "for a reason that takes some words " * 5))
            history.append(BatchSkipped(100_000 + step, tuple(range(1000))))
        if branches and step % (updates // branches) == 0:
            history.append(Rewound(100_000 + step - 100, 100_000 + step, len(history.in_effect) - 200))
    return history


@pytest.mark.parametrize("name", METHODS)
def test_the_data_of_a_long_run_of_any_method_is_small(name):
    history = method_history(name, 3000)
    assert len(json.dumps(series_of(history, 10_000, METHODS[name].metrics))) < 100_000


@pytest.mark.long
@pytest.mark.parametrize(("updates", "metrics", "branches"), [(100_000, 0, 0), (20_000, 30, 3), (20_000, 4, 30)])
def test_the_data_of_a_long_run_is_small(updates, metrics, branches, record_property):
    series = series_of(long_history(updates, metrics, branches), 1_000_000)
    size = len(json.dumps(series).encode())
    record_property("kilobytes", size / 1000)
    assert size < 100_000
    assert max(len(line["step"]) for group in series["groups"] for line in group["lines"]) <= 400


@pytest.mark.long
def test_a_refresh_costs_little_more_after_many_updates():
    def seconds_of_a_refresh(history: History) -> float:
        builder = SeriesBuilder(history)
        builder.series(10**6)
        seconds = []
        for step in range(10):
            history.append(update(200_000 + step))
            start = time.process_time()
            builder.series(10**6)
            seconds.append(time.process_time() - start)
        return min(seconds)

    # A hundred times the updates, and both already fill the points that a line may have.
    assert seconds_of_a_refresh(long_history(100_000)) < 20 * seconds_of_a_refresh(long_history(1_000))


# In a browser

# Background of the page, of what floats above it, and text, as JupyterLab's themes give them; plain has none of them.
THEMES = {"light": ("white", "white", "rgba(0, 0, 0, 1)"), "dark": ("#111", "#212121", "rgba(255, 255, 255, 1)")}
PLAIN = "plain"
WIDTHS = (320, 900)
# What anywidget gives to a view, and no more.
PAGE = """<!doctype html><meta charset="utf-8"><style>%(style)s body { margin: 0 } #cell { padding: 6px }</style>
<body><div id="cell"></div><script type="module">
import widget from "/curves.js";
const state = %(state)s, heard = {};
window.sent = [];
let unsent = {};
window.change = (name, value) => {
    if (state[name] === value) return;
    state[name] = value;
    for (const callback of heard[`change:${name}`] ?? []) callback();
};
window.model = {
    get: name => state[name],
    set(name, value) {
        unsent[name] = value;
        change(name, value);
    },
    save_changes() { window.sent.push(unsent); unsent = {}; },
    on(name, callback) { (heard[name] ??= []).push(callback); },
    off(name, callback) { heard[name] = heard[name].filter(one => one !== callback); },
};
window.close_view = widget.render({ model: window.model, el: document.querySelector("#cell") });
window.ready = true;
</script></body>"""


def page_of(series: dict, theme: str) -> str:
    style = ""
    if theme in THEMES:
        page, above, text = THEMES[theme]
        style = f":root {{ --jp-layout-color0: {page}; --jp-layout-color1: {above}; --jp-ui-font-color0: {text} }}"
        style += f" body {{ background: {page}; color: {text} }}"
    state = {"series": series, "scale": "linear", "axis": "update", "group": "loss", "lines": "all"}
    state["selected"] = None
    return PAGE % {"style": style, "state": json.dumps(state, allow_nan=False).replace("<", "\\u003c")}


@pytest.fixture
def opened(browser):
    """Open a page with the curves of a history; at the end nothing may have gone wrong or elsewhere."""
    pages, wrong = [], []

    def open_page(series: dict, theme: str = "light", width: int = 900):
        page = browser.new_page(viewport={"width": width, "height": 340}, device_scale_factor=2)
        pages.append(page)
        answers = {"/curves.js": (SCRIPT, "text/javascript"), "/": (page_of(series, theme), "text/html")}

        def answer(route):
            body, kind = answers.get(route.request.url.removeprefix("http://curves.test"), (None, None))
            if body is None:
                wrong.append(f"request for {route.request.url}")
                route.abort()
            else:
                route.fulfill(body=body, content_type=f"{kind}; charset=utf-8")

        page.route("**/*", answer)
        page.on("pageerror", lambda error: wrong.append(f"script error {error}"))
        page.on("console", lambda message: wrong.append(f"console {message.text}"))
        page.goto("http://curves.test/")
        page.wait_for_function("window.ready")
        return page

    yield open_page
    for page in pages:
        page.close()
    assert wrong == []


def told_history(updates: int = 140) -> History:
    """A run that learns, explodes, is rewound to a lower rate and learns on."""
    draw, history = random.Random(1), History([validation(0, 3.2)])

    def learn(first: int, last: int, explode: bool = False) -> None:
        for step in range(first, last + 1):
            loss = 1.6 + 0.14 * (step - first) if explode else 0.9 + 2.2 * math.exp(-step / 60) + draw.gauss(0, 0.12)
            rate = 1e-4 * min(1, step / 20) * (0.5 + 0.5 * math.cos(math.pi * step / 300))
            margin = {"rewards/margin": math.sin(step / 9)}
            history.append(update(step, loss, margin, learning_rate=rate, tokens=1300 + step, seconds=1.3))
            if step % 20 == 0:
                history.append(validation(step, 1.05 + 2 * math.exp(-step / 50) + max(0, step - 100) / 200))
                history.append(AdapterSaved(step, "adapters/pirate", "last"))

    learn(1, 70)
    kept = len(history.in_effect)
    learn(71, 92, explode=True)
    history.append(Rewound(70, 92, kept))
    history.append(SettingChanged(70, "learning_rate", 1e-4, 5e-5))
    learn(71, updates)
    return history


@pytest.fixture(scope="module")
def told():
    return series_of(told_history(), 200)


def place_of(page, update: int, steps: int = 200) -> tuple[float, float]:
    """Where an update is on the axis of updates, in the middle of the chart."""
    axis = page.evaluate(
        """() => {
            const path = document.querySelector('path[stroke-opacity="0.6"]').getBoundingClientRect();
            const chart = document.querySelector(".mlx-nb-chart").getBoundingClientRect();
            return [path.left, path.width, (chart.top + chart.bottom) / 2];
        }"""
    )
    return axis[0] + axis[1] * update / steps, axis[2]


def show(page, **state) -> None:
    """Change the state as the kernel does."""
    page.evaluate("state => Object.entries(state).forEach(([name, value]) => change(name, value))", state)


# Each piece of text: what it says, its ratio of contrast as WCAG 2 defines it, and its box.
TEXTS = """() => {
    const parse = text => {
        const numbers = text.match(/[\\d.]+/g).map(Number);
        return numbers.length < 4 ? [...numbers, 1] : numbers;
    };
    const over = (top, under) => under.map((value, index) => top[3] * top[index] + (1 - top[3]) * value);
    const luminance = color => {
        const [r, g, b] = color.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const found = [];
    const walker = document.createTreeWalker(document.querySelector("#cell"), NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const parent = walker.currentNode.parentElement;
        if (!walker.currentNode.textContent.trim() || parent.closest("style, title, option")) continue;
        const range = document.createRange();
        range.selectNodeContents(walker.currentNode);
        const box = range.getBoundingClientRect();
        let ground = [255, 255, 255], opacity = 1;
        const chain = [];
        for (let node = parent; node; node = node.parentElement) chain.unshift(getComputedStyle(node));
        for (const style of chain) {
            ground = over(parse(style.backgroundColor), ground);
            opacity *= Number(style.opacity);
        }
        const style = chain.at(-1);
        const ink = parse(parent.closest("svg") ? style.fill : style.color);
        const [dark, bright] = [luminance(ground), luminance(over([...ink.slice(0, 3), ink[3] * opacity], ground))]
            .sort((a, b) => a - b);
        found.push({
            text: walker.currentNode.textContent, ratio: (bright + 0.05) / (dark + 0.05),
            box: [box.left, box.top, box.right, box.bottom], inChart: parent.tagName === "text",
        });
    }
    return found;
}"""


def assert_all_can_be_read(page, width: int) -> None:
    """Text has contrast, lies within the cell and, in the chart, apart from other text."""
    assert page.evaluate("document.documentElement.scrollWidth") == width
    texts = page.evaluate(TEXTS)
    assert len(texts) > 8
    assert [one["text"] for one in texts if one["ratio"] < 4.5] == []
    cell, chart = (page.locator(name).bounding_box() for name in ("#cell", ".mlx-nb-chart"))
    for one in texts:
        left, top, right, bottom = one["box"]
        frame = chart if one["inChart"] else cell
        assert frame["x"] <= left, one
        assert frame["y"] <= top, one
        assert right <= frame["x"] + frame["width"], one
        assert bottom <= frame["y"] + frame["height"], one
    labels = [one for one in texts if one["inChart"] and not one["text"].startswith("best")]
    for index, one in enumerate(labels):
        for other in labels[index + 1 :]:
            a, b = one["box"], other["box"]
            apart = a[2] <= b[0] or b[2] <= a[0] or a[3] - 3 <= b[1] or b[3] - 3 <= a[1]
            assert apart, (one["text"], other["text"])


@pytest.mark.browser
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("theme", [*THEMES, PLAIN])
def test_every_curve_on_every_axis_can_be_read(theme, width, told, opened, screenshot):
    page = opened(told, theme, width)
    for group in [*GROUPS, "rewards/margin"]:
        for scale in ("linear", "log"):
            for axis in ("update", "tokens", "time"):
                show(page, group=group, scale=scale, axis=axis)
                page.mouse.move(*place_of(page, 120))
                assert page.locator(".mlx-nb-tip").is_visible()
                assert_all_can_be_read(page, width)
    show(page, group="loss", scale="linear", axis="update")
    page.mouse.click(*place_of(page, 60))
    page.mouse.move(*place_of(page, 111))
    screenshot(page, f"curves_{theme}_{width}")
    page.get_by_role("button", name="Log").click()
    page.get_by_role("button", name="Time").click()
    screenshot(page, f"curves_log_{theme}_{width}")


@pytest.mark.browser
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("theme", [*THEMES, PLAIN])
@pytest.mark.parametrize("method", ["dpo", "kto", "grpo"])
def test_the_curves_of_a_method_can_be_read_and_chosen(method, theme, width, opened, screenshot):
    series = series_of(method_history(method), 60, METHODS[method].metrics)
    page = opened(series, theme, width)
    page.set_viewport_size({"width": width, "height": 500})
    for group in series["groups"]:
        show(page, group=group["name"])
        page.mouse.move(*place_of(page, 30, 60))
        assert_all_can_be_read(page, width)
        assert page.locator(".mlx-nb-help").inner_text() == group["help"]
    for name in series["shown"]:
        button = page.get_by_role("group", name="what says most").get_by_role(
            "button", name=name.replace("_", " "), exact=True
        )
        button.click()
        assert page.evaluate("model.get('group')") == name
        assert button.get_attribute("aria-pressed") == "true"
    screenshot(page, f"curves_{method}_{theme}_{width}")


@pytest.mark.browser
def test_the_best_validation_of_a_reward_is_the_highest(opened):
    history = method_history("grpo")
    page = opened(series_of(history, 60, METHODS["grpo"].metrics))
    show(page, group="reward")
    best = max(row["reward"] for row in history.evaluations("valid"))
    assert page.locator(".mlx-nb-best").text_content() == f"best {best:.4g}"
    show(page, group="kl")
    assert page.locator(".mlx-nb-best").count() == 0


@pytest.mark.browser
@pytest.mark.parametrize("width", WIDTHS)
def test_a_long_number_at_the_end_of_the_axis_stays_in_the_cell(width, opened):
    page = opened(series_of(History([update(1, -1.2345e-7, seconds=0.005)]), 1), "light", width)
    show(page, axis="time")
    assert page.locator(".mlx-nb-chart > text", has_text="0.005").count() == 1
    assert_all_can_be_read(page, width)


@pytest.mark.browser
@pytest.mark.parametrize(("updates", "heavier"), [(6, "raw"), (160, "train")])
def test_few_updates_are_the_curve_and_of_many_it_is_their_average(updates, heavier, opened):
    page = opened(series_of(History(update(step, 1 / step) for step in range(1, updates + 1)), 60))
    wide = {role: float(page.locator(f"path.mlx-nb-{role}").get_attribute("stroke-width")) for role in ("raw", "train")}
    assert max(wide, key=wide.get) == heavier


@pytest.mark.browser
def test_the_chart_draws_what_the_history_holds(told, opened):
    page = opened(told)
    raw = page.locator("path.mlx-nb-raw").get_attribute("d")
    assert raw.count("M") + raw.count("L") == 140
    assert page.locator("path.mlx-nb-valid").get_attribute("stroke-dasharray") == "6 4"
    assert page.locator("path.mlx-nb-left").count() == 1
    assert page.locator(".mlx-nb-legend").inner_text().split("\n") == [
        "train, each update",
        "train, smoothed",
        "validation",
        "rewound",
    ]
    valid = {row["step"]: row["loss"] for row in told_history().evaluations("valid")}
    best = min(valid, key=valid.get)
    assert page.locator(".mlx-nb-best").text_content() == f"best {valid[best]:.4g}"
    marks = [title.evaluate("title => title.textContent") for title in page.locator(".mlx-nb-mark title").all()]
    assert "went back from update 92 to 70" in marks
    assert "update 70: learning_rate changed from 0.0001 to 5e-05" in marks
    last = told["groups"][0]["lines"][0]["value"][-1]
    assert page.get_by_role("slider").get_attribute("aria-label") == f"loss: latest loss {last} at update 140"
    assert page.get_by_label("curve").locator("option").all_inner_texts() == [*GROUPS, "rewards/margin"]


@pytest.mark.browser
def test_the_pointer_shows_the_values_of_the_nearest_update_and_a_click_selects_it(told, opened):
    page = opened(told)
    tip = page.locator(".mlx-nb-tip")
    assert not tip.is_visible()
    history = told_history()
    page.mouse.move(*place_of(page, 100))
    lines = tip.inner_text().split("\n")
    tokens = sum(history["tokens"][:100])
    assert lines[:2] == ["update 100", f"{tokens / 1000:.4g}K tokens, 2.17 minutes"]
    assert f"{history['loss'][99]:.5g}" in tip.inner_text()
    assert "update 100: saved last adapter to adapters/pirate" in tip.inner_text()
    page.mouse.move(*place_of(page, 105))
    assert "validation at 100" in tip.inner_text()
    page.mouse.click(*place_of(page, 100))
    assert page.evaluate("window.sent") == [{"selected": 100}]
    page.mouse.click(*place_of(page, 100))
    page.mouse.click(*place_of(page, 20))
    assert page.evaluate("window.sent") == [{"selected": 100}, {"selected": None}, {"selected": 100}, {"selected": 20}]
    page.mouse.move(3, 3)
    assert not tip.is_visible()
    assert page.locator('path[stroke-dasharray="none"]').count() == 1
    show(page, selected=None)
    assert page.locator('path[stroke-dasharray="none"]').count() == 0


@pytest.mark.browser
def test_the_keyboard_does_what_the_pointer_does_and_tells_the_notebook_nothing(told, opened):
    page = opened(told)
    page.evaluate("() => { window.keys = []; document.addEventListener('keydown', e => window.keys.push(e.key)); }")
    for _ in range(6):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Time"
    page.keyboard.press("Enter")
    assert page.evaluate("model.get('axis')") == "time"
    assert page.get_by_role("button", name="Time").get_attribute("aria-pressed") == "true"
    for _ in range(4):  # by the choice of lines to the chart
        page.keyboard.press("Tab")
    chart = page.get_by_role("slider")
    for key, update_shown in (("ArrowLeft", 140), ("ArrowLeft", 139), ("Home", 1), ("ArrowRight", 2), ("End", 140)):
        page.keyboard.press(key)
        assert chart.get_attribute("aria-valuenow") == str(update_shown)
        assert chart.get_attribute("aria-valuetext").startswith(f"update {update_shown}, ")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.evaluate("window.sent.at(-1)") == {"selected": 140}
    page.keyboard.press("Escape")
    assert not page.locator(".mlx-nb-tip").is_visible()
    assert set(page.evaluate("window.keys")) == {"Tab"}
    page.keyboard.press("Control+s")
    assert "s" in page.evaluate("window.keys")


@pytest.mark.browser
def test_a_log_scale_leaves_out_what_has_no_logarithm(opened):
    history = History(update(step, loss) for step, loss in enumerate([1.0, 0.0, 10.0, -5.0, 100.0, 1000.0], start=1))
    page = opened(series_of(history, 6))
    page.get_by_role("button", name="Log").click()
    assert page.evaluate("window.sent") == [{"scale": "log"}]
    path = page.locator("path.mlx-nb-raw").get_attribute("d")
    heights = [float(height) for height in re.findall(r"[ML][\d.]+ ([\d.]+)", path)]
    assert len(heights) == 4
    assert path.count("M") == 3
    # Decades are evenly apart.
    assert np.diff(heights) == pytest.approx([heights[1] - heights[0]] * 3, abs=0.2)
    assert [text for text in page.locator(".mlx-nb-chart > text").all_text_contents() if text.startswith("10")] == [
        "10",
        "100",
        "1000",
    ]


@pytest.mark.browser
def test_a_curve_grows_under_the_pointer_and_fits_a_changing_cell(told, opened):
    history = History([update(step, 2.0 - step / 100) for step in range(1, 31)])
    page = opened(series_of(history, 1000))
    page.mouse.move(*place_of(page, 20, 31.25))
    page.get_by_label("curve").focus()
    assert page.locator(".mlx-nb-tip").inner_text().startswith("update 20\n")
    for step in range(31, 61):
        history.append(update(step, 1.5))
    show(page, series=series_of(history, 1000))
    assert page.locator(".mlx-nb-tip").inner_text().startswith("update 20\n")
    assert page.evaluate("document.activeElement.tagName") == "SELECT"
    page.get_by_label("curve").select_option("gradient norm")
    assert page.evaluate("window.sent") == [{"group": "gradient norm"}]
    for width in (1200, 500, 200):
        page.set_viewport_size({"width": width, "height": 340})
        page.wait_for_function(
            "width => document.querySelector('.mlx-nb-chart').clientWidth === width", arg=max(260, width - 16)
        )
    page.evaluate("close_view()")


@pytest.mark.browser
def test_without_updates_the_chart_says_so(opened, screenshot):
    page = opened(series_of(History([validation(0, 2.0)]), 20))
    assert page.get_by_role("slider").get_attribute("aria-label") == "loss: no update yet"
    page.mouse.click(*place_of(page, 0))
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    assert page.evaluate("window.sent") == []
    empty = opened(series_of(History(), 0))
    assert "no update yet" in empty.locator(".mlx-nb-chart").text_content()
    screenshot(empty, "curves_empty")


@pytest.mark.browser
def test_names_are_text_and_never_markup(opened):
    attack = '<img src=x onerror="window.pwned = 1"><script>window.pwned = 2</script>'
    history = History([update(1, 1.0, {attack: 1.0}), AdapterSaved(1, attack, attack), update(2, 1.0, {attack: 2.0})])
    page = opened(series_of(history, 2))
    page.get_by_label("curve").select_option(attack)
    page.mouse.move(*place_of(page, 1, 2))
    assert attack in page.locator(".mlx-nb-tip").inner_text()
    assert page.locator("#cell img, #cell script").count() == 0
    assert page.evaluate("window.pwned") is None
