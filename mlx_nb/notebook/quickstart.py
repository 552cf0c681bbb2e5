"""`mlx-nb quickstart`: executes the first example notebook on a small real model and prints the results."""

from __future__ import annotations

import ast
import json
import os
import time
from pathlib import Path
from typing import Any

from mlx_nb.errors import MlxNbError, ModelError, shown
from mlx_nb.files.places import path_problem, refuse_among_files

NOTEBOOK = "01_quickstart.ipynb"
ROWS = "home_requests"
_SECONDS_BETWEEN_LINES = 5.0


def run_quickstart(folder: str, *, as_json: bool = False) -> int:
    """Copy the notebook and its rows to `folder`, download the model, and execute. `as_json` prints a JSON line last.

    Raises MlxNbError if the packages of the `quickstart` extra are missing or a cell fails.
    """
    started = time.perf_counter()
    target = _target(folder)
    notebook_path = _copy_example(target)
    print("downloading SmolLM2-135M-Instruct (once; cached) …", flush=True)
    model = _download_model()
    print(f"model in {model}", flush=True)
    run_started = time.perf_counter()
    notebook, notebook_path = _execute(notebook_path)
    summary = _summary(notebook)
    summary["run_seconds"] = round(time.perf_counter() - run_started, 1)
    summary["total_seconds"] = round(time.perf_counter() - started, 1)
    summary["notebook"] = str(notebook_path)
    before, after, rows = summary["before"], summary["after"], summary["test_rows"]
    print(f"\nvalidation loss  {before['validation_loss']:.3f} → {after['validation_loss']:.3f}")
    print(f"exact match      {before['exact_match']:.0%} → {after['exact_match']:.0%}  of {rows} held-out rows")
    print(f"time             {summary['total_seconds']:.0f} s")
    print(f"\nThe executed notebook: jupyter lab {notebook_path}")
    if as_json:
        print(f"\n{json.dumps(summary)}")
    return 0


def _target(folder: str) -> Path:
    """The absolute path of the folder to write to. Raises MlxNbError if it is not possible, or belongs to a run."""
    try:
        target = Path(folder).expanduser()
        problem = path_problem(target)
    except RuntimeError as error:
        problem = str(error).rstrip(".")
    if problem is not None:
        raise MlxNbError(f"{shown(folder)} cannot be a folder: {problem}. Give another folder with --folder.")
    refuse_among_files(target)
    return Path(os.path.realpath(target))


def _examples_folder() -> Path:
    package = Path(__file__).parent.parent
    inside = package / "example_notebooks"
    return inside if inside.is_dir() else package.parent / "example_notebooks"


def _copy_example(target: Path) -> Path:
    """The notebook, copied with its rows to `target`, or to a folder next to it if `target` has files of the user.

    Raises MlxNbError for a folder that cannot be written.
    """
    folder, number = target, 1
    while changed := _changed_files(folder):
        number += 1
        if folder == target:
            print(f"{target} has files that differ from the example and stay unchanged: {', '.join(changed)}.")
        folder = target.with_name(f"{target.name}-{number}")
    if folder != target:
        print(f"The example is in {folder}.", flush=True)
    source = _examples_folder()
    try:
        for name in _example_files():
            if not (folder / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                _write_whole(folder / name, (source / name).read_bytes())
    except OSError as error:
        raise MlxNbError(f"{folder} cannot be written: {error.strerror}. Give another folder with --folder.") from None
    return folder / NOTEBOOK


def _example_files() -> list[str]:
    return [NOTEBOOK, *(f"{ROWS}/{path.name}" for path in sorted((_examples_folder() / ROWS).iterdir()))]


def _changed_files(folder: Path) -> list[str]:
    """The files in `folder` that have names of the example but other contents; outputs of cells are ignored.

    The folder itself if it is a file. Raises MlxNbError if something cannot be read.
    """
    source = _examples_folder()
    try:
        if folder.exists() and not folder.is_dir():
            return [folder.name]
        if (folder / ROWS).exists() and not (folder / ROWS).is_dir():
            return [ROWS]
        there = [name for name in _example_files() if (folder / name).exists() or (folder / name).is_symlink()]
        return [name for name in there if not _is_same(folder / name, source / name)]
    except OSError as error:
        raise MlxNbError(f"{folder} cannot be read: {error.strerror}. Give another folder with --folder.") from None


def _is_same(path: Path, original: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    if path.suffix == ".ipynb":
        return _cells(path) == _cells(original)
    return path.read_bytes() == original.read_bytes()


def _cells(path: Path) -> list[Any] | None:
    """The sources of the cells of a notebook; None for a file that is not a notebook."""
    try:
        cells = json.loads(path.read_bytes())["cells"]
        return [(cell["cell_type"], "".join(cell["source"]), cell.get("attachments")) for cell in cells]
    except (ValueError, KeyError, TypeError):
        return None


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _keep_executed(notebook: Any, path: Path, before: bytes) -> Path:
    """Write the executed notebook to its file, or next to it if the file was changed meanwhile."""
    import nbformat

    if path.read_bytes() != before:
        path = path.with_name(f"{path.stem}-executed-{time.strftime('%Y%m%d-%H%M%S')}{path.suffix}")
        print(f"The notebook was changed meanwhile. The executed one is {path}.", flush=True)
    _write_whole(path, nbformat.writes(notebook).encode())
    return path


def _download_model() -> Path:
    from mlx_nb.run.available import downloaded_model

    return downloaded_model("smollm2-135m")


def _execute(path: Path) -> tuple[Any, Path]:
    """The executed notebook, and its path. Raises ModelError if a cell fails."""
    try:
        import nbformat
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError
    except ImportError as error:
        raise MlxNbError(f'{error.name} is missing. Run: pip install "mlx-nb[quickstart]"') from None
    before = path.read_bytes()
    notebook = nbformat.reads(before.decode(), as_version=4)

    def announce(cell: Any, cell_index: int) -> None:
        if cell.cell_type == "code":
            print(_step_in_words(notebook.cells, cell_index), flush=True)

    def show(cell: Any, cell_index: int, execute_reply: Any) -> None:
        for output in cell.get("outputs", []):
            text = output.get("text") or output.get("data", {}).get("text/plain", "")
            for line in text.rstrip().splitlines()[:12]:
                print(f"      {line}", flush=True)

    class Client(NotebookClient):
        """Prints the progress of the current cell now and then."""

        printed_at = 0.0

        def process_message(self, msg: Any, cell: Any, cell_index: int) -> Any:
            """Process the message, and print the progress line of a run."""
            shown = msg["content"].get("data", {}).get("text/plain", "")
            if shown.startswith(("update ", "loading ", "tokenizing ")) and "\n" not in shown:
                if time.monotonic() - self.printed_at >= _SECONDS_BETWEEN_LINES:
                    self.printed_at = time.monotonic()
                    print(f"      {shown}", flush=True)
            return super().process_message(msg, cell, cell_index)

    client = Client(
        notebook,
        timeout=1800,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        # Hides a warning about the connection, which is local to this machine.
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        on_cell_start=announce,
        on_cell_executed=show,
    )
    try:
        client.execute()
    except CellExecutionError as error:
        raise ModelError(f"the quickstart notebook failed: {error.evalue or error}") from None
    finally:
        path = _keep_executed(notebook, path, before)
    return notebook, path


def _step_in_words(cells: list[Any], at: int) -> str:
    """`Step 3 of 9: train it (%%finetune --name home)`: the heading above a cell, or its first line."""
    code = [index for index, cell in enumerate(cells) if cell.cell_type == "code"]
    first = next((line for line in cells[at].source.splitlines() if line.strip()), "")
    above = next((cell for cell in reversed(cells[:at]) if cell.cell_type == "markdown"), None)
    headings = [line.lstrip("# ") for line in above.source.splitlines() if line.startswith("#")] if above else []
    what = f"{headings[-1]} ({first})" if headings else first
    return f"Step {code.index(at) + 1} of {len(code)}: {what}"


def _summary(notebook: Any) -> dict[str, Any]:
    """The dict that the last code cell of the notebook displays."""
    code_cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    text = code_cells[-1].outputs[-1]["data"]["text/plain"]
    return dict(ast.literal_eval(text))
