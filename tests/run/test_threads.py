"""A run that one thread moves and others use: each gets what stood at a boundary, and nothing is computed otherwise."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from lives import KINDS, ROWS, e_share, settings_of
from mlx_nb import Run, RunConfig
from mlx_nb.events import EvaluationCompleted, Pause, Progress, RunPaused, SampleGenerated, Save, StepCompleted
from mlx_nb.train.checkpoint_store import CheckpointStore
from mlx_nb.train.inbox import Inbox
from places import SUPPORT
from runs import happened, rows_run
from tiny import tiny_prompts, tiny_rows

QUIET = {"iters": 30, "save_every": -1, "steps_per_eval": -1, "autosave_minutes": None, "keep": 1000, "val_set_size": 4}
ROLLOUTS = {
    "method": "grpo",
    "rewards": ["e_share"],
    "group_size": 2,
    "max_completion_length": 6,
    "lora_parameters": {"rank": 4},
}


def rollouts_run(folder, tiny_folder, **settings):
    values = {"model": str(tiny_folder), "batch_size": 2, "adapter_path": str(folder / "a"), **QUIET, **ROLLOUTS}
    config = {**values, "data": tiny_prompts(), **settings}
    return Run(RunConfig.from_dict(config), namespace={"e_share": e_share})


def saved_arrays(folder):
    """The bytes of parameters and optimizer by update, of every checkpoint in a run's folder."""
    return {
        info.step: {name: (info.path / f"{name}.safetensors").read_bytes() for name in ("parameters", "optimizer")}
        for info in CheckpointStore(folder / "checkpoints", 1000).list()
    }


# What takes a turn


ASKED = {
    "checkpoint": lambda run, folder: run.checkpoint(),
    "save": lambda run, folder: run.save(folder / "saved"),
    "adapter_bytes": lambda run, folder: run.adapter_bytes(),
    "evaluate": lambda run, folder: run.evaluate("valid"),
    "generate": lambda run, folder: run.generate("hi", max_tokens=2),
    "token_losses": lambda run, folder: run.token_losses(run.rows()[0]),
    "set": lambda run, folder: run.set(learning_rate=1e-3),
    "rewind": lambda run, folder: run.rewind(1),
    "fork": lambda run, folder: run.fork(adapter_path=str(folder / "fork")),
    "save_unsaved": lambda run, folder: run.save_unsaved(),
    "compare_checkpoint": lambda run, folder: run.compare_checkpoint(run.checkpoints()[0]),
    "delete_checkpoint": lambda run, folder: run.delete_checkpoint(run.checkpoints()[0]),
    "release": lambda run, folder: run.release(),
}


@pytest.mark.parametrize("what", ASKED)
@pytest.mark.matrix(every=3)
def test_what_another_thread_asks_in_the_middle_of_an_update_is_answered_at_its_end(tmp_path, tiny_folder, what):
    run = rows_run(tmp_path, tiny_folder, **QUIET)
    run.step(2)
    run.checkpoint()
    steps, errors, early = [], [], []

    def ask():
        try:
            ASKED[what](run, tmp_path)
        except Exception as error:
            errors.append(error)
        steps.append(run.step_count)

    thread = threading.Thread(target=ask)
    real = run.trainer.stepper.update

    def update(*arguments, **options):
        thread.start()
        thread.join(0.3)
        early.append(not thread.is_alive())
        return real(*arguments, **options)

    run.trainer.stepper.update = update
    assert run.step().step == 3
    thread.join(60)
    assert (early, errors) == ([False], [])
    assert steps == [2 if what == "rewind" else 3]


@pytest.mark.long
@pytest.mark.parametrize(("make", "iters"), [(rows_run, 12), (rollouts_run, 6)])
def test_checkpoints_that_another_thread_writes_are_those_of_an_untouched_run_byte_for_byte(
    tmp_path, tiny_folder, make, iters
):
    (tmp_path / "whole").mkdir()
    whole = make(tmp_path / "whole", tiny_folder, **{**QUIET, "iters": iters, "save_every": 1})
    whole.run()
    there = saved_arrays(whole.folder)
    run = make(tmp_path, tiny_folder, **{**QUIET, "iters": iters})
    stop, errors = threading.Event(), []

    def work():
        while not stop.is_set():
            try:
                run.checkpoint()
                run.save(tmp_path / "copy")
                run.adapter_bytes()
            except Exception as error:
                errors.append(error)
                return

    run.step()
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        run.run()
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert errors == []
    found = saved_arrays(run.folder)
    assert len(found) > 2
    assert {step: found[step] == there[step] for step in found} == dict.fromkeys(found, True)
    assert run.adapter_bytes() == whole.adapter_bytes()


def test_a_trainer_is_made_once_whoever_asks_for_it(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, **QUIET)
    found = []
    threads = [threading.Thread(target=lambda: found.append(run.trainer)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 4
    assert len({id(one) for one in found}) == 1


# Two loops over the events of one run


@pytest.mark.long
def test_what_one_loop_was_doing_when_another_took_it_up_is_done_once(tmp_path, tiny_folder):
    settings = {**QUIET, "iters": 4, "steps_per_eval": 1, "sample_prompts": ["hi"], "sample_tokens": 3}
    whole = rows_run(tmp_path, tiny_folder, **settings, adapter_path=str(tmp_path / "whole"))
    whole.run()
    run = rows_run(tmp_path, tiny_folder, **settings)
    loops = []
    for _ in range(3):
        loop = run.events()
        for event in loop:
            if isinstance(event, Progress) and run.prepared and run.history.events:
                break
        loops.append(loop)
    for loop in loops:
        for _ in loop:
            pass
    assert happened(run.history.events) == happened(whole.history.events)
    for kind in (EvaluationCompleted, SampleGenerated, StepCompleted):
        counts = [sum(isinstance(event, kind) for event in one.history.events) for one in (run, whole)]
        assert counts[0] == counts[1] > 0
    assert run.adapter_bytes() == whole.adapter_bytes()


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", ["rows", "rollouts"])
@pytest.mark.matrix(every=4)
def test_threads_that_all_move_one_run_come_to_its_end_together(tmp_path, tiny_folder, kind, count):
    def made(name):
        if kind == "rollouts":
            return rollouts_run(tmp_path, tiny_folder, iters=6, adapter_path=str(tmp_path / name))
        settings = {**QUIET, "iters": 12, "steps_per_eval": 1, "val_set_size": 12, "batch_size": 2}
        return rows_run(tmp_path, tiny_folder, **settings, adapter_path=str(tmp_path / name))

    whole = made("whole")
    whole.run()
    run, ended = made("run"), []
    threads = [threading.Thread(target=lambda: ended.append(run.run()), daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [one.reason for one in ended] == ["iters reached"] * count
    assert happened(run.history.events) == happened(whole.history.events)
    assert run.adapter_bytes() == whole.adapter_bytes()


@pytest.mark.long
def test_a_rollout_that_another_loop_made_again_is_trained_on_once(tmp_path, tiny_folder):
    whole = rollouts_run(tmp_path, tiny_folder, iters=3, adapter_path=str(tmp_path / "whole"))
    whole.run()
    run = rollouts_run(tmp_path, tiny_folder, iters=3)
    loop = run.events()
    for event in loop:
        if isinstance(event, Progress) and event.what.startswith("reward"):
            break
    run.step()
    for _ in loop:
        pass
    assert run.adapter_bytes() == whole.adapter_bytes()
    assert run.history["loss"] == whole.history["loss"]


# Requests


def test_a_pause_at_once_from_another_thread_breaks_off_nothing_of_that_thread(tmp_path, tiny_folder):
    raised, threads = [], []

    def asking(completion):
        if not threads:
            threads.append(threading.Thread(target=ask))
            threads[0].start()
            threads[0].join(60)
        return 1.0 * len(completion)

    def ask():
        try:
            run.request(Pause("a click", at_once=True))
        except BaseException as error:
            raised.append(error)

    run = rollouts_run(tmp_path, tiny_folder)
    run.inputs.namespace["e_share"] = asking
    paused = run.run()
    assert raised == []
    assert (isinstance(paused, RunPaused), run.step_count) == (True, 0)


def test_pending_requests_are_never_undercounted():
    inbox, stop, missed = Inbox(), threading.Event(), []
    inbox.put(Save())

    def take():
        while not stop.is_set():
            for _ in inbox.take(Pause | Pause):
                pass
            inbox.drop(Pause)

    thread = threading.Thread(target=take)
    thread.start()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(20_000):
            if Save not in inbox or len(inbox.kept()) != 1:
                missed.append(1)
    finally:
        sys.setswitchinterval(before)
        stop.set()
        thread.join()
    assert not missed


# The end of the process while another thread moves the run


SCRIPT = """
import sys, signal, threading, time
sys.path.insert(0, {tests!r})
from mlx_nb import Run, RunConfig
from tiny import tiny_rows
run = Run(RunConfig.from_dict({{"model": {model!r}, "data": tiny_rows(24), "iters": 100000, "save_every": -1,
    "steps_per_eval": -1, "val_set_size": 0, "autosave_minutes": None, "adapter_path": {folder!r}}}))
inside = threading.Event()
real = run.trainer.stepper.update
def update(*arguments, **options):
    if run.step_count >= 4:
        inside.set()
        time.sleep(0.3)
    return real(*arguments, **options)
run.trainer.stepper.update = update
def work():
    try:
        ({target})()
    finally:
        inside.set()
thread = threading.Thread(target=work, daemon={daemon})
thread.start()
inside.wait()
print("inside" if thread.is_alive() else "died", flush=True)
{end}
"""
ENDS = {
    "the script ends": ("run.run", True, ""),
    "sys.exit": ("run.run", True, "sys.exit(0)"),
    "an answer": ("lambda: (run.step(5), [run.generate('hi', max_tokens=500) for _ in range(100)])", True, ""),
    "an error": ("run.run", True, "raise ValueError('mine')"),
    "SIGTERM, sleeping": ("run.run", True, "time.sleep(60)"),
    "SIGTERM, joining": ("run.run", False, "thread.join()"),
    "SIGTERM, computing": ("run.run", False, "while True: pass"),
    "SIGHUP, joining": ("run.run", True, "thread.join()"),
    "SIGINT, sleeping": ("run.run", True, "time.sleep(60)"),
}


@pytest.mark.long
@pytest.mark.parametrize("how", ENDS)
def test_however_the_process_ends_the_checkpoint_is_of_a_boundary_and_no_update_is_lost(tmp_path, tiny_folder, how):
    target, daemon, end = ENDS[how]
    code = SCRIPT.format(
        tests=str(SUPPORT),
        model=str(tiny_folder),
        folder=str(tmp_path / "a"),
        target=target,
        daemon=daemon,
        end=textwrap.dedent(end),
    )
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    with subprocess.Popen([sys.executable, "-c", code], **options) as process:
        assert process.stdout.readline() == "inside\n", process.kill() or process.stderr.read()
        if how.startswith("SIG"):
            process.send_signal(getattr(signal, how.split(",")[0]))
        try:
            _, errors = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert process.returncode == {"SIGT": 143, "SIGH": 129, "SIGI": -2, "an e": 1}.get(how[:4], 0), errors
    assert "terminate called" not in errors
    folder = tmp_path / "a"
    steps = [info.step for info in CheckpointStore(folder / "checkpoints").list()]
    assert steps[-1] in (4, 5)  # the update in hand is dropped or done
    resumed = Run.resume(folder, data=tiny_rows(24))
    whole = Run(resumed.config.replace(data=tiny_rows(24), adapter_path=str(tmp_path / "whole")))
    whole.step(steps[-1])
    assert resumed.adapter_bytes() == whole.adapter_bytes()
    assert resumed.history["loss"] == whole.history["loss"]


# Every act on a thread of its own


def on_a_thread(act):
    """What `act` returns, done by a thread that ends with it."""
    results, errors = [], []

    def do():
        try:
            results.append(act())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=do)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def acts(kind, model, folder, do):
    """A run of this kind made, moved, taken back, saved, resumed and forked, each by `do`; all that is at the end."""
    settings = f"{settings_of(kind, model)}\nsave_every: 2\nsteps_per_eval: 2\nadapter_path: {folder}/a\n"
    settings = settings.replace("val_set_size: 0", "val_set_size: 4").replace("save_every: -1\n", "")
    rows = ROWS[KINDS[kind].rows]()
    names = {"rows": rows, "e_share": e_share}
    run = do(lambda: Run.from_yaml(settings, namespace=names, iters=8))
    do(lambda: run.trainer)
    do(lambda: run.step(3))
    do(run.checkpoint)
    do(lambda: run.evaluate("valid"))
    do(lambda: run.generate("hi", max_tokens=3))
    do(lambda: run.token_losses(run.rows()[0]))
    do(lambda: run.rewind(1))
    do(lambda: run.step(2))
    do(run.save)
    fork = do(lambda: run.fork(adapter_path=f"{folder}/f", learning_rate=1e-4))
    do(lambda: fork.step(2))
    do(run.release)
    again = do(lambda: Run.resume(f"{folder}/a", data=rows, namespace=names))
    do(lambda: again.run())
    do(lambda: again.report())
    return {
        "run": do(run.adapter_bytes),
        "fork": do(fork.adapter_bytes),
        "again": do(again.adapter_bytes),
        "losses": [run.history["loss"], fork.history["loss"], again.history["loss"]],
    }


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_whose_every_act_is_on_another_thread_is_bit_for_bit_the_same(tmp_path, tiny_folder, kind):
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
    alone = acts(kind, tiny_folder, tmp_path / "one", lambda act: act())
    assert acts(kind, tiny_folder, tmp_path / "many", on_a_thread) == alone
