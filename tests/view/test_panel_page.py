"""The page of the panel in Chromium: what it shows of a state, what a click sends, what it says of a dead kernel."""

from __future__ import annotations

import copy
import json
import re

import pytest

from mlx_nb.events import SampleGenerated
from panel_pages import PLAIN, THEMES, answer_all, open_panel
from runs import rows_run

pytestmark = pytest.mark.browser
RUNNING = {
    "clicks": ["pause", "stop", "save", "evaluate", "sample", "rewind", "set", "keep", "chat"],
    "activity": {"words": "computing update 4", "done": 0, "total": 0, "left": None, "update": 4},
}
OVERFLOW = """() => [...document.querySelectorAll('.mlx-nb-panel *')].filter((one) => {
    const box = one.getBoundingClientRect();
    return box.width && box.right > innerWidth + 1 && !one.closest('.mlx-nb-row, .mlx-nb-scrolls, svg');
}).map((one) => one.className)"""


@pytest.fixture
def run(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, val_set_size=4, iters=20, steps_per_eval=4)
    run.step(3)
    for step, answer in ((0, "I am sorry."), (2, "light(hall)"), (3, "light(hall, dim)")):
        run.history.append(SampleGenerated(step, "Dim the hall", answer, "I am sorry."))
    return run


@pytest.fixture
def opened(browser, run):
    pages, wrong = [], []
    panel = run.panel()
    panel.show_again("samples")
    panel.refresh()

    def open_page(theme="light", width=900, **changed):
        if changed.get("clicks"):
            changed["head"] = {**panel.head, "state": "running", "sign": "▶"}
        page = open_panel(browser, panel, theme, width, wrong=wrong, **changed)
        page.evaluate("deliver({ kind: 'beat', seconds: 3 })")
        pages.append(page)
        return page

    open_page.panel = panel
    yield open_page
    del panel.send
    for page in pages:
        page.close()
    assert wrong == []


def sent(page):
    return [
        one
        for one in page.evaluate("window.sent")
        if one.get("do") not in ("open", "shut", "whole") and "show" not in one
    ]


# In a window of 700 px JupyterLab leaves 584 px for an output.
@pytest.mark.parametrize("width", [596, 700, 1100, 1600])
@pytest.mark.parametrize("theme", [*THEMES, PLAIN])
def test_every_page_fits_and_has_one_left_edge(theme, width, opened):
    page = opened(theme, width, **RUNNING)
    assert in_one_line(page, "[role=tab]")
    lefts = set()
    for name in opened.panel.tabs:
        page.get_by_role("tab", name=name).click()
        answer_all(page, opened.panel)
        answer_all(page, opened.panel)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(OVERFLOW) == []
        frame = page.locator("[role=tabpanel]:not([hidden])")
        lefts.add(round(frame.bounding_box()["x"]))
        assert frame.inner_text().strip() or name == "Curves"
    for part in (".mlx-nb-title", ".mlx-nb-toolbar", ".mlx-nb-progress", ".mlx-nb-tabs"):
        lefts.add(round(page.locator(part).bounding_box()["x"]))
    assert len(lefts) == 1
    assert in_one_line(page, ".mlx-nb-toolbar button:visible")


def in_one_line(page, what):
    """Whether nothing wraps alone."""
    return len({round(one.bounding_box()["y"]) for one in page.locator(what).all()}) == 1


# A method that samples has a page more.
@pytest.mark.parametrize("width", [540, 596, 640, 700])
def test_eight_tabs_are_in_one_line(width, opened):
    tabs = opened.panel.tabs
    page = opened("light", width, tabs=[*tabs[:2], "Completions", *tabs[2:]])
    assert page.get_by_role("tab").count() == 8
    assert in_one_line(page, "[role=tab]")


def test_no_tab_moves_when_another_is_chosen(opened):
    page = opened("light", 700)
    places = []
    for name in opened.panel.tabs:
        page.get_by_role("tab", name=name).click()
        places.append([one.bounding_box() for one in page.get_by_role("tab").all()])
    assert all(place == places[0] for place in places)


def test_no_time_left_is_reported_below_a_second(opened):
    reported = {"words": "loading the model: libraries, 3 of 5", "done": 3, "total": 5, "left": 4.0, "update": 0}
    page = opened(**{**RUNNING, "activity": reported})
    doing = page.locator(".mlx-nb-doing > span")
    assert "left" in doing.inner_text()
    page.evaluate("told => change('activity', told)", {**reported, "left": 0.04})
    page.wait_for_timeout(300)
    assert "left" not in doing.inner_text()


def test_warnings_and_notes_of_the_start_stand_in_the_head(opened):
    page = opened()
    notes = [[True, "`learning_rate: 10000` …"], [False, "Left out of train: 1 row. row 3: <b>"]]
    page.evaluate("notes => change('head', { ...model.get('head'), notes })", notes)
    shown = page.get_by_role("note").locator("> div")
    assert shown.all_inner_texts() == ["⚠ `learning_rate: 10000` …", "Left out of train: 1 row. row 3: <b>"]
    page.evaluate("change('head', { ...model.get('head'), notes: [] })")
    assert not page.get_by_role("note").is_visible()


def test_the_buttons_of_each_checkpoint_are_whole_where_the_notebook_is_narrow(opened):
    """As beside an open side bar; and what is disabled says why."""
    page = opened("light", 320)
    page.get_by_role("tab", name="Checkpoints").click()
    buttons = page.locator(".mlx-nb-acts button")
    assert buttons.count() >= 3
    for at in range(buttons.count()):
        box = buttons.nth(at).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 320
    step = int(page.locator(".mlx-nb-acts tbody td").first.inner_text())
    page.evaluate("(step) => change('progress', { ...model.get('progress'), step })", step)
    assert buttons.first.inner_text() == "The run is here"
    assert buttons.first.is_disabled()


def test_what_is_being_done_for_a_paused_run_can_be_cancelled_and_the_run_is_not_said_to_run(opened):
    reported = {
        "words": "answering the sample prompts: 3 of at most 64 tokens",
        "done": 3,
        "total": 64,
        "left": 9,
        "update": 0,
    }
    page = opened(activity=reported)
    page.evaluate("change('clicks', ['cancel', 'run', 'step', 'sample'])")
    assert "running" not in page.get_by_role("status").inner_text()
    assert page.locator(".mlx-nb-doing").inner_text().startswith("answering the sample prompts: 3 of at most 64 tokens")
    assert page.get_by_role("button", name="Run", exact=False).first.is_enabled()
    page.get_by_role("button", name="Cancel").click()
    assert {"do": "cancel"} in sent(page)
    page.evaluate("change('clicks', ['run'])")
    assert not page.get_by_role("button", name="Cancel").is_visible()


def test_a_batch_does_not_stay_under_another_list(opened):
    page = opened()
    page.get_by_role("tab", name="Rows").click()
    page.get_by_role("button", name="Next batch").click()
    answer_all(page, opened.panel)
    assert page.locator(".mlx-nb-row .mlx-nb-batch").count() == 1
    page.get_by_role("button", name="All rows").click()  # and the kernel has not answered
    assert page.locator(".mlx-nb-row .mlx-nb-batch").count() == 0


@pytest.mark.parametrize(("theme", "dark"), [("light", False), ("dark", True), (PLAIN, False)])
def test_the_colors_are_those_of_the_page(theme, dark, opened):
    page = opened(theme)
    page.wait_for_timeout(100)
    assert ("mlx-nb-dark" in page.locator(".mlx-nb-panel").get_attribute("class")) is dark
    stroke = page.locator("path.mlx-nb-raw").evaluate("path => getComputedStyle(path).stroke")
    assert stroke == ("rgb(86, 180, 233)" if dark else "rgb(0, 114, 178)")


def test_tabs_are_worked_with_the_keyboard_and_no_key_reaches_the_notebook(opened):
    page = opened()
    page.evaluate("() => { window.keys = []; document.addEventListener('keydown', e => window.keys.push(e.key)); }")
    page.get_by_role("tab", name="Curves").focus()
    for key, name in (
        ("ArrowRight", "Rows"),
        ("End", "Log"),
        ("ArrowRight", "Curves"),
        ("ArrowLeft", "Log"),
        ("Home", "Curves"),
    ):
        page.keyboard.press(key)
        tab = page.get_by_role("tab", name=name)
        assert tab.get_attribute("aria-selected") == "true"
        assert page.evaluate("document.activeElement.textContent") == name
        assert page.locator(f"[id='{tab.get_attribute('aria-controls')}']").is_visible()
        assert page.evaluate("model.get('tab')") == name
    page.keyboard.press("d")
    page.keyboard.press("Shift+Enter")
    assert page.evaluate("window.keys") == []
    assert page.locator(".mlx-nb-panel").get_attribute("data-lm-suppress-shortcuts") == "true"
    assert page.locator(".mlx-nb-notice").get_attribute("aria-live") == "polite"


def test_clicks_are_acknowledged_in_the_page_and_their_result_follows(opened):
    page = opened(**RUNNING)
    said = page.locator(".mlx-nb-notice")
    page.get_by_role("button", name="Pause").click()
    assert said.inner_text() == "pausing after this update …"
    page.get_by_role("button", name="Save").click()
    assert said.inner_text() == "saving after this update …"
    assert sent(page) == [{"do": "pause"}, {"do": "save"}]
    page.evaluate("change('notice', { count: 9, text: 'saved to adapters/bees', bad: false })")
    assert said.inner_text() == "saved to adapters/bees"
    page.evaluate("change('notice', { count: 10, text: 'the disk is full', bad: true })")
    assert "mlx-nb-bad" in said.get_attribute("class")
    assert page.get_by_role("button", name="▶ Run").is_disabled()


def test_what_cannot_be_undone_is_asked_once_in_place(opened):
    page = opened()
    page.get_by_role("button", name="Stop").click()
    assert page.evaluate("document.activeElement.textContent") == "Stop the run"
    page.get_by_role("button", name="Cancel").click()
    assert page.evaluate("document.activeElement.textContent") == "■ Stop"
    assert sent(page) == []
    page.get_by_label("updates to go back").fill("2")
    page.get_by_role("button", name="Rewind").first.click()
    assert "from update 3 to 1? The run drops updates 2 to 3" in page.locator(".mlx-nb-confirm").inner_text()
    page.locator(".mlx-nb-confirm").get_by_role("button", name="Rewind").click()
    assert sent(page) == [{"do": "rewind", "to": 1}]
    page.get_by_role("tab", name="Checkpoints").click()
    page.get_by_role("button", name="Delete").first.click()
    assert page.get_by_role("button", name="Delete it").is_visible()
    page.keyboard.press("Escape")
    assert page.get_by_role("button", name="Delete it").count() == 0
    assert len(sent(page)) == 1


def test_a_silent_kernel_is_shown_as_gone_and_never_as_running(opened):
    page = opened(**RUNNING)
    assert "running" in page.get_by_role("status").inner_text()
    page.evaluate("() => { const now = Date.now; Date.now = () => now() + 60000; }")
    page.wait_for_selector("text=✗ kernel gone")
    assert "running" not in page.locator(".mlx-nb-panel").inner_text()
    assert re.search(r"kernel gone since \d\d:\d\d:\d\d; this", page.locator(".mlx-nb-failure").inner_text())
    assert "Resume with %finetune resume" in page.locator(".mlx-nb-failure").inner_text()
    assert page.locator(".mlx-nb-toolbar button:enabled").count() == 0
    assert page.locator("path.mlx-nb-raw").is_visible()
    assert "mlx-nb-live" not in page.locator(".mlx-nb-panel").get_attribute("class")
    page.evaluate("deliver({ kind: 'beat', seconds: 3 })")
    assert "running" in page.get_by_role("status").inner_text()


def test_a_page_that_never_hears_the_kernel_does_not_say_that_it_runs(browser, run):
    panel = run.panel()
    page = open_panel(browser, panel, head={**panel.head, "state": "running", "sign": "▶"}, **RUNNING)
    assert page.get_by_role("status").inner_text() == "… connecting to the kernel"
    page.evaluate("() => { const now = Date.now; Date.now = () => now() + 60000; }")
    page.wait_for_selector("text=✗ kernel gone")
    page.close()


def test_answers_stand_side_by_side_with_their_differences_marked(opened):
    page = opened()
    page.get_by_role("tab", name="Samples").click()
    assert page.locator(".mlx-nb-answers th").all_inner_texts() == ["base", "update 0", "update 2", "update 3"]
    assert page.locator(".mlx-nb-answers mark").all_inner_texts() == ["light(hall)", "light(hall,", "dim)"]


def test_a_row_is_requested_once_and_then_answers_in_the_page(opened):
    page, panel = opened(), opened.panel
    page.get_by_role("tab", name="Rows").click()
    answer_all(page, panel)
    entries = page.locator(".mlx-nb-entry")
    assert entries.count() == len(panel.latest["rows"])
    for at in (1, 0, 1):
        entries.nth(at).click()
        answer_all(page, panel)
        row, _, where = panel.latest["rows"][at]
        assert page.locator(".mlx-nb-row b").first.inner_text().startswith(f"train row {row} ({where})")
        assert page.evaluate("model.get('selection').row") == row
    asked = [one["row"] for one in page.evaluate("window.sent") if one.get("show") == "row"]
    assert sorted(asked) == sorted(row for row, _, _ in panel.latest["rows"][:2])


def test_new_points_are_added_to_those_of_the_page(opened, run):
    page, panel = opened(), opened.panel
    messages = []
    panel.send = lambda content, buffers=None: messages.append(copy.deepcopy(content))
    run.step(4)
    panel._drawn_at = 0.0
    panel.refresh()
    for message in messages:
        page.evaluate("message => deliver(message)", message)
    path = page.locator("path.mlx-nb-raw").get_attribute("d")
    assert path.count("M") + path.count("L") == 7
    lost = {"kind": "series", "from": 990, "version": 991, "changes": {"lines": [], "clocks": []}}
    page.evaluate("message => deliver(message)", lost)
    assert page.evaluate("window.sent.at(-1)") == {"do": "whole"}


def test_a_chat_says_what_it_does_and_can_be_ended(opened):
    page = opened()
    page.get_by_role("tab", name="Chat").click()
    page.get_by_label("message").fill("Turn it off")
    page.keyboard.press("Enter")
    assert sent(page) == [{"do": "chat", "text": "Turn it off", "base": False}]
    turns = [
        {"role": "user", "content": "Turn it off", "by": "", "update": 3, "done": True},
        {"role": "assistant", "content": "light(", "by": "model", "update": 3, "done": False},
    ]
    page.evaluate(f"change('talk', {json.dumps(turns)})")
    assert page.locator(".mlx-nb-who").all_inner_texts() == ["you", "model at update 3"]
    page.get_by_role("button", name="Stop answering").click()
    assert sent(page)[-1] == {"do": "enough"}
    box, field = page.locator(".mlx-nb-talk").bounding_box(), page.get_by_label("message").bounding_box()
    assert field["y"] >= box["y"] + box["height"]


def test_texts_are_text_and_never_markup(browser, run):
    attack = '<img src=x onerror="window.pwned = 1"><script>window.pwned = 2</script>'
    panel = run.panel()
    sample = {"prompt": attack, "base": attack, "answers": [[1, attack + " more"]]}
    turn = {"role": "user", "content": attack, "by": "", "update": 1, "done": True}
    head = {**panel.head, "name": attack, "failure": attack, "facts": [attack]}
    page = open_panel(
        browser, panel, head=head, samples=[sample], talk=[turn], notice={"count": 1, "text": attack, "bad": True}
    )
    for name in panel.tabs:
        page.get_by_role("tab", name=name).click()
        page.wait_for_timeout(20)
    assert page.locator("#cell img, #cell script").count() == 0
    assert page.evaluate("window.pwned") is None
    page.close()
