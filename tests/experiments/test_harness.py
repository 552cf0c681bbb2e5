"""lm-evaluation-harness on a model in memory: the numbers of mlx_lm.evaluate, and nothing is changed."""

from __future__ import annotations

import json
import random
import sys

import mlx.core as mx
import numpy as np
import pytest

import mlx_nb
from mlx_nb import Run, RunConfig
from mlx_nb.errors import CommandError
from mlx_nb.experiments.harness import HarnessResults, lm_eval
from tiny import tiny_rows

TASK = """task: tiny_colors
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {rows}
validation_split: validation
output_type: multiple_choice
doc_to_text: "say {{{{color}}}}"
doc_to_choice: ["red", "green", "blue", "black"]
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
"""
GENERATION = """task: tiny_answers
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {rows}
validation_split: validation
output_type: generate_until
doc_to_text: "say {{{{color}}}}"
doc_to_target: "{{{{color}}}}"
generation_kwargs:
  until: ["e"]
  max_gen_toks: 4
metric_list:
  - metric: exact_match
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    colors = ("red", "green", "blue", "black")
    rows = [{"color": colors[number % 4], "label": (number // 2) % 4} for number in range(16)]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("colors", TASK), ("answers", GENERATION)):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text.format(rows=tmp_path / "tasks" / "rows.jsonl"))
    return tmp_path / "tasks"


def run_of(folder, tiny_folder, **settings):
    values = {
        "model": str(tiny_folder),
        "data": tiny_rows(24),
        "iters": 6,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "adapter_path": str(folder / "run"),
    }
    return Run(RunConfig.from_dict({**values, **settings}))


def of_mlx_lm(folder, tasks, names):
    """The results of mlx_lm.evaluate for a model folder."""
    import lm_eval as harness
    from lm_eval.tasks import TaskManager
    from mlx_lm.evaluate import MLXLM
    from mlx_lm.sample_utils import make_sampler

    model = MLXLM(str(folder), sampler=make_sampler(temp=0.0))
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), 123)
    manager, chat = TaskManager(include_path=str(tasks), include_defaults=False), model.use_chat_template
    return harness.simple_evaluate(model=model, tasks=names, task_manager=manager, apply_chat_template=chat, **seeds)


@pytest.mark.long
def test_the_numbers_are_those_of_mlx_lm_and_nothing_is_changed(tmp_path, tiny_folder, tasks):
    names = ["tiny_colors", "tiny_answers"]
    run = run_of(tmp_path, tiny_folder)
    run.step(3)
    weights, events = run.adapter_bytes(), len(run.history.events)
    streams = random.getstate(), np.random.get_state()[1].tolist(), mx.random.state[0].tolist()
    found = lm_eval(run, names, include_path=tasks)
    assert (random.getstate(), np.random.get_state()[1].tolist(), mx.random.state[0].tolist()) == streams
    assert run.adapter_bytes() == weights
    assert len(run.history.events) == events
    run.fuse(tmp_path / "fused")
    base = lm_eval(run, names, include_path=tasks, base=True)
    expected = of_mlx_lm(tiny_folder, tasks, names)["results"]
    assert {task: dict(numbers) for task, numbers in base.results.items()} == expected
    fused = of_mlx_lm(tmp_path / "fused", tasks, names)["results"]
    assert found.results["tiny_colors"]["acc,none"] == pytest.approx(fused["tiny_colors"]["acc,none"], abs=1 / 16)
    assert "tiny_colors" in repr(found)
    assert "95% interval" in repr(found)
    run.save()
    loaded = lm_eval(run.folder, "tiny_colors", include_path=tasks)
    assert loaded.results["tiny_colors"] == found.results["tiny_colors"]


@pytest.mark.long
def test_an_unknown_task_is_refused_in_one_line(tmp_path, tiny_folder, tasks):
    with pytest.raises(CommandError, match="has no task 'tiny_colours'"):
        lm_eval(run_of(tmp_path, tiny_folder), "tiny_colours", include_path=tasks)


def test_without_the_harness_one_line_says_how_to_install_it(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(CommandError, match=r"pip install 'mlx-nb\[harness\]'"):
        mlx_nb.lm_eval(run_of(tmp_path, tiny_folder), "arc_easy")
    with pytest.raises(CommandError, match="takes a run, a loaded adapter or its folder"):
        lm_eval(3, "arc_easy")


def test_numbers_are_shown_with_the_interval_of_their_standard_error():
    found = HarnessResults("pirate", {"arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.05, "n,none": 3}})
    assert found.table == [("arc", "acc", 0.5, 0.05), ("arc", "n", 3.0, None)]
    assert "0.5000   95% interval 0.4020 to 0.5980" in repr(found)
