"""A real JupyterLab or Notebook 7 with an empty folder, in Chromium."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
IDLE = "() => window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'"
PATIENCE = 180_000  # ms that a page may take for anything, on a machine with much else to do


class Lab:
    """A running JupyterLab, or Notebook 7, and pages of notebooks in it."""

    def __init__(self, folder: Path, port: int, browser, address: str) -> None:
        self.folder = folder
        self.port = port
        self._browser = browser
        self._address = address

    def open(self, cells: list[str], width: int = 1200):
        """Open a new notebook with these code cells, and wait for its kernel."""
        import nbformat  # takes seconds

        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(cell) for cell in cells],
            metadata={"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
        )
        name = f"notebook{len(list(self.folder.glob('*.ipynb')))}.ipynb"
        nbformat.write(notebook, self.folder / name)
        return self.reopen(name, width)

    def reopen(self, name: str, width: int = 1200):
        """Open an existing notebook, and wait for its kernel."""
        page = self._browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(PATIENCE)
        page.goto(f"http://localhost:{self.port}/{self._address}/{name}")
        page.wait_for_selector(".jp-Notebook")
        page.evaluate("async () => { await window.jupyterapp.shell.currentWidget.sessionContext.ready; }")
        page.wait_for_function(IDLE)
        return page

    @staticmethod
    def run_cell(page, index: int) -> None:
        page.evaluate(
            """async (index) => {
                window.jupyterapp.shell.currentWidget.content.activeCellIndex = index;
                await window.jupyterapp.commands.execute('notebook:run-cell');
            }""",
            index,
        )


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with served(tmp_path_factory, "jupyterlab", "LabApp", "lab/tree") as running:
        yield running


@pytest.fixture(scope="module")
def notebook_7(tmp_path_factory):
    pytest.importorskip("notebook.app")
    with served(tmp_path_factory, "notebook", "JupyterNotebookApp", "notebooks") as running:
        yield running


@contextmanager
def served(tmp_path_factory, module, application, address):
    """A server of its own home and folder, as a Lab."""
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "Chromium is needed: apt-get install chromium"
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("notebooks")
    settings = home / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    quiet = {"fetchNews": "false", "checkForUpdates": False}
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
    }
    command = [sys.executable, "-m", module, "--no-browser", "--allow-root", f"--port={port}"]
    command += ["--ServerApp.token=", "--ServerApp.password=", f"--{application}.expose_app_in_browser=True"]
    command += [f"--ServerApp.root_dir={folder}"]
    with (home / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(360):
            try:
                urllib.request.urlopen(f"http://localhost:{port}/api", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
            )
            yield Lab(folder, port, browser, address)
            browser.close()
    finally:
        server.terminate()
        server.wait(30)
