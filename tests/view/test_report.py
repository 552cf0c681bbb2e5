"""The HTML page of a run: complete, harmless, and readable in both themes and widths."""

from __future__ import annotations

import shutil

import pytest

from made_events import evaluation, update
from mlx_nb.config.run_config import RunConfig
from mlx_nb.events import RunPaused, SampleGenerated, SettingChanged
from mlx_nb.events.history import History
from mlx_nb.view.reports.run import report_html

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def page_of_a_run():
    history = History([evaluation(0, 3.5)])
    for step in range(1, 41):
        history.append(update(step, 3.0 / step))
        if step % 10 == 0:
            history.append(evaluation(step, 3.2 / step))
    history.append(SampleGenerated(40, f"say {HOSTILE}", HOSTILE, "the base"))
    history.append(SettingChanged(40, "learning_rate", 1e-4, 5e-5))
    history.append(RunPaused(40, HOSTILE))
    settings = RunConfig(learning_rate=5e-4, sample_prompts=[HOSTILE]).to_dict()
    return report_html(history, title=f"run {HOSTILE}", settings=settings, worst_rows=[(7, 2.5, f"row {HOSTILE}")])


@pytest.mark.long
def test_the_page_says_everything_and_runs_nothing():
    page = page_of_a_run()
    assert "<script" not in page
    assert "<img src=x" not in page
    for said in ("training loss", "0.0800", "learning_rate", "2.500", "changed from 0.0001 to 5e-05"):
        assert said in page, said
    assert page.count("data:image/png;base64,") == 1


def test_a_run_that_did_nothing_has_a_page_too():
    page = report_html(History(), title="nothing", settings=RunConfig().to_dict())
    assert "data:image/png" not in page
    assert "<h1>nothing</h1>" in page


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_it_fits_and_asks_for_nothing(tmp_path, scheme, width):
    from playwright.sync_api import sync_playwright

    (tmp_path / "report.html").write_text(page_of_a_run())
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        asked, dialogs = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        page.goto(f"file://{tmp_path}/report.html")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert not dialogs
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        page.screenshot(path=str(tmp_path / "report.png"), full_page=True)
        browser.close()
