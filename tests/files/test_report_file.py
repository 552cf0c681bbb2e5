"""A report holds no rows but those on show, and takes the place of nothing but an earlier report of its run."""

from __future__ import annotations

import errno
import json
import os

import pandas
import pytest

from mlx_nb import Run, RunConfig
from mlx_nb.errors import CommandError
from tiny import tiny_rows

SETTINGS = {"iters": 2, "batch_size": 2, "val_set_size": 0, "save_every": -1, "lora_parameters": {"rank": 2}}


def new_run(folder, model, data, name="run"):
    values = {**SETTINGS, "model": str(model), "data": data, "adapter_path": str(folder / "a")}
    return Run(RunConfig.from_dict(values), name=name)


@pytest.mark.long
@pytest.mark.parametrize(
    "kind", [list, pandas.DataFrame, lambda rows: {"train": rows}], ids=["list", "frame", "splits"]
)
@pytest.mark.matrix(every=3)
def test_rows_in_memory_are_not_in_the_report(tmp_path, tiny_folder, kind):
    rows = [
        {"messages": [*row["messages"], {"role": "user", "content": f"aside {n}"}]}
        for n, row in enumerate(tiny_rows(80))
    ]
    run = new_run(tmp_path, tiny_folder, kind(rows))
    run.step()
    page = run.report().read_text()
    shown = {row for row, _ in list(run.row_losses().items())[:10]}
    assert {n for n in range(80) if f"aside {n}<" in page or f"aside {n}\\" in page or f"aside {n}'" in page} <= shown
    assert "80 training rows in memory" in page
    assert run.report(tmp_path / "other.html").read_text().count("aside") == page.count("aside") <= 2 * len(shown)


@pytest.mark.long
def test_a_report_takes_the_place_of_an_earlier_one_of_the_same_run_only(tmp_path, tiny_folder):
    run = new_run(tmp_path, tiny_folder, tiny_rows())
    run.step()
    path = tmp_path / "page.html"
    assert run.report(path) == run.report(path) == path
    path.write_text("<html>mine</html>")
    with pytest.raises(CommandError, match=r"page\.html is not a report of run.*such as .*page-2\.html"):
        run.report(path)
    assert path.read_text() == "<html>mine</html>"
    other = new_run(tmp_path / "b", tiny_folder, tiny_rows(), name="other")
    other.step()
    other.report(tmp_path / "theirs.html")
    with pytest.raises(CommandError, match="not a report of run"):
        run.report(tmp_path / "theirs.html")
    with pytest.raises(CommandError, match="is a folder"):
        run.report(tmp_path)


@pytest.mark.parametrize("name", [None, "page.html"])
@pytest.mark.matrix(every=2)
def test_a_full_disk_leaves_the_older_report_whole(tmp_path, tiny_folder, monkeypatch, name):
    run = new_run(tmp_path, tiny_folder, tiny_rows())
    run.step()
    path = run.report(name and tmp_path / name)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CommandError, match="cannot be written: No space left on device"):
        run.report(name and path)
    assert path.read_bytes() == before


def test_a_report_is_written_although_its_rows_cannot_be_read_any_more(tmp_path, tiny_folder):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows()))
    run = new_run(tmp_path, tiny_folder, str(data))
    run.step()
    data.write_text("")
    assert "Rows with the highest loss" in run.report().read_text()
