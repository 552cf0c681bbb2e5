"""What a person asks of a run, from any thread and at any moment, is done once, or refused once; nothing gets stuck."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import get_args

import pytest

from mlx_nb import Run, RunConfig
from mlx_nb.errors import CommandError, ConfigError
from mlx_nb.events import (
    AdapterSaved,
    CheckpointSaved,
    Evaluate,
    EvaluationCompleted,
    Pause,
    Progress,
    Question,
    Request,
    RequestRefused,
    Rewind,
    Rewound,
    RolloutCompleted,
    RunFinished,
    RunPaused,
    RunRequest,
    Sample,
    Save,
    Skip,
    StepCompleted,
    Stop,
    TrainerRequest,
)
from mlx_nb.train.checkpoint_store import CheckpointStore
from mlx_nb.train.inbox import Inbox
from tiny import tiny_prompts, tiny_rows


def make_run(tiny_folder, tmp_path, name="run", **settings):
    values = {"model": str(tiny_folder), "data": tiny_rows(24), "iters": 6, "batch_size": 4, "learning_rate": 1e-2}
    values |= {"lora_parameters": {"rank": 4, "scale": 2.0}, "adapter_path": str(tmp_path / name), **settings}
    namespace = values.pop("namespace", None)
    return Run(RunConfig.from_dict(values), name=name, namespace=namespace)


def test_every_kind_of_request_has_a_handler():
    """Within those two, the type checker wants a branch for each kind."""
    assert set(get_args(TrainerRequest)) | set(get_args(RunRequest)) == set(Request.__subclasses__())
    assert not set(get_args(TrainerRequest)) & set(get_args(RunRequest))


@pytest.mark.parametrize("when", ["before it is loaded", "afterwards"])
@pytest.mark.parametrize("what", ["pause", None, Request(), Pause])
@pytest.mark.matrix(every=8)
def test_a_request_that_no_run_handles_is_a_one_line_error(tmp_path, tiny_folder, what, when):
    run = make_run(tiny_folder, tmp_path)
    if when == "afterwards":
        run.step()
    with pytest.raises(CommandError) as caught:
        run.request(what)
    text = str(caught.value)
    assert "\n" not in text
    assert "Pause, Stop, Skip, Save, Evaluate, Sample, ChangeSetting, Cancel, Question, Rewind" in text
    run.run()
    assert run.finished


def test_what_is_asked_of_the_run_and_of_the_trainer_is_done_in_the_order_it_was_asked(tmp_path, tiny_folder):
    run = make_run(tiny_folder, tmp_path)
    run.step(3)
    done = []
    run.request(Question("say red", lambda text, whole: done.append("first answer") if whole else None, max_tokens=2))
    run.request(Rewind(1))
    run.request(Save())
    run.request(Question("say red", lambda text, whole: done.append("second answer") if whole else None, max_tokens=2))
    for event in run.events(1):
        if isinstance(event, Rewound | AdapterSaved | StepCompleted):
            done.append(type(event).__name__)
    assert done[:4] == ["first answer", "Rewound", "second answer", "AdapterSaved"]
    assert run.step_count == 2


def test_requests_of_many_threads_are_each_taken_once():
    inbox, taken, threads = Inbox(), [], []
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(4):
            threads.append(threading.Thread(target=lambda: [inbox.put(Save()) for _ in range(500)]))
            threads[-1].start()
        while any(thread.is_alive() for thread in threads):
            inbox.put(Pause())
            inbox.drop(Pause)
            taken += list(inbox.take(TrainerRequest))
    finally:
        sys.setswitchinterval(before)
    taken += list(inbox.take(TrainerRequest))
    assert len([request for request in taken if isinstance(request, Save)]) == 2000
    assert Pause not in inbox


def test_what_is_dropped_leaves_the_others_in_their_order():
    inbox = Inbox()
    for request in (Save(), Pause(), Evaluate(), Pause(), Skip()):
        inbox.put(request)
    inbox.drop(Pause)
    inbox.put(Stop())
    assert list(inbox.take(TrainerRequest)) == [Save(), Evaluate(), Skip(), Stop()]


@pytest.mark.long
def test_pauses_from_other_threads_while_it_trains_pause_it_and_break_nothing(tiny_folder, tmp_path):
    run = make_run(tiny_folder, tmp_path, iters=10**6, val_set_size=0, save_every=-1, autosave_minutes=None)
    run.checkpoint = lambda kind="step": None
    run.step()
    stop = threading.Event()

    def click():
        while not stop.wait(1e-4):  # often enough to strike every part of an update, and it computes meanwhile
            run.request(Pause())

    threads = [threading.Thread(target=click) for _ in range(2)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for _ in range(100):
            list(run.events(1))
    finally:
        stop.set()
        sys.setswitchinterval(before)
        for thread in threads:
            thread.join()
    list(run.events(0))  # answers the last of them
    assert isinstance(run.step(), StepCompleted)


def test_what_was_asked_while_it_was_loading_is_done(tiny_folder, tmp_path):
    run = make_run(tiny_folder, tmp_path)
    prepare = run._prepare

    def asked_meanwhile():
        trainer = prepare()
        run.request(Pause())  # as by a click on another thread, before the trainer is there for others
        return trainer

    run._prepare = asked_meanwhile
    assert isinstance(run.run(), RunPaused)
    assert run.step_count == 0


def test_a_setting_that_is_changed_while_it_is_loading_is_that_of_all_that_follows(tiny_folder, tmp_path, monkeypatch):
    """`packing: true` is refused for this model, but no longer asked for when it would be tried."""
    monkeypatch.setattr("mlx_nb.model.training_trial.packing_is_verified", lambda model: False)
    run, words = make_run(tiny_folder, tmp_path, packing=True), []
    for progress in run.load():
        words.append(progress.what)
        if progress.what.startswith("loading packed rows"):
            run.set(packing=False)
    assert words.count("loading packed rows, tried on a few tokens") == 1
    assert run.trainer.config.packing is False


@pytest.mark.long
def test_a_second_interrupt_while_the_pause_is_saved_is_answered_by_that_pause(tiny_folder, tmp_path, monkeypatch):
    run = make_run(tiny_folder, tmp_path, val_set_size=0, iters=20, save_every=-1)
    real = CheckpointStore.save

    def impatient(store, checkpoint, *, kind):
        if kind == "pause":
            os.kill(os.getpid(), signal.SIGINT)
        return real(store, checkpoint, kind=kind)

    monkeypatch.setattr(CheckpointStore, "save", impatient)
    run.listen(
        lambda event: event.step == 3 and isinstance(event, StepCompleted) and os.kill(os.getpid(), signal.SIGINT)
    )
    with pytest.raises(KeyboardInterrupt):  # in a plain script, once the pause is saved
        run.run()
    assert run.step_count == 3
    monkeypatch.setattr(CheckpointStore, "save", real)
    assert isinstance(run.run(), RunFinished)


@pytest.mark.long
def test_looking_more_often_stops_no_run_early(tiny_folder, tmp_path):
    run = make_run(tiny_folder, tmp_path, iters=20, val_set_size=4, steps_per_eval=10, early_stopping_patience=1)
    for _ in range(4):
        run.step()
        for _ in range(3):
            run.request(Evaluate())
    ended = run.run()
    assert ended.reason in ("iters reached", "early stopping")
    assert run.step_count >= 10
    other = make_run(tiny_folder, tmp_path, "b", iters=20, val_set_size=4, steps_per_eval=10, early_stopping_patience=1)
    assert other.run().reason == ended.reason
    assert other.step_count == run.step_count


@pytest.mark.parametrize("request_", [Evaluate(), Sample()], ids=["evaluate", "sample"])
def test_what_cannot_be_done_is_refused_once_and_training_continues(tiny_folder, tmp_path, request_):
    run = make_run(tiny_folder, tmp_path, val_set_size=0)
    run.step()
    run.request(request_)
    events = list(run.events(1))
    assert [type(event) for event in events] == [RequestRefused, StepCompleted]
    assert "no " in events[0].error
    assert isinstance(run.step(), StepCompleted)
    assert not any(isinstance(event, EvaluationCompleted) for event in run.history.events)


@pytest.mark.parametrize("how", ["run", "step", "set", "fork", "resume"])
@pytest.mark.matrix(every=3)
def test_a_stopped_run_can_continue(tiny_folder, tmp_path, how):
    run = make_run(tiny_folder, tmp_path, iters=8, val_set_size=4, steps_per_eval=4)
    run.step(3)
    run.request(Stop())
    assert run.run().reason == "stopped"
    assert (run.state, run.over) == ("stopped", False)
    match how:
        case "run":
            assert run.run().reason == "iters reached"
        case "step":
            assert run.step().step == 4
        case "set":
            run.set(iters=10)
            assert run.run().reason == "iters reached"
            assert run.step_count == 10
        case "fork":
            other = run.fork(name="other", adapter_path=str(tmp_path / "other"))
            assert other.step().step == 4
        case "resume":
            again = Run.resume(tmp_path / "run", data=tiny_rows(24))
            assert again.run().reason == "iters reached"
            assert again.step_count == 8


@pytest.mark.long
def test_a_run_that_stopped_early_continues_with_its_patience_reset(tiny_folder, tmp_path):
    settings = {"iters": 40, "val_set_size": 4, "steps_per_eval": 1, "early_stopping_patience": 2, "learning_rate": 1.0}
    run = make_run(tiny_folder, tmp_path, **settings, loss_spike=None)
    assert run.run().reason == "early stopping"
    stopped_at = run.step_count
    run.run()
    assert run.step_count >= stopped_at + 2


def test_a_run_whose_updates_are_done_is_over(tiny_folder, tmp_path):
    run = make_run(tiny_folder, tmp_path)
    ended = run.run()
    assert run.over
    assert run.run() == ended
    with pytest.raises(CommandError, match="all 6 updates are done"):
        run.step()


def test_a_listener_that_raises_is_named_once_and_kept(tiny_folder, tmp_path, capsys):
    run = make_run(tiny_folder, tmp_path, val_set_size=0)
    seen = []

    def tracking(event):
        seen.append(event)
        if isinstance(event, StepCompleted):
            raise ConnectionError("the server hiccuped")

    run.listen(tracking)
    run.run()
    assert [type(event) for event in seen if not isinstance(event, RequestRefused | Progress | CheckpointSaved)] == [
        type(event) for event in run.history.events
    ]
    said = capsys.readouterr().err
    assert said.count("the server hiccuped") == 1
    assert "tracking" in said


def test_a_reward_that_changes_what_it_is_given_changes_nothing_else(tiny_folder, tmp_path):
    rows = [{**row, "tests": ["a", "b", "c"]} for row in tiny_prompts(4)]

    def passed(completion, tests):
        done = 0
        while tests:
            tests.pop()
            done += 1
        return done

    def together(completions, tests, prompts):
        for list_of_one in tests:
            list_of_one.append("d")
        return [float(len(list_of_one)) for list_of_one in tests]

    run = make_run(
        tiny_folder, tmp_path, data=rows, method="grpo", rewards=["passed", "together"], iters=2, group_size=4,
        batch_size=2, max_completion_length=4, val_set_size=0, namespace={"passed": passed, "together": together},
    )  # fmt: skip
    rollouts = [event for event in run.events(2) if isinstance(event, RolloutCompleted)]
    rewards = [c["rewards"] for rollout in rollouts for group in rollout.groups for c in group["completions"]]
    assert rewards
    assert all(reward == {"passed": 3.0, "together": 4.0} for reward in rewards)
    assert all(row["tests"] == ["a", "b", "c"] for row in rows)


@pytest.mark.long
def test_other_threads_ask_the_model_and_its_base_while_it_trains(tiny_folder, tmp_path):
    whole = make_run(tiny_folder, tmp_path, "whole", iters=30, val_set_size=0, save_every=-1)
    whole.run()
    run = make_run(tiny_folder, tmp_path, iters=30, val_set_size=0, save_every=-1)
    run.step()
    stop, answers, errors = threading.Event(), [], []

    def ask():
        while not stop.is_set():
            try:
                answers.append(run.generate("say red", base=True, max_tokens=3))
                run.generate("say red", max_tokens=2)
                run.evaluate("train")
            except BaseException as error:
                errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        run.run()
    finally:
        stop.set()
        thread.join()
    assert errors == []
    assert len(set(answers)) == 1
    assert run.adapter_bytes() == whole.adapter_bytes()


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (None, {}),
        (5, {}),
        ([None], {}),
        ({"role": "user", "content": "x"}, {}),
        ("\ud800", {}),
        ("x", {"max_tokens": "5"}),
        ("x", {"max_tokens": True}),
        ("x", {"temperature": -1.0}),
        ("x", {"temperature": float("nan")}),
        ("x", {"temperature": "warm"}),
    ],
)
def test_invalid_prompts_and_options_are_one_line_errors(tiny_folder, tmp_path, prompt, options):
    run = make_run(tiny_folder, tmp_path)
    with pytest.raises(CommandError, match=r"cannot ask|half a surrogate|max_tokens must|temperature must"):
        run.generate(prompt, **options)


def test_a_fork_keeps_the_order_of_its_rows(tiny_folder, tmp_path):
    run = make_run(tiny_folder, tmp_path, val_set_size=0)
    run.step()
    with pytest.raises(ConfigError, match="a fork keeps its `seed`"):
        run.fork(seed=5)
