"""`mlx-nb quickstart` again: what a person wrote in its folder stays, and the example is there all the same."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest

from mlx_nb.errors import MlxNbError
from mlx_nb.notebook.quickstart import NOTEBOOK, ROWS, _copy_example, _keep_executed, _step_in_words


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def add_cell(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["cells"].append({"cell_type": "markdown", "metadata": {}, "source": "notes of mine", "id": "mine"})
    path.write_text(json.dumps(notebook), encoding="utf-8")


def change_rows(path: Path) -> None:
    (path.parent / ROWS / "train.jsonl").write_text("rows of mine\n", encoding="utf-8")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


def put_a_folder_there(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("edit", [add_cell, change_rows, truncate, put_a_folder_there])
def test_what_was_edited_stays_and_a_fresh_example_is_beside_it(tmp_path, capsys, edit):
    target = tmp_path / "q"
    first = _copy_example(target)
    fresh = contents(target)
    edit(first)
    edited = contents(target)
    second = _copy_example(target)
    assert contents(target) == edited
    assert second == tmp_path / "q-2" / NOTEBOOK
    assert contents(second.parent) == fresh
    said = capsys.readouterr().out
    assert f"{target} has files that differ from the example" in said
    assert f"The example is in {tmp_path / 'q-2'}" in said
    add_cell(second)
    assert _copy_example(target) == tmp_path / "q-3" / NOTEBOOK
    assert contents(target) == edited


def test_an_example_with_outputs_only_is_used_again_and_what_is_missing_comes_back(tmp_path, capsys):
    path = _copy_example(tmp_path / "q")
    fresh = contents(path.parent)
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1]["metadata"]["execution"] = {"iopub.status.busy": "now"}
    code = next(cell for cell in notebook.cells if cell.cell_type == "code")
    code.outputs = [nbformat.v4.new_output("stream", text="said")]
    assert _keep_executed(notebook, path, path.read_bytes()) == path
    (path.parent / ROWS / "valid.jsonl").unlink()
    (path.parent / "mine.txt").write_text("mine")
    executed = path.read_bytes()
    assert _copy_example(tmp_path / "q") == path
    assert path.read_bytes() == executed
    assert (path.parent / "mine.txt").read_text() == "mine"
    assert (path.parent / ROWS / "valid.jsonl").read_bytes() == fresh[f"{ROWS}/valid.jsonl"]
    assert capsys.readouterr().out == ""


def test_a_file_in_the_way_stays(tmp_path):
    (tmp_path / "q").write_text("mine")
    assert _copy_example(tmp_path / "q") == tmp_path / "q-2" / NOTEBOOK
    assert (tmp_path / "q").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_a_one_line_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(MlxNbError, match=r"cannot be written: .*Give another folder with --folder\.") as raised:
        _copy_example(tmp_path / "file" / "q")
    assert "\n" not in str(raised.value)


def test_a_notebook_that_is_edited_while_it_executes_is_not_overwritten(tmp_path, capsys):
    path = _copy_example(tmp_path / "q")
    before = path.read_bytes()
    notebook = nbformat.reads(before.decode(), as_version=4)
    add_cell(path)
    edited = path.read_bytes()
    kept = _keep_executed(notebook, path, before)
    assert path.read_bytes() == edited
    assert kept != path
    assert len(nbformat.read(kept, as_version=4).cells) == len(notebook.cells)
    assert str(kept) in capsys.readouterr().out


def test_a_step_is_described_in_words_and_not_by_the_number_of_its_cell():
    cells = [
        nbformat.v4.new_markdown_cell("# Title\n\nwords\n\n## Train it"),
        nbformat.v4.new_code_cell("\n%%finetune --name home\nmodel: x"),
        nbformat.v4.new_markdown_cell("no heading"),
        nbformat.v4.new_code_cell("1 + 1"),
    ]
    assert _step_in_words(cells, 1) == "Step 1 of 2: Train it (%%finetune --name home)"
    assert _step_in_words(cells, 3) == "Step 2 of 2: 1 + 1"
