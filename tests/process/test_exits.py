"""A run that ends, in whatever way, has saved what it did: replaced, resumed, dropped, or its process told to end."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
import traceback
import weakref
from pathlib import Path

import ipywidgets
import pytest

import forked
from every_line import PACKAGE, at_line, lines_of
from mlx_nb import Run
from mlx_nb.errors import CheckpointError, CommandError
from mlx_nb.notebook.interrupt_display import LINE
from mlx_nb.notebook.lasting_output import Outcome
from mlx_nb.notebook.session import Session
from mlx_nb.train.checkpoint_store import CheckpointStore
from places import SUPPORT
from runs import rows_run
from tiny import tiny_rows

QUIET = {"save_every": -1, "steps_per_eval": -1, "autosave_minutes": None, "iters": 50}


def saves(folder):
    return [(info.step, info.kind) for info in CheckpointStore(Path(folder) / "checkpoints").list()]


# One run takes the place of another


def test_a_replaced_run_saves_first_and_never_writes_again(tmp_path, tiny_folder):
    session = Session()
    old = rows_run(tmp_path, tiny_folder, **QUIET)
    session.add(old)
    old.step(3)
    new = rows_run(tmp_path, tiny_folder, **QUIET)
    session.add(new)
    assert saves(tmp_path / "a") == [(3, "exit")]
    new.step(2)
    assert saves(tmp_path / "a.previous-1") == [(3, "exit")]
    for act in (old.step, old.run, lambda: old.checkpoint(), lambda: old.save(), lambda: next(old.events())):
        with pytest.raises((CommandError, CheckpointError), match=r"replaced by a new run.*after update 3"):
            act()
    assert saves(tmp_path / "a") == []
    again = Run.resume(tmp_path / "a.previous-1")
    assert again.step_count == 3
    assert again.adapter_bytes() == old.adapter_bytes()


def test_a_run_made_in_python_gives_way_to_a_cell_of_its_folder(tmp_path, tiny_folder):
    old = rows_run(tmp_path, tiny_folder, **QUIET)
    old.step(3)
    session = Session()
    session.add(rows_run(tmp_path, tiny_folder, **QUIET))
    assert saves(tmp_path / "a") == [(3, "exit")]
    session.get().step(5)
    assert saves(tmp_path / "a.previous-1") == [(3, "exit")]
    resumed = Run.resume(tmp_path / "a")
    assert resumed.step_count == 5
    with pytest.raises(CheckpointError, match="replaced by the new run"):
        old.step()


def test_a_run_that_moves_in_the_background_stops_where_it_is_and_is_saved_before_the_new_one(tmp_path, tiny_folder):
    async def replace():
        session = Session()
        old = rows_run(tmp_path, tiny_folder, **{**QUIET, "iters": 10_000})
        session.add(old)
        old.start()
        while old.step_count < 3:
            await asyncio.sleep(0.001)
        new = rows_run(tmp_path, tiny_folder, **QUIET)
        session.add(new)
        at = old.step_count
        assert not old.background.active
        assert saves(tmp_path / "a") == [(at, "exit")]
        new.step(2)
        await asyncio.sleep(0.1)
        assert (old.step_count, new.step_count, saves(tmp_path / "a")) == (at, 2, [])
        return old, new

    asyncio.run(replace())


def test_an_old_run_that_cannot_be_saved_is_not_let_go(tmp_path, tiny_folder, monkeypatch):
    session = Session()
    old = rows_run(tmp_path, tiny_folder, **QUIET)
    session.add(old)
    old.step(2)

    def full(*_arguments, **_options):
        raise CheckpointError("the disk is full.")

    monkeypatch.setattr(CheckpointStore, "save", full)
    with pytest.raises(CheckpointError, match="is not released, because the disk is full"):
        session.add(rows_run(tmp_path, tiny_folder, **QUIET))
    monkeypatch.undo()
    assert session.get() is old
    assert old.step().step == 3


def test_a_run_without_references_is_saved(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, **QUIET)
    run.step(2)
    run = rows_run(tmp_path, tiny_folder, **QUIET)
    run.step()
    assert saves(tmp_path / "a.previous-1") == [(2, "exit")]
    del run
    gc.collect()
    assert saves(tmp_path / "a") == [(1, "exit")]


@pytest.mark.parametrize("word", ["unload_ext", "reload_ext"])
def test_unloading_stops_and_saves_what_moves_and_says_how_it_goes_on(shell, tiny_folder, word, capsys):
    shell.user_ns["rows"] = tiny_rows(24)
    cell = f"model: {tiny_folder}\ndata: rows\niters: 50\nval_set_size: 0\nautosave_minutes: null\n"
    shell.run_cell_magic("finetune", "--paused -o run", cell)
    shell.user_ns["run"].step(4)
    shell.run_line_magic(word, "mlx_nb")
    assert saves("adapters/run") == [(4, "exit")]
    folder = Path("adapters/run").resolve()
    told = f"run is saved, paused after update 4. `%finetune resume {folder}` goes on with it."
    assert told in capsys.readouterr().out.splitlines()
    assert shell.user_ns["run"].step().step == 5
    if word == "unload_ext":
        shell.run_line_magic("load_ext", "mlx_nb")


# Nothing of a replaced run stays in memory


@pytest.mark.long
def test_a_replaced_run_its_model_trainer_and_panel_leave_memory_and_the_widgets_do_not_grow(tmp_path, tiny_folder):
    registry = ipywidgets.widget._instances
    counts, gone = [], []

    async def cells():
        session = Session()
        for _ in range(4):
            run = rows_run(tmp_path, tiny_folder, iters=3)
            session.add(run)
            panel = run.panel()
            session.register_panel(run, panel, Outcome(run))
            run.start()
            await run
            gone.append([weakref.ref(one) for one in (run, run.model, run.trainer, panel)])
            del run, panel
            gc.collect()
            counts.append(len(registry))
        session.close()

    gc.collect()  # what earlier tests left
    before = len(registry)
    asyncio.run(cells())
    gc.collect()
    assert len(set(counts)) == 1
    assert len(registry) == before
    assert [[ref() for ref in refs] for refs in gone] == [[None] * 4] * 4


def browser_in_the_cell(run):
    browser = run.browse()
    browser.color.value = "loss now"
    return browser


async def panel_while_it_moves(run):
    panel = run.panel()
    run.start(1)
    await run
    return panel


VIEWS = {
    "a panel": lambda run: run.panel(),
    "a panel while it moved": lambda run: asyncio.run(panel_while_it_moves(run)),
    "two panels": lambda run: [run.panel(), run.panel()],
    "a browser": browser_in_the_cell,
    "two browsers": lambda run: [run.browse(), run.browse("valid")],
    "a row": lambda run: run.rows("train")[0],
    "losses": lambda run: run.row_losses(),
    "a figure": lambda run: run.plot(),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.matrix(every=8)
def test_what_shows_a_run_does_not_keep_it_and_leaves_no_widgets(tmp_path, tiny_folder, view):
    registry = ipywidgets.widget._instances
    before = set(registry)
    run = rows_run(tmp_path, tiny_folder, val_set_size=4)
    run.step(2)
    shown = VIEWS[view](run)
    gone = [weakref.ref(one) for one in (run, run.model, run.trainer)]
    del run
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3
    del shown
    gc.collect()
    assert set(registry) - before == set()


@pytest.mark.parametrize("looped", [False, True], ids=["script", "kernel"])
def test_a_panel_whose_run_is_gone_displays_as_one_line_that_says_so(tmp_path, tiny_folder, caplog, looped):
    def shown():
        panel = rows_run(tmp_path, tiny_folder).panel()
        gc.collect()
        return panel._repr_mimebundle_()

    async def in_loop():
        bundle = shown()
        await asyncio.sleep(0.01)
        return bundle

    bundle = asyncio.run(in_loop()) if looped else shown()
    assert list(bundle) == ["text/plain"]
    assert caplog.records == []  # asyncio logs what was raised in the loop
    assert bundle["text/plain"].startswith(
        "run no longer exists, because no variable holds it. Store a run in a variable"
    )


def test_a_browser_of_a_run_that_is_gone_still_shows_the_rows_and_says_why_there_are_no_losses(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, val_set_size=4)
    run.step(2)
    browser = run.browse()
    del run
    gc.collect()
    browser.next.click()
    assert browser.row == 1
    assert "say green" in browser.view.value
    browser.filter.value = "highest loss"
    assert "run no longer exists" in browser.status.value
    browser.color.value = "loss now"
    assert "run no longer exists" in browser.view.value


@pytest.mark.long
def test_a_browser_that_nobody_holds_lives_as_long_as_its_run(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, val_set_size=4)
    model_id = run.browse().widget.model_id
    gc.collect()
    assert model_id in ipywidgets.widget._instances
    del run
    gc.collect()
    assert model_id not in ipywidgets.widget._instances


# The end of the process

SCRIPT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from mlx_nb import Run, RunConfig
from mlx_nb.events import StepCompleted
from tiny import tiny_rows
settings = {{"model": {model!r}, "data": tiny_rows(24), "iters": 50, "save_every": -1, "steps_per_eval": -1,
    "val_set_size": 0, "autosave_minutes": None, "adapter_path": {folder!r}}}
run = Run(RunConfig.from_dict(settings))
{body}
print("went on")
"""
WHERE = {
    "computing": """
        real = run.trainer._update
        def update():
            if run.step_count == 4:
                os.kill(os.getpid(), number)
            return real()
        run.trainer._update = update
        run.run()
    """,
    "between two events": """
        for event in run.events():
            if isinstance(event, StepCompleted) and event.step == 5:
                os.kill(os.getpid(), number)
    """,
    "between two calls": """
        run.step(5)
        os.kill(os.getpid(), number)
    """,
    "answering": """
        run.step(5)
        def stream(*_arguments, **_options):
            os.kill(os.getpid(), number)
        import mlx_nb.run.run
        mlx_nb.run.run.token_losses = stream
        run.token_losses(run.rows()[0], base=True)
    """,
}


def code_of(tmp_path, tiny_folder, body):
    return SCRIPT.format(
        tests=str(SUPPORT), model=str(tiny_folder), folder=str(tmp_path / "a"), body=textwrap.dedent(body)
    )


def ended(tmp_path, tiny_folder, body):
    return forked.ended(code_of(tmp_path, tiny_folder, body), tmp_path)


def script(tmp_path, tiny_folder, body):
    code = code_of(tmp_path, tiny_folder, body)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.matrix(every=8)
def test_a_signal_that_ends_the_process_saves_the_run_first(tmp_path, tiny_folder, where, number):
    result = ended(tmp_path, tiny_folder, f"number = {int(number)}\n" + textwrap.dedent(WHERE[where]))
    assert result.returncode == 128 + number, result.stderr
    assert "went on" not in result.stdout
    assert "Traceback" not in result.stderr
    # An update that was being computed is dropped, so that the save begins at once.
    assert saves(tmp_path / "a")[-1] == ((4, "pause") if where == "computing" else (5, "exit"))


LONG_WORK = {
    "waiting": "time.sleep(60)",
    # One call in C, in which Python runs no handler of a signal.
    "computing": "hashlib.pbkdf2_hmac('sha256', b'', b'', 500_000_000)",
}


@pytest.mark.long
@pytest.mark.parametrize("work", LONG_WORK)
def test_an_update_that_does_not_end_in_time_loses_only_itself(tmp_path, tiny_folder, work):
    body = f"""
        import hashlib, time
        run.step(3)
        run.checkpoint()
        run.step(2)
        run.trainer.stepper.update = lambda *_, **__: (print("begun", flush=True), {LONG_WORK[work]})
        run.step()
    """
    with script(tmp_path, tiny_folder, body) as process:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 2.4  # then Jupyter kills
        while saves(tmp_path / "a")[-1] != (5, "exit"):
            assert time.monotonic() < deadline, saves(tmp_path / "a")
            time.sleep(0.02)
        process.kill()
    resumed = Run.resume(tmp_path / "a", data=tiny_rows(24))
    whole = rows_run(tmp_path, tiny_folder, **QUIET, val_set_size=0, adapter_path=str(tmp_path / "whole"))
    whole.step(5)
    assert resumed.adapter_bytes() == whole.adapter_bytes()
    assert resumed.history["loss"] == whole.history["loss"]


@pytest.mark.long
def test_a_signal_during_the_last_save_does_not_end_it(tmp_path, tiny_folder):
    body = """
        from mlx_nb.train.checkpoint_store import CheckpointStore
        real = CheckpointStore.save
        def save(*arguments, **options):
            os.kill(os.getpid(), signal.SIGTERM)
            return real(*arguments, **options)
        CheckpointStore.save = save
        run.step(3)
    """
    result = ended(tmp_path, tiny_folder, body)
    assert saves(tmp_path / "a") == [(3, "exit")]
    assert (result.returncode, result.stderr) == (0, "")


# Where a second run is, or who had the signal meanwhile, when the process of a run with unsaved updates is ended.
BESIDES = {
    "another run loads": """
        other = Run(run.config.replace(data=tiny_rows(25), adapter_path=str(run.folder.parent / "b")), name="b")
        real = other.inputs.tokenizing
        def tokenizing():
            os.kill(os.getpid(), signal.SIGTERM)
            yield from real()
        other.inputs.tokenizing = tokenizing
        try:
            other.run()
        except KeyboardInterrupt:
            pass
    """,
    "another run trains on a thread": """
        import threading
        def train():
            other = Run(run.config.replace(iters=100_000, adapter_path=str(run.folder.parent / "b")), name="b")
            other.listen(lambda event: event.step == 3 and os.kill(os.getpid(), signal.SIGTERM))
            other.run()
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
    """,
    "asyncio has given the signal up": """
        import asyncio
        async def app():
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, print)
        asyncio.run(app())
        for event in run.events():
            if isinstance(event, StepCompleted):
                assert (watched := signal.set_wakeup_fd(-1)) != -1
                signal.set_wakeup_fd(watched)
                os.kill(os.getpid(), signal.SIGTERM)
    """,
}


@pytest.mark.long
@pytest.mark.parametrize("what", BESIDES)
def test_a_signal_saves_all_runs_and_ends_the_process_whatever_there_is_besides(tmp_path, tiny_folder, what):
    result = ended(tmp_path, tiny_folder, "run.step(2)\n" + textwrap.dedent(BESIDES[what]))
    assert result.returncode == 128 + signal.SIGTERM, result.stderr
    assert "went on" not in result.stdout
    assert "Traceback" not in result.stderr
    assert saves(tmp_path / "a") == [(3 if "asyncio" in what else 2, "exit")]
    assert [kind for step, kind in saves(tmp_path / "b") if step >= 3] == (["pause"] if "thread" in what else [])


@pytest.mark.long
def test_a_run_that_cannot_be_saved_for_any_reason_does_not_keep_the_others_from_it(tmp_path, tiny_folder):
    body = """
        other = run.fork(adapter_path=str(run.folder.parent / "b"))
        for one in (run, other):
            one.step(2)
        def broken():
            raise RuntimeError("[write] Unable to write")
        for one in (run, other)[:1]:
            one.save_unsaved = broken
    """
    result = ended(tmp_path, tiny_folder, body)
    assert saves(tmp_path / "b") == [(2, "exit")]
    assert "run: RuntimeError: [write] Unable to write" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.long
def test_a_handler_of_the_users_own_is_called_after_the_save(tmp_path, tiny_folder):
    body = """
        signal.signal(signal.SIGTERM, lambda *_: print("mine", os.listdir(run.folder / "checkpoints")))
        run.step(5)
        os.kill(os.getpid(), signal.SIGTERM)
    """
    result = ended(tmp_path, tiny_folder, body)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("mine"), result.stdout
    assert "save-0001-step-0000005-exit" in result.stdout
    assert "went on" in result.stdout


def test_an_ignored_signal_stays_ignored_and_the_others_are_given_back(tmp_path, tiny_folder):
    body = """
        import gc
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        run.step(1)
        os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        assert (watched := signal.set_wakeup_fd(-1)) != -1
        signal.set_wakeup_fd(watched)
        del run
        gc.collect()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.set_wakeup_fd(-1) == -1
    """
    result = ended(tmp_path, tiny_folder, body)
    assert (result.returncode, result.stdout) == (0, "went on\n"), result.stderr


@pytest.mark.long
@pytest.mark.parametrize("end", ["run.run()", "run.step(2); run.release()"])
def test_signals_are_given_back_when_no_run_has_anything_to_lose(tmp_path, tiny_folder, end):
    body = f"""
        mine = lambda *_: None
        signal.signal(signal.SIGTERM, mine)
        run.step(2)
        assert signal.getsignal(signal.SIGTERM) is not mine
        {end}
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        assert signal.set_wakeup_fd(-1) == -1
    """
    result = ended(tmp_path, tiny_folder, body)
    assert (result.returncode, result.stdout) == (0, "went on\n"), result.stderr


@pytest.mark.long
def test_a_handler_that_calls_the_one_before_it_ends_the_process_as_that_did(tmp_path, tiny_folder):
    body = """
        before = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *given: (print("mine", flush=True), before(*given)))
        run.step(5)
        os.kill(os.getpid(), signal.SIGTERM)
    """
    result = ended(tmp_path, tiny_folder, body)
    assert (result.returncode, result.stdout) == (128 + signal.SIGTERM, "mine\n"), result.stderr
    assert saves(tmp_path / "a") == [(5, "exit")]


def test_a_script_that_just_ends_saves_and_a_forked_child_does_not(tmp_path, tiny_folder):
    body = """
        run.step(3)
        if (child := os.fork()) == 0:
            sys.exit(signal.set_wakeup_fd(-1) != -1)
        assert os.waitpid(child, 0)[1] == 0
        assert run.checkpoints() == []
    """
    result = ended(tmp_path, tiny_folder, body)
    assert result.returncode == 0, result.stderr
    assert saves(tmp_path / "a") == [(3, "exit")]


@pytest.mark.long
def test_a_child_forked_by_code_that_a_run_calls_ends_as_it_says(tmp_path, tiny_folder):
    body = """
        def told(event):
            if isinstance(event, StepCompleted) and event.step == 2:
                if (child := os.fork()) == 0:
                    sys.exit(7)
                print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        run.listen(told)
        try:
            run.step(3)
        except Exception as error:
            print(repr(error))
    """
    result = ended(tmp_path, tiny_folder, body)
    assert (result.returncode, result.stdout) == (0, "7\nwent on\n"), result.stderr
    assert saves(tmp_path / "a") == [(3, "exit")]


@pytest.mark.long
@pytest.mark.parametrize("move", ["run.run()", "run.step(10)"])
def test_an_interrupted_script_stops_its_loop_over_runs_once_the_pause_is_saved(tmp_path, tiny_folder, move):
    body = f"""
        def told(event):
            if isinstance(event, StepCompleted) and event.step == 3:
                os.kill(os.getpid(), signal.SIGINT)
        run.listen(told)
        for one in (run, run.fork()):
            {move.replace("run.", "one.")}
            print("next")
    """
    result = ended(tmp_path, tiny_folder, body)
    assert result.returncode == -signal.SIGINT, result.stderr
    assert result.stdout == ""
    assert "is paused after update 3, and saved" in result.stderr
    assert saves(tmp_path / "a")[-1] == (3, "pause")


# An interrupt of our own code, in a notebook


CELLS = {
    "a line magic": "%finetune status",
    "a command with options": "%finetune rows train --top-loss 3",
    "a cell magic": "%%finetune --name other --paused\nmodel: {model}\ndata: rows\niters: 5\nval_set_size: 0\n",
    "a cell magic that cannot be read": "%%finetune --wrong other\nmodel: {model}\n",
    "a step": "%finetune step",
    "a method": "run.check()",
}


@pytest.mark.parametrize("which", CELLS)
@pytest.mark.matrix(every=3)
def test_an_interrupt_at_any_line_of_a_command_is_one_line(shell, tiny_folder, capsys, which):
    shell.user_ns["rows"] = tiny_rows(24)
    cell = f"model: {tiny_folder}\ndata: rows\niters: 5000\nval_set_size: 0\nautosave_minutes: null\n"
    shell.run_cell_magic("finetune", "--paused -o run", cell)
    shell.user_ns["run"].step()
    code = CELLS[which].format(model=tiny_folder)
    lines = len(lines_of(lambda: shell.run_cell(code)))
    assert lines > 5
    for line in {*range(1, 40), *range(40, lines, max(1, lines // 60))} & set(range(1, lines + 1)):
        capsys.readouterr()
        result = interrupted(shell, code, line)
        shown = capsys.readouterr()
        text = shown.out + shown.err
        assert "Traceback" not in text, text
        if result is None:
            assert line < 40
            continue
        assert PACKAGE not in text, text
        if isinstance(result.error_in_exec, KeyboardInterrupt):
            assert LINE in text
        else:  # while it trains, an interrupt is a pause; while an error is being shown, IPython says so itself
            assert "paused" in text or text.strip() == "KeyboardInterrupt" or result.success


def interrupted(shell, code, line):
    """The result of a cell interrupted at that line; None if IPython was still reading the text of the cell."""
    results = []
    try:
        at_line(line, lambda: os.kill(os.getpid(), signal.SIGINT), lambda: results.append(shell.run_cell(code)))
    except KeyboardInterrupt as error:
        if "transform_cell" not in [frame.name for frame in traceback.extract_tb(error.__traceback__)]:
            raise
    return results[0] if results else None


def test_an_interrupt_of_user_code_is_shown_as_usual_and_the_hook_is_restored(shell, capsys):
    shell.run_cell("import os, signal\ndef mine():\n    os.kill(os.getpid(), signal.SIGINT)\n    pass\nmine()")
    text = "".join(capsys.readouterr())
    assert "in mine()" in text.replace("\x1b", "") or "mine" in text
    assert LINE not in text
    before = shell.custom_exceptions
    shell.run_line_magic("unload_ext", "mlx_nb")
    assert (before, shell.custom_exceptions) == ((KeyboardInterrupt,), ())
    shell.run_line_magic("load_ext", "mlx_nb")
