"""Three measured updates say how long a run will take, and leave no trace."""

from __future__ import annotations

import pytest

from mlx_nb.errors import CommandError
from mlx_nb.run.planning import pace_of
from mlx_nb.train import time_probe
from mlx_nb.train.memory_plan import MemoryPlan
from mlx_nb.train.shared_work import Aborted
from mlx_nb.train.update_memory import BatchShape
from tiny import tiny_prompts
from traceless_runs import everything, rest_of, run_of


def test_the_run_is_as_it_was_and_goes_on_with_the_same_bits(tmp_path, tiny_folder):
    plain = run_of(tmp_path / "plain", tiny_folder)
    plain.step(2)
    expected = rest_of(plain)
    run = run_of(tmp_path / "timed", tiny_folder)
    run.step(2)
    before = everything(run)
    told = []
    pace = pace_of(run.trainer, told.append)
    assert everything(run) == before
    assert pace.updates_left == 5
    assert pace.seconds > 0
    assert [event.done for event in told] == [1, 2, 3]
    assert rest_of(run) == expected
    assert run.adapter_bytes() == plain.adapter_bytes()


@pytest.mark.long
def test_a_plan_has_the_measured_time(tmp_path, tiny_folder):
    plan = run_of(tmp_path, tiny_folder).plan(time=True)
    assert plan.updates_left == 7
    assert 0 < plan.seconds < 10


def test_a_plan_shows_updates_per_second_and_the_total_time():
    plan = MemoryPlan("m", 10, 1, {"weights": 40}, BatchShape(1, 8, 8), seconds=0.5, updates_left=7200)
    assert "an update takes 0.5 s (2 updates a second)" in str(plan)
    assert "7,200 updates are left: 1:00:00 without validations and samples" in str(plan)


def test_the_time_is_that_of_a_token_in_the_last_two_updates(tmp_path, tiny_folder, monkeypatch):
    trainer = run_of(tmp_path, tiny_folder).trainer
    clock = iter([0.0, *(10.0, 12.0), *(20.0, 24.0)])  # the first update reads it once
    monkeypatch.setattr(time_probe.time, "perf_counter", lambda: next(clock))
    lengths, first = [], trainer.plan.after(0)
    for _ in range(2):
        lengths += [example.length for batch in trainer.plan.examples(first) for example in batch]
        first = trainer.plan.after(first)
    pace = time_probe.measured_pace(trainer, lambda: False)
    assert pace.tokens_per_second == pytest.approx(sum(lengths) / 6.0)
    everywhere = sum(example.length for example in trainer.plan._examples)
    assert pace.seconds == pytest.approx(everywhere / 5 / pace.tokens_per_second)  # 20 rows are 5 updates
    assert pace.updates_left == 7


@pytest.mark.parametrize("calls", [0, 1, 4])
def test_an_interrupt_restores_everything(tmp_path, tiny_folder, calls):
    run = run_of(tmp_path, tiny_folder)
    run.step()
    before, left = everything(run), iter(range(calls))
    with pytest.raises(Aborted):
        time_probe.measured_pace(run.trainer, lambda: next(left, None) is None)
    assert everything(run) == before


def test_a_method_that_samples_is_refused(tmp_path, tiny_folder):
    settings = {"method": "grpo", "data": tiny_prompts(12), "rewards": ["exact_match"], "lora_parameters": {"rank": 4}}
    run = run_of(tmp_path, tiny_folder, max_completion_length=3, **settings)
    with pytest.raises(CommandError, match="the method samples completions"):
        run.plan(time=True)
