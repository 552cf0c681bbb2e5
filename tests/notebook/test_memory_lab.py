"""A cell that is run again and again in a real JupyterLab, its panel open: memory and widgets are those of one run."""

from __future__ import annotations

import json

import pytest

from lab_memory import assert_one_run, measure_runs
from tiny import tiny_rows

pytestmark = pytest.mark.browser


def test_a_cell_run_five_times_with_its_panel_open_takes_the_memory_and_the_widgets_of_one(lab, tiny_folder):
    rows = "".join(json.dumps(row) + "\n" for row in tiny_rows(40))
    (lab.folder / "rows.jsonl").write_text(rows)
    assert_one_run(measure_runs(lab, f"model: {tiny_folder}\ndata: rows.jsonl\niters: 20\nsteps_per_eval: 10"))
