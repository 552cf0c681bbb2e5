"""The form for a new run in a real JupyterLab: its fields, its rows, and the cell that it writes."""

from __future__ import annotations

import json
import re

import pytest

from lab_pages import TEXT_OF_CELL, cell_answers, wait_for_state
from tiny import tiny_rows

pytestmark = pytest.mark.browser
CELLS = """() => window.jupyterapp.shell.currentWidget.content.widgets.map(one => one.model.sharedModel.getSource())"""


def test_a_cell_is_composed_in_the_form_and_written_below_it(lab, tiny_folder, screenshot):
    (lab.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(40)))
    cells = [
        "%load_ext mlx_nb\nimport json\nbees = [json.loads(line) for line in open('rows.jsonl')]",
        f"%finetune new model={tiny_folder}",
        "%finetune new --write",
        "6 * 7",
    ]
    page = lab.open(cells)
    lab.run_cell(page, 0)
    lab.run_cell(page, 1)
    form = page.locator(".mlx-nb-new")
    form.wait_for()
    # A variable of the notebook is among the choices, and a mistake is named at once.
    data = form.get_by_label("data", exact=True)
    page.wait_for_selector("datalist option[value=bees]", state="attached")
    data.fill("bess")
    data.press("Tab")
    page.wait_for_selector("text=Did you mean 'bees'?")
    assert form.get_by_role("button", name="Show the rows").is_disabled()
    data.fill("bees")
    data.press("Tab")
    form.get_by_label("iters").fill("8")
    form.get_by_label("name", exact=True).fill("hive")
    form.get_by_label("name", exact=True).press("Tab")
    cell = f"%%finetune --name hive\nmodel: {tiny_folder}\ndata: bees\niters: 8"
    page.wait_for_function("(cell) => document.querySelector('.mlx-nb-cell').textContent === cell", arg=cell)
    assert not form.get_by_role("alert").is_visible()
    # The plan of the memory, made while other cells run, and again for other settings.
    plan = form.get_by_role("region", name="plan of the memory")
    plan.get_by_text(re.compile("✓ It fits: .* with 4 sequences of")).wait_for()
    form.get_by_label("batch_size", exact=True).fill("2")
    form.get_by_label("batch_size", exact=True).press("Tab")
    assert cell_answers(page, lab, 3, "42") < 20
    plan.get_by_text(re.compile("✓ It fits: .* with 2 sequences of")).wait_for()
    plan.get_by_text("largest batch_size that fits").wait_for()
    screenshot(page, "new_run_plan_lab")
    form.get_by_label("batch_size", exact=True).fill("")
    form.get_by_label("batch_size", exact=True).press("Tab")
    # The rows as the model will see them, with what is trained, and the check of all of them.
    form.get_by_role("button", name="Show the rows").click()
    page.wait_for_selector(".mlx-nb-new >> text=row 0 (0 to 35)")
    assert "trained" in form.inner_text()
    form.get_by_role("button", name="Next row").click()
    page.wait_for_selector(".mlx-nb-new >> text=row 1 (0 to 35)")
    form.get_by_role("button", name="Check the rows").click()
    page.wait_for_selector(".mlx-nb-new >> text=Data check")
    screenshot(page, "new_run_lab")
    # The cell is written below, and trains.
    lab.run_cell(page, 2)
    page.wait_for_function(f"(cell) => ({CELLS})()[3] === cell", arg=cell)
    assert page.evaluate(CELLS)[:3] == cells[:3]
    lab.run_cell(page, 3)
    wait_for_state(page, "finished")
    assert "update 8 of 8" in page.evaluate(TEXT_OF_CELL, 3)
    page.close()
