"""The panel in marimo, where it is installed: it trains, answers clicks and is read from Python."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from jupyter_lab import PATIENCE
from lab_pages import assert_the_panel_is_worked, write_rows

pytestmark = pytest.mark.browser
APP = """import marimo
app = marimo.App()

@app.cell
def _():
    import json
    import marimo as mo
    import mlx_nb
    rows = [json.loads(line) for line in open("rows.jsonl")]
    config = mlx_nb.RunConfig(model={model!r}, data="rows", iters=400, steps_per_eval=-1)
    run = mlx_nb.Run(config, namespace={{"rows": rows}}, name="bees")
    return mo, run

@app.cell
def _(mo, run):
    panel = mo.ui.anywidget(run.panel())
    panel
    return (panel,)

@app.cell
def _(mo, panel):
    mo.md(f"tab {{panel.value['tab']}}, rows {{panel.value['selection']['rows']}}")
    return
"""


@pytest.fixture
def marimo_address(tmp_path, tiny_folder):
    pytest.importorskip("marimo")
    (tmp_path / "app.py").write_text(APP.format(model=str(tiny_folder)))
    write_rows(tmp_path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "marimo", "run", "app.py", "--headless", "--no-token", f"--port={port}"]
    home = {"XDG_CONFIG_HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **home}, stdout=log, stderr=log)
    try:
        for _ in range(360):
            try:
                urllib.request.urlopen(f"http://localhost:{port}/", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://localhost:{port}/"
    finally:
        server.terminate()
        server.wait(30)


def test_the_panel_works_in_marimo(marimo_address, browser, screenshot):
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    page.set_default_timeout(PATIENCE)
    page.goto(marimo_address)
    page.wait_for_selector(".mlx-nb-panel")
    assert_the_panel_is_worked(page)
    page.wait_for_selector("text=tab Rows, rows all")
    screenshot(page, "marimo")
    page.close()
