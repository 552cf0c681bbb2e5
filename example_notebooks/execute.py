"""Execute the example notebooks, so that they are read with their pictures: `python execute.py [NAMES]`.

Each is executed in an empty folder with the rows beside it, and written back without times, widgets and paths of the
machine.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
ROWS = ("home_requests", "short_answers")
WIDGET = "application/vnd.jupyter.widget-view+json"


def executed(path: Path) -> str:
    """The notebook with the outputs of a fresh kernel, as text."""
    notebook = nbformat.read(path, 4)
    with tempfile.TemporaryDirectory() as folder:
        for rows in ROWS:
            shutil.copytree(HERE / rows, Path(folder, rows))
        at = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=3600, resources=at, store_widget_state=False).execute()
        home = str(Path.home())
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
            for output in cell.get("outputs", []):
                output.get("data", {}).pop(WIDGET, None)
        text = nbformat.writes(notebook)
        for place in (str(Path(folder).resolve()), folder):
            text = text.replace(json.dumps(f"{place}/")[1:-1], "").replace(json.dumps(place)[1:-1], ".")
        return text.replace(json.dumps(home)[1:-1], "~")


def main() -> None:
    """Execute those that are named, or all."""
    for name in sys.argv[1:] or sorted(path.name for path in HERE.glob("*.ipynb")):
        path = HERE / name
        path.write_text(executed(path) + "\n", encoding="utf-8")
        print(f"{name}: {path.stat().st_size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
