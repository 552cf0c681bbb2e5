"""`mlx-nb quickstart`: execute the first example notebook on a real small model and say what was measured."""

from __future__ import annotations

import ast
import json
import shutil
import time
from pathlib import Path
from typing import Any

from mlx_nb.errors import MlxNbError, ModelError

NOTEBOOK = "01_quickstart.ipynb"
ROWS = "home_requests"


def run_quickstart(folder: str) -> int:
    """Copy the notebook and its rows to `folder`, fetch the model, execute. Prints one JSON line last.

    Raises MlxNbError when the packages of the `quickstart` extra are missing or a cell fails.
    """
    started = time.perf_counter()
    target = Path(folder).expanduser().resolve()
    notebook_path = _copy_example(target)
    print("fetching SmolLM2-135M-Instruct (once; kept in a cache) …", flush=True)
    fetched = _fetch_model()
    print(f"model in {fetched}", flush=True)
    run_started = time.perf_counter()
    notebook = _execute(notebook_path)
    summary = _summary(notebook)
    summary["run_seconds"] = round(time.perf_counter() - run_started, 1)
    summary["total_seconds"] = round(time.perf_counter() - started, 1)
    summary["notebook"] = str(notebook_path)
    before, after, rows = summary["before"], summary["after"], summary["test_rows"]
    print(f"\nvalidation loss  {before['validation_loss']:.3f} → {after['validation_loss']:.3f}")
    print(f"exact match      {before['exact_match']:.0%} → {after['exact_match']:.0%}  of {rows} held-out rows")
    print(f"\nThe executed notebook: jupyter lab {notebook_path}\n")
    print(json.dumps(summary))
    return 0


def _examples_folder() -> Path:
    inside = Path(__file__).parent / "example_notebooks"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "example_notebooks"


def _copy_example(target: Path) -> Path:
    source = _examples_folder()
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / NOTEBOOK, target / NOTEBOOK)
    shutil.copytree(source / ROWS, target / ROWS, dirs_exist_ok=True)
    return target / NOTEBOOK


def _fetch_model() -> Path:
    from mlx_nb.model.backend import prepare_backend

    prepare_backend()
    from mlx_nb.model.loading import model_folder

    return model_folder("smollm2-135m")


def _execute(path: Path) -> Any:
    try:
        import nbformat
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError
    except ImportError as error:
        raise MlxNbError(f'{error.name} is missing. Run: pip install "mlx-nb[quickstart]"') from None
    notebook = nbformat.read(path, as_version=4)

    def announce(cell: Any, cell_index: int) -> None:
        if cell.cell_type == "code":
            first = next((line for line in cell.source.splitlines() if line.strip()), "")
            print(f"[{cell_index + 1}/{len(notebook.cells)}] {first}", flush=True)

    def show(cell: Any, cell_index: int, execute_reply: Any) -> None:
        for output in cell.get("outputs", []):
            text = output.get("text") or output.get("data", {}).get("text/plain", "")
            for line in text.rstrip().splitlines()[:12]:
                print(f"      {line}", flush=True)

    client = NotebookClient(
        notebook,
        timeout=1800,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_start=announce,
        on_cell_executed=show,
    )
    try:
        client.execute()
    except CellExecutionError as error:
        raise ModelError(f"the quickstart notebook failed: {error.evalue or error}") from None
    finally:
        nbformat.write(notebook, path)
    return notebook


def _summary(notebook: Any) -> dict[str, Any]:
    """The dict that the notebook's last code cell ends with."""
    code_cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    text = code_cells[-1].outputs[-1]["data"]["text/plain"]
    return dict(ast.literal_eval(text))
