"""The quickstart by hand in a real JupyterLab: cells and clicks while it trains, and what a reopened page shows."""

from __future__ import annotations

import shutil
import time

import nbformat
import pytest

from lab_pages import TEXT_OF_CELL, cell_answers, wait_for_state
from places import NOTEBOOKS

pytestmark = [pytest.mark.browser, pytest.mark.real_model]
TRAINING = (
    "%%finetune --name home -o run\nmodel: smollm2-135m\ndata: home_requests\niters: 16\nbatch_size: 2\n"
    'learning_rate: 5e-4\nsteps_per_eval: 8\nval_batches: 2\nsample_prompts: ["Dim the light"]\nsample_tokens: 8'
)
DONE = "() => Number(/update (\\d+) of/.exec(document.body.innerText)?.[1] ?? -1)"


def test_the_quickstart_is_worked_by_hand(lab, tmp_path):
    shutil.copytree(NOTEBOOKS / "home_requests", lab.folder / "home_requests", dirs_exist_ok=True)
    cells = [
        "%load_ext mlx_nb",
        TRAINING,
        "print('answer', 6 * 7)",
        "print('slowest', max(run.history['seconds']))",
        "print('changed', [e.new for e in run.history.events if type(e).__name__ == 'SettingChanged'])",
    ]
    page = lab.open(cells)
    lab.run_cell(page, 0)
    lab.run_cell(page, 1)
    wait_for_state(page, "running")
    page.wait_for_function(DONE.replace("?? -1)", "?? -1) >= 2"))
    # Another cell answers while it trains.
    answered = cell_answers(page, lab, 2, "answer 42")
    cell_answers(page, lab, 3, "slowest")
    step = float(page.evaluate(TEXT_OF_CELL, 3).split("slowest")[1].split("|")[0])
    assert answered < 2 * step + 1.0
    # Pause.
    page.get_by_role("button", name="Pause").click()
    page.wait_for_selector("text=/pausing after this update|paused after update/", timeout=5000)
    paused = wait_for_state(page, "paused")
    assert paused < 2 * step + 1.0
    print(f"slowest update {step:.2f} s; a cell answered after {answered:.2f} s, Pause acted after {paused:.2f} s")
    at = page.evaluate(DONE)
    # Step: exactly one.
    page.get_by_role("button", name="Step", exact=True).click()
    page.wait_for_function(f"{DONE.replace('() =>', '() => (')}) === {at + 1}")
    wait_for_state(page, "paused")
    time.sleep(1)
    assert page.evaluate(DONE) == at + 1
    # A changed learning rate is recorded.
    page.locator(".mlx-nb-tabs").get_by_text("Settings").click()
    field = page.get_by_label("learning_rate", exact=True)
    field.fill("2e-4")
    field.press("Enter")
    page.wait_for_selector("text=from the next update on")
    cell_answers(page, lab, 4, "changed [0.0002]")
    # Rows, with masks.
    page.locator(".mlx-nb-tabs").get_by_text("Rows").click()
    page.wait_for_selector(".mlx-nb-tokens")
    # Samples.
    page.locator(".mlx-nb-tabs").get_by_text("Samples").click()
    page.wait_for_selector(".mlx-nb-answers >> text=base")
    assert page.get_by_text("Dim the light").first.is_visible()
    # Run on, and Jupyter's own interrupt.
    page.locator(".mlx-nb-tabs").get_by_text("Curves").click()
    page.get_by_role("button", name="▶ Run").click()
    wait_for_state(page, "running")
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:interrupt-kernel')")
    wait_for_state(page, "paused")
    page.get_by_role("button", name="▶ Run").click()
    wait_for_state(page, "finished", timeout=180)
    page.wait_for_function(
        """() => {
            const node = window.jupyterapp.shell.currentWidget.content.widgets[1].outputArea.node;
            return node.querySelector('img') && node.textContent.includes('home: finished after update 16');
        }""",
    )
    name = page.evaluate("() => window.jupyterapp.shell.currentWidget.context.path")
    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    time.sleep(2)
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    page.close()
    outputs = nbformat.read(lab.folder / name, 4).cells[1].outputs
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert {"image/png", "text/html"} <= kinds
    # Reopened, without the kernel that trained: summary and figure are there.
    again = lab.reopen(name)
    assert again.get_by_text("home: finished after update 16").first.is_visible()
    assert again.locator(".jp-OutputArea img").first.is_visible()
    assert not again.get_by_text("Error displaying widget").is_visible()
    again.close()
