"""The page of one row's walk names the functions that a row really comes through, in their order."""

from __future__ import annotations

import re
import sys
from itertools import pairwise
from pathlib import Path

import mlx_nb
from mlx_nb import Run, RunConfig
from mlx_nb.view.curves.curves import SeriesBuilder
from tiny import tiny_rows

PACKAGE = Path(mlx_nb.__file__).parent
PAGE = (PACKAGE.parent / "docs" / "walk.md").read_text(encoding="utf-8")


def test_a_row_comes_by_every_stop_of_the_page_in_its_order(tmp_path, tiny_folder):
    stops = re.findall(r"`([a-z_/]+\.py): ([\w.<>]+)`", PAGE)
    assert len(stops) >= 15
    first: dict[tuple[str, str], int] = {}
    last: dict[tuple[str, str], int] = {}
    calls = 0

    def note(frame, event, _):
        nonlocal calls
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)):
            calls += 1
            stop = (Path(code.co_filename).relative_to(PACKAGE).as_posix(), code.co_qualname)
            first.setdefault(stop, calls)
            last[stop] = calls

    settings = {"model": str(tiny_folder), "data": tiny_rows(3), "iters": 1, "val_set_size": 0}
    run = Run(RunConfig.from_dict({**settings, "adapter_path": str(tmp_path / "a")}))
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run.step()
        SeriesBuilder(run.history).series(1)
    finally:
        sys.setprofile(before)
    assert [stop for stop in stops if stop not in first] == []
    for one, other in pairwise(stops):
        assert first[one] < last[other], f"{one} comes after {other}"
