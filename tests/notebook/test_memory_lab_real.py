"""The same of the quickstart on the real model, in a JupyterLab of its own: another would open its notebook as well."""

from __future__ import annotations

import shutil

import pytest

from lab_memory import assert_one_run, measure_runs
from places import NOTEBOOKS

pytestmark = [pytest.mark.browser, pytest.mark.real_model]


def test_the_quickstart_run_five_times_takes_the_memory_of_one_run(lab):
    shutil.copytree(NOTEBOOKS / "home_requests", lab.folder / "home_requests", dirs_exist_ok=True)
    body = "model: smollm2-135m\ndata: home_requests\niters: 3\nbatch_size: 1\nlearning_rate: 5e-4\nval_batches: 1"
    assert_one_run(measure_runs(lab, body))
