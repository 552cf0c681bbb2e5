"""The widgets in a real JupyterLab in Chromium: what is on screen, and what a click does."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.browser
ROW_SHOWN = "(row) => document.querySelector('.mlx-nb-tokens b')?.textContent.includes(`row ${row} `)"
# The left edges of what comes first in each line of the browser.
FIRST_OF_LINES = """() => [...document.querySelectorAll('.mlx-nb-rows > .widget-box')].flatMap((line) => {
    const shown = [...line.children].filter((one) => one.offsetWidth > 0 && one.innerText.trim() !== '');
    return shown.length ? [shown[0].getBoundingClientRect().left] : [];
})"""
ROWS_READ = r"() => Number(/found in (\d+) of 300 rows/.exec(document.body.innerText)?.[1] ?? 0)"


def test_the_row_browser_is_worked_by_hand(lab, tiny_folder, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"number {row}"}, {"role": "assistant", "content": "yes " * row}]}
        for row in range(1, 301)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    body = f"%%finetune --paused\nmodel: {tiny_folder}\ndata: {data}\nval_set_size: 0\nmax_seq_length: 4000"
    page = lab.open(["%load_ext mlx_nb", body, "%finetune browse"])
    for cell in range(3):
        lab.run_cell(page, cell)
    page.wait_for_function(ROW_SHOWN, arg=0)
    page.get_by_role("button", name="Next ▶").click()
    page.wait_for_function(ROW_SHOWN, arg=1)
    page.get_by_role("button", name="◀ Previous").click()
    page.wait_for_function(ROW_SHOWN, arg=0)
    assert page.get_by_role("button", name="◀ Previous").is_disabled()
    number = page.get_by_role("spinbutton", name="row", exact=True)
    number.fill("250")
    number.press("Enter")
    page.wait_for_function(ROW_SHOWN, arg=250)
    page.locator(".widget-dropdown select").nth(1).select_option("longest")
    page.wait_for_function(f"() => ({ROWS_READ})() > 0")
    while (read := page.evaluate(ROWS_READ)) < len(rows):  # it reads for a moment, and on when asked
        page.get_by_role("button", name="Search more").click()
        page.wait_for_function(f"(read) => ({ROWS_READ})() > read", arg=read)
    page.wait_for_function(ROW_SHOWN, arg=299)
    assert page.get_by_text("1 of 300 found in 300 of 300 rows").is_visible()
    page.get_by_role("button", name="user", exact=True).click()
    page.wait_for_selector("text=, hidden")
    assert page.get_by_text("regex").is_visible()
    assert page.get_by_text("one cell per token").is_visible()
    # One left edge, and boxes level with their words, in a narrow window too.
    page.set_viewport_size({"width": 700, "height": 900})
    page.evaluate("() => window.jupyterapp.commands.execute('application:toggle-left-area')")
    page.wait_for_timeout(500)
    first = page.evaluate(FIRST_OF_LINES)
    assert len(first) >= 6
    assert max(first) - min(first) <= 1, first
    for name in ("regex", "one cell per token", "leave out", "down-weight"):
        box = page.locator(".widget-checkbox label", has_text=name)
        words, check = box.bounding_box(), box.locator("input").bounding_box()
        assert abs(words["y"] + words["height"] / 2 - check["y"] - check["height"] / 2) <= 2, name
