"""A reward, a loss or a listener may not move the run that calls it, and cannot hold the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from mlx_nb import Run, RunConfig, register_objective
from mlx_nb.config.methods import METHODS
from mlx_nb.errors import CommandError, TrainingError
from mlx_nb.events import Pause, Question, RolloutCompleted, RunPaused, StepCompleted
from mlx_nb.train.checkpoint_store import CheckpointStore
from places import SUPPORT
from runs import rows_run
from tiny import tiny_prompts

CALLS = {
    "step": lambda run: run.step(),
    "run": lambda run: run.run(),
    "events": lambda run: list(run.events()),
    "rewind": lambda run: run.rewind(1),
    "start": lambda run: run.start(),
    "evaluate": lambda run: run.evaluate("train"),
    "generate": lambda run: run.generate("say red", max_tokens=2),
    "token_losses": lambda run: run.token_losses(run.rows()[0]),
}


def prompts_run(folder, tiny_folder, reward, **settings):
    values = {"model": str(tiny_folder), "method": "grpo", "data": tiny_prompts(8), "iters": 6, "batch_size": 2}
    values |= {"group_size": 2, "max_completion_length": 4, "val_set_size": 0, "adapter_path": str(folder / "a")}
    return Run(RunConfig.from_dict({**values, "rewards": [reward], **settings}))


@pytest.mark.parametrize("call", CALLS)
def test_a_reward_that_moves_or_asks_its_own_run_is_named_in_one_line(tmp_path, tiny_folder, call):
    def mine(completion):
        CALLS[call](run)
        return 1.0

    run = prompts_run(tmp_path, tiny_folder, mine)
    events = list(run.events(1))
    (paused,) = [event for event in events if isinstance(event, RunPaused)]
    assert "mine" in paused.reason
    assert "run cannot" in paused.reason
    assert "from inside a reward" in paused.reason
    assert (run.step_count, "\n" in paused.reason) == (0, False)
    assert not run.background.active


@pytest.mark.parametrize("call", CALLS)
def test_a_loss_that_moves_or_asks_its_own_run_is_named_in_one_line(tmp_path, tiny_folder, call):
    calling = []

    @register_objective("calling", rows="tokens")
    def calling_loss(targets):
        if calling:
            CALLS[call](run)
        return -targets.logprob_S

    try:
        run = rows_run(tmp_path, tiny_folder, method="calling", val_set_size=0, steps_per_eval=-1)
        before = run.step()
        calling.append(True)
        with pytest.raises(TrainingError) as raised:
            run.step()
        assert "run cannot" in str(raised.value)
        assert "from inside a reward, a loss" in str(raised.value)
        assert run.step_count == before.step == 1
    finally:
        METHODS.pop("calling", None)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.matrix(every=8)
def test_a_listener_that_moves_or_asks_the_run_learns_what_it_may_do_and_training_continues(
    tmp_path, tiny_folder, capsys, call
):
    run = rows_run(tmp_path, tiny_folder)
    run.listen(lambda event: CALLS[call](run))
    assert run.run().step == 6
    said = capsys.readouterr().err
    assert said.count("run cannot") == 1
    assert "from inside a listener" in said
    assert "run.request(Pause())" in said
    assert run.history["loss"] == [event.loss for event in run.history.in_effect if isinstance(event, StepCompleted)]


def test_what_a_listener_may_do_works(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder)
    seen = []

    def listener(event):
        if isinstance(event, StepCompleted) and event.step == 2:
            seen.append((len(run.history), run.status(), run.plot()))
            run.set(learning_rate=1e-5)
            run.save()
            run.request(Question("say red", lambda text, done: seen.append(text), max_tokens=2))
            run.request(Pause())

    run.listen(listener)
    assert run.run().step == 2
    assert seen[0][0] == 2
    assert run.step().learning_rate <= 1e-5


def test_an_answer_that_cannot_be_taken_stops_nothing(tmp_path, tiny_folder, capsys):
    run = rows_run(tmp_path, tiny_folder)
    run.step()
    run.request(Question("say red", lambda text, done: run.step(), max_tokens=2))
    assert run.run().step == 6
    assert capsys.readouterr().err.count("run cannot") == 1


def test_another_run_may_be_asked_by_a_reward(tmp_path, tiny_folder):
    judge = rows_run(tmp_path, tiny_folder, adapter_path=str(tmp_path / "judge"))
    judge.step()

    def judged(completion):
        return float(len(judge.generate(completion or "x", max_tokens=2)))

    run = prompts_run(tmp_path, tiny_folder, judged)
    assert run.step().step == 1
    assert not [problem for one in run.history.events if isinstance(one, RolloutCompleted) for problem in one.problems]


def test_moving_it_from_outside_is_possible_again_after_a_refusal(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder)
    run.listen(lambda event: run.step())
    run.step(2)
    with pytest.raises(CommandError, match="cannot go back"):
        run.rewind(to=2)
    assert run.rewind(1).step == 1


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from mlx_nb import Run, RunConfig
from tiny import tiny_prompts
calls = []
def mine(completion):
    calls.append(1)
    if len(calls) > 12:
        said = False
        while True:
            try:
                if not said:
                    said = True
                    print("stuck", flush=True)
                time.sleep(0.05)
            except:
                pass
    return float(len(completion))
settings = dict(model={model!r}, method="grpo", data=tiny_prompts(8), iters=50, batch_size=2, group_size=2,
    max_completion_length=4, val_set_size=0, save_every=-1, autosave_minutes=None, adapter_path={folder!r})
run = Run(RunConfig.from_dict({{**settings, "rewards": [mine]}}))
run.run()
"""


@pytest.mark.long
@pytest.mark.parametrize(("number", "times"), [(signal.SIGTERM, 1), (signal.SIGINT, 5)])
def test_a_reward_that_catches_everything_cannot_keep_the_process_from_its_end(tmp_path, tiny_folder, number, times):
    code = SCRIPT.format(tests=str(SUPPORT), model=str(tiny_folder), folder=str(tmp_path / "a"))
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "stuck\n"
        for _ in range(times):
            assert process.poll() is None
            os.kill(process.pid, number)
            time.sleep(0.4)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == -number
    assert said.splitlines()[-1].startswith(
        "A user-defined function catches every interrupt, so this process ends here."
    )
    assert "Traceback" not in said
    saved = CheckpointStore(tmp_path / "a" / "checkpoints").list()
    assert (saved[-1].step, saved[-1].kind) == (3, "exit")


def test_a_pause_at_once_breaks_off_no_evaluation_that_is_no_part_of_moving(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, iters=4, val_set_size=0.2)
    run.step()
    expected = run.evaluate().loss
    run.request(Pause("from elsewhere", at_once=True))
    assert run.evaluate().loss == expected
    assert run.run().reason == "from elsewhere"
    assert run.run().reason == "iters reached"


@pytest.mark.long
def test_a_reward_that_asks_for_a_pause_at_once_ends_an_evaluation_in_words(tmp_path, tiny_folder):
    def mine(completion):
        if asking:
            run.request(Pause("by the reward", at_once=True))
        return 1.0

    asking = []
    run = prompts_run(tmp_path, tiny_folder, mine, val_set_size=0.25)
    run.step()
    asking.append(True)
    with pytest.raises(CommandError, match=r"aborted by an immediate pause\. Nothing has changed"):
        run.evaluate()
    asking.clear()
    assert run.run().reason == "by the reward"
    assert run.run().reason == "iters reached"
