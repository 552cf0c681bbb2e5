"""A run with odd rows trains the others, and none of its ways breaks: report, browser, checkpoint, resume, rewards."""

from __future__ import annotations

import pytest

from mlx_nb import Run, RunConfig
from odd_values import KINDS, ODD_COLUMNS, ODD_VALUES, REFUSED

ROWS = {kind: KINDS[kind] for kind in ("messages", "pairs", "labels", "prompts")}


def odd_rows(rows):
    """Good rows, then one for each odd value in a column of its own, then one for each odd column."""
    good = 8
    made = rows(good + len(ODD_VALUES) + len(ODD_COLUMNS))
    for row, (make, _) in enumerate(ODD_VALUES.values(), good):
        made[row]["x"] = make(1)
    for row, column in enumerate(ODD_COLUMNS, good + len(ODD_VALUES)):
        made[row][column] = 1
    refused = [row for row, (_, becomes) in enumerate(ODD_VALUES.values(), good) if becomes == REFUSED]
    return made, {*refused, *range(good + len(ODD_VALUES), len(made))}


def reward(completion, x):
    return float(len(completion))


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.matrix(every=4)
def test_a_run_leaves_out_the_rows_that_it_refuses_and_trains_the_others(kind, tmp_path, tiny_folder):
    _, method, rows = ROWS[kind]
    rows, refused = odd_rows(rows)
    values = {
        "model": str(tiny_folder),
        "method": method,
        "data": rows,
        "iters": 2,
        "batch_size": 4,
        "val_set_size": 0.5,
        "lora_parameters": {"rank": 2},
        "adapter_path": str(tmp_path / "a"),
    }
    if method == "grpo":
        values |= {"rewards": [reward], "group_size": 2, "max_completion_length": 4, "val_batches": 1}
    run = Run(RunConfig.from_dict(values))
    check = run.check()
    assert check.count("error")
    run.run()
    left = [one for split in run.left_out.values() for one in split]
    assert len(left) == len(refused)
    assert all(any(f"data[{row}]" in one.reason for one in left) for row in refused)
    run.report().read_text()
    for split in ("train", "valid"):
        browser = run.browse(split)
        assert browser is not None
        for row in range(len(run.rows(split))):
            run.rows(split)[row]._repr_html_()
    run.release()
    resumed = Run.resume(run.folder, config=RunConfig.from_dict(values))
    assert resumed.step_count == 2
    assert resumed.adapter_bytes() == run.adapter_bytes()
