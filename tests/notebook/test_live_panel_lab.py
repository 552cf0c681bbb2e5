"""The panel in a real JupyterLab while updates take long: what answers in the page, and what a dead kernel leaves."""

from __future__ import annotations

import json
import time

import pytest

from lab_pages import TEXT_OF_CELL, cell_answers, wait_for_state
from tiny import tiny_rows

pytestmark = pytest.mark.browser
SLOW = """import time
slow_update = run.trainer.stepper.update
def update(*told, **named):
    time.sleep(4)
    return slow_update(*told, **named)
run.trainer.stepper.update = update"""
# Milliseconds from a click to what it shows, as the page itself sees them.
ANSWER = """([act, shown]) => new Promise((resolve) => {
    const begun = performance.now();
    const look = () => {
        const spent = performance.now() - begun;
        document.querySelector(shown) || spent > 5000 ? resolve(spent) : setTimeout(look, 4);
    };
    document.querySelector(act).click();
    look();
})"""


@pytest.fixture
def training(lab, tiny_folder):
    """A page with a run whose updates take four seconds, in the middle of one."""
    (lab.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(40)))
    settings = f"model: {tiny_folder}\ndata: rows.jsonl\niters: 500\nsteps_per_eval: -1"
    body = f"%%finetune --paused --name bees -o run\n{settings}"
    cells = [
        "%load_ext mlx_nb",
        body,
        "run.step(3); print('ready')",
        SLOW,
        "%finetune run",
        "print(run.panel().selection)",
    ]
    page = lab.open(cells)
    for cell in range(3):
        lab.run_cell(page, cell)
    page.wait_for_function(f"() => ({TEXT_OF_CELL})(2).includes('ready')")
    lab.run_cell(page, 3)
    lab.run_cell(page, 4)
    wait_for_state(page, "running")
    time.sleep(1)
    yield page
    page.close()


def tab_of(page, name):
    return f"#{page.locator('.mlx-nb-panel').get_by_role('tab', name=name).get_attribute('id')}"


def panel_of(page, name):
    return (
        f"#{page.locator('.mlx-nb-panel').get_by_role('tab', name=name).get_attribute('aria-controls')}:not([hidden])"
    )


def assert_clicks_answer_at_once(page, lab):
    """While an update takes long: tabs, scales, and the acknowledgement of a pause."""
    page.wait_for_selector("text=computing update")
    took = {}
    for name in ("Rows", "Samples", "Chat", "Settings", "Checkpoints", "Log", "Curves"):
        took[name] = page.evaluate(ANSWER, [tab_of(page, name), panel_of(page, name)])
    for value in ("log", "tokens", "raw"):
        button = f".mlx-nb-bar button[value={value}]"
        took[value] = page.evaluate(ANSWER, [button, f"{button}[aria-pressed=true]"])
    took["pause"] = page.evaluate(ANSWER, [".mlx-nb-action[title^='pause after']", ".mlx-nb-notice:not(:empty)"])
    assert page.locator(".mlx-nb-notice").first.inner_text() == "pausing after this update …"
    print({name: round(milliseconds, 1) for name, milliseconds in took.items()})
    assert max(took.values()) < 100, took
    wait_for_state(page, "paused")
    page.wait_for_selector("text=paused after update")
    # What was clicked is readable from Python.
    page.locator(".mlx-nb-tabs").get_by_text("Rows").click()
    time.sleep(1)  # for the rows of the last update
    chosen = int(page.locator(".mlx-nb-entry").nth(1).inner_text().split()[1])
    page.locator(".mlx-nb-entry").nth(1).click()
    page.wait_for_selector(".mlx-nb-tokens")
    cell_answers(page, lab, 5, f"'row': {chosen}")


def assert_keys_and_focus_stay(page):
    """No key reaches the notebook, and no refresh takes the focus."""
    cells = page.evaluate("window.jupyterapp.shell.currentWidget.content.widgets.length")
    page.locator(".mlx-nb-tabs").get_by_text("Curves").focus()
    for key in ("Home", "ArrowRight", "d", "d", "a", "b", "x", "Enter"):
        page.keyboard.press(key)
    assert page.evaluate("document.activeElement.textContent") == "Rows"
    assert page.evaluate("window.jupyterapp.shell.currentWidget.content.widgets.length") == cells
    page.locator(".mlx-nb-tabs").get_by_text("Settings").click()
    field = page.get_by_label("learning_rate", exact=True)
    field.click()
    field.fill("3e-4")
    time.sleep(5)  # over the end of an update
    assert page.evaluate("document.activeElement.id").endswith("learning_rate")
    assert field.input_value() == "3e-4"
    page.get_by_role("button", name="Stop", exact=False).first.click()
    assert page.get_by_role("button", name="Stop the run").is_visible()
    page.keyboard.press("Escape")
    assert page.get_by_role("button", name="Stop the run").count() == 0
    assert "Stop" in page.evaluate("document.activeElement.textContent")


def assert_a_dead_kernel_leaves_the_last_state(page, lab):
    """And the way on; in a page that is opened again too."""
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    page.wait_for_selector("text=✗ kernel gone", timeout=40_000)
    assert "Resume with %finetune resume adapters/bees" in page.locator(".mlx-nb-failure").first.inner_text()
    page.locator(".mlx-nb-tabs").get_by_text("Curves").click()
    assert page.locator("path.mlx-nb-raw").first.is_visible()
    assert page.get_by_text("▶ running").count() == 0
    assert page.get_by_role("button", name="▶ Run").first.is_disabled()
    name = page.evaluate("() => window.jupyterapp.shell.currentWidget.context.path")
    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    time.sleep(2)
    page.close()
    again = lab.reopen(name)
    time.sleep(3)
    assert not again.get_by_text("Error displaying widget").is_visible()
    assert "bees" in again.evaluate(TEXT_OF_CELL, 1)
    again.close()


# One page for all of it: a second notebook would be opened beside the first, in the same workspace.
def test_the_panel_answers_at_once_keeps_keys_and_focus_and_says_when_its_kernel_is_gone(training, lab):
    assert_clicks_answer_at_once(training, lab)
    lab.run_cell(training, 4)
    wait_for_state(training, "running")
    assert_keys_and_focus_stay(training)
    assert_a_dead_kernel_leaves_the_last_state(training, lab)
