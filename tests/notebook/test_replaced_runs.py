"""What stays of a run whose cell was run again says where it is kept by now, by a command that works as it stands."""

from __future__ import annotations

import re

import pytest
from IPython.utils.capture import capture_output

from mlx_nb import Run, RunConfig
from mlx_nb.notebook.lasting_output import Outcome
from tiny import tiny_rows


def said_by(captured):
    """The newest result as plain text."""
    return [output.data["text/plain"] for output in captured.outputs if "text/html" in output.data][-1]


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.matrix(every=2)
def test_the_way_back_to_a_replaced_run_is_true_after_each_rerun(times, shell, tiny_folder):
    session = shell._mlx_nb_magics.session
    shell.user_ns["rows"] = tiny_rows()

    def make(seed):
        settings = {"model": str(tiny_folder), "data": "rows", "iters": 4, "seed": seed, "val_set_size": 0}
        return Run(RunConfig.from_dict(settings), name="a run", namespace=shell.user_ns)

    first = make(1)
    session.add(first)
    first.step(2)
    with capture_output() as captured:
        outcome = Outcome(first)
        outcome._error = "the loss spiked"
        session.register_panel(first, first.panel(), outcome)
        for seed in range(2, 2 + times):
            session.add(make(seed))
            session.get("a run").run()
        said = said_by(captured)
    assert "the loss spiked" in said.splitlines()
    (command,) = re.findall(r"`(%finetune resume [^`]*)`", said)
    assert "a run.previous-1" in command
    result = shell.run_cell(command)
    assert result.error_in_exec is None
    resumed = session.get("a run")
    assert (resumed.config.seed, resumed.step_count) == (1, 2)
    assert resumed.folder.name == "a run.previous-1"
