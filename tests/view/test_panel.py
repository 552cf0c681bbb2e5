"""The panel's state: what a page is told of a run, what clicks do, and how little is sent."""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import random
import re
import sys
import time
import weakref
from types import SimpleNamespace

import pytest
from traitlets import TraitError

from curve_histories import update, validation
from mlx_nb import Run, RunConfig
from mlx_nb.errors import CommandError, DataError
from mlx_nb.events import (
    AdapterSaved,
    Cancel,
    EvaluationCompleted,
    Pause,
    Progress,
    RequestRefused,
    Rewound,
    RunFinished,
    RunPaused,
    RunState,
    SampleGenerated,
    SettingChanged,
    StepCompleted,
)
from mlx_nb.events.history import History
from mlx_nb.view.curves.curves import SeriesBuilder
from mlx_nb.view.event_text import progress_words
from mlx_nb.view.panel import heartbeat
from mlx_nb.view.panel.clicks import result_of
from mlx_nb.view.panel.panel import KEPT, Panel
from mlx_nb.view.panel.series_changes import series_changes
from mlx_nb.view.panel.state import Activity, progress_of, samples_of
from mlx_nb.view.panel.static_view import static_html
from runs import rows_run
from tiny import tiny_rows


def received(panel, *messages):
    """What the page is sent when it sends these."""
    sent = []
    panel.send = lambda content, buffers=None: sent.append(copy.deepcopy(content))
    for message in messages:
        panel._on_message(None, message, None)
    return sent


async def done(run, panel, *messages):
    """Click, and wait until the run stands again."""
    sent = received(panel, *messages)
    await asyncio.sleep(0.02)
    await run
    await asyncio.sleep(0.02)
    return sent


def applied(series, changes):
    """What the page makes of changes, as `applySeries` in page/store.js does."""
    series = copy.deepcopy(series)
    for group, number, kept, steps, values in changes.pop("lines"):
        line = series["groups"][group]["lines"][number]
        line["step"][kept:], line["value"][kept:] = steps, values
    for number, kept, *columns in changes.pop("clocks"):
        for name, column in zip(("step", "tokens", "seconds"), columns):
            series["clocks"][number][name][kept:] = column
    return {**series, **changes}


# What is sent


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.matrix(every=3)
def test_changes_bring_the_data_of_a_page_up_to_date(seed):
    draw, history = random.Random(seed), History()
    builder = SeriesBuilder(history)
    shown = copy.deepcopy(builder.series(3000))
    step = 0
    for _ in range(60):
        for _ in range(draw.choice([0, 1, 5, 90])):
            step += 1
            history.append(update(step, draw.choice([draw.random(), float("nan")])))
            if draw.random() < 0.05:
                history.append(validation(step, draw.random()))
            if draw.random() < 0.02:
                history.append(SettingChanged(step, "learning_rate", 1e-4, 5e-5))
        if draw.random() < 0.1 and step > 10:
            kept = next(at for at, event in enumerate(history.in_effect) if event.step > step - 5)
            history.append(Rewound(step - 5, step, kept))
            step -= 5
        new = copy.deepcopy(builder.series(3000))
        changes = series_changes(shown, new)
        shown = new if changes is None else applied(shown, json.loads(json.dumps(changes)))
        assert shown == new


def instructions_of(work):
    """How many instructions of Python `work` takes, in every function that it calls."""
    counted = 0

    def trace(frame, event, _):
        nonlocal counted
        frame.f_trace_opcodes = True
        counted += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return counted


@pytest.mark.long
def test_a_refresh_of_a_long_run_sends_and_costs_no_more_than_one_of_a_short_run(tmp_path, tiny_folder):
    def refreshed(updates):
        """Bytes of the first state, bytes of each of 20 refreshes, and the instructions of the last."""
        run = rows_run(tmp_path, tiny_folder, adapter_path=str(tmp_path / str(updates)))
        run.step()
        for step in range(2, updates + 1):
            run.history.append(update(step, 1 + 1 / step))
        panel = run.panel()
        whole, sizes, instructions = len(json.dumps(panel.series)), [], 0
        for step in range(updates + 1, updates + 21):
            run.history.append(update(step, 1.0))
            sent = []
            panel.send = lambda content, buffers=None, sent=sent: sent.append(content)
            panel.refresh() if step < updates + 20 else (instructions := instructions_of(panel.refresh))
            sizes.append(len(json.dumps(sent)))
        return whole, sizes, instructions

    _, _, few = refreshed(2_000)  # which fill all points that a line may have
    whole, sizes, many = refreshed(20_000)
    assert whole < 100_000
    assert max(sizes) < 100_000
    assert sorted(sizes)[10] < 5_000
    assert many < 1.5 * few


def test_refreshes_take_a_hundredth_of_the_time(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder)
    panel = run.panel()
    run.step()
    panel._cost, drawn = 3600.0, panel.progress
    run.step()  # in which it validates and saves
    assert panel.progress == drawn
    panel._cost, panel._drawn_at = 0.0, 0.0
    run.step()
    assert panel.progress["step"] == 3


def test_work_that_keeps_the_kernel_is_shown_before_it_begins(tmp_path, tiny_folder, monkeypatch):
    run = rows_run(tmp_path, tiny_folder)
    monkeypatch.setattr(type(run), "active", True)
    panel, pieces = run.panel(), []
    for progress in run.load():
        if not progress.total:
            pieces.append((panel.activity["words"], progress_words(progress)))
        panel._cost = 3600.0  # so that the time for another refresh does not come
    assert all(shown == words for shown, words in pieces), pieces
    tried = [words for words, _ in pieces if "tried on a few tokens" in words]
    assert [words.split(",")[0].split()[-1] for words in tried] == ["head", "attention", "rows", "gradient"]


def test_work_that_continues_without_reporting_progress_is_not_shown_again(tmp_path, tiny_folder, monkeypatch):
    panel, drawn = rows_run(tmp_path, tiny_folder).panel(), []
    monkeypatch.setattr(Panel, "refresh", lambda panel: drawn.append(1))
    panel._cost, panel._drawn_at = 3600.0, time.monotonic()
    for _ in range(50):
        panel._on_event(Progress(0, "loading tokenizer", 0, 0))
    assert len(drawn) == 1


def test_a_page_that_missed_something_gets_everything(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder)
    panel = run.panel()
    run.step(3)
    panel.refresh()
    (whole,) = received(panel, {"do": "whole"})
    assert whole["kind"] == "whole"
    assert whole["series"] == panel.series == panel.get_state()["series"]
    assert [line for line in whole["event_log"]["lines"] if "updates" in line]


# What is read from Python, and from there


def test_a_run_has_one_panel_whose_selection_is_readable(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder)
    panel = run.panel()
    assert run.panel() is panel
    assert panel.selection == {"update": None, "split": "train", "rows": "update", "row": None}
    panel.set_state({"selection": {"update": 3, "split": "train", "rows": "update", "row": 7}, "tab": "Rows"})
    assert run.panel().selection["row"] == 7
    assert run.panel().tab == "Rows"
    with pytest.raises(TraitError):
        panel.scale = "cubic"
    panel.close()
    assert run.panel() is not panel


def test_the_state_of_a_run_is_shown_as_it_changes(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, val_set_size=4)
    panel = run.panel()
    assert (panel.head["state"], panel.progress["step"]) == ("built", 0)
    assert set(panel.clicks) == {"run", "step", "set", "keep", "chat"}
    run.step(2)
    panel.refresh()
    assert panel.head["state"] == "paused"
    assert panel.progress["parts"][0] == f"update 2 of {run.config.iters}"
    assert {"run", "step", "stop", "save", "evaluate", "rewind"} <= set(panel.clicks)
    assert "pause" not in panel.clicks
    assert "skip" not in panel.clicks
    event = run.history.last_step
    assert panel.latest["update"] == 2
    assert sorted(row for row, _, _ in panel.latest["rows"]) == sorted(set(event.rows))
    where = run.rows("train").examples.source.location
    assert [place for _, _, place in panel.latest["rows"]] == [where(row) for row, _, _ in panel.latest["rows"]]
    run.run()
    panel.refresh()
    assert panel.head["state"] == "finished"
    assert set(panel.clicks) & {"run", "step", "pause"} == set()


def test_a_doubtful_rate_and_rows_that_are_left_out_are_in_the_head_as_long_as_they_hold(tmp_path, tiny_folder):
    rows = [*tiny_rows(12), {"product": "umbrella"}]
    run = rows_run(tmp_path, tiny_folder, data=rows, val_set_size=4, learning_rate=1e4)
    panel = run.panel()
    (doubt,) = panel.head["notes"]
    assert doubt[0]
    assert "Was 1e-4 meant?" in doubt[1]
    run.set(learning_rate=1e-4)
    run.step()
    panel.refresh()
    notes = panel.head["notes"]
    assert not any(is_warning or "1e-4" in words for is_warning, words in notes)
    assert any(words.startswith("Left out of train: 1 row.") for _, words in notes)


def test_a_run_that_failed_says_why_and_offers_what_makes_sense(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder)

    async def fails():
        panel = run.panel()
        run.start(1)
        await run

        def broken(*_, **__):
            raise CommandError("the rows are gone. Make them again.")

        run.trainer.stepper.update = broken
        run.start()
        with pytest.raises(CommandError):
            await run
        await asyncio.sleep(0.01)
        return panel

    panel = asyncio.run(fails())
    assert panel.head["state"] == "failed"
    assert panel.head["failure"] == "the rows are gone. Make them again." == run.failure
    assert {"run", "skip", "rewind"} <= set(panel.clicks)
    assert "pause" not in panel.clicks


def test_a_run_that_cannot_begin_offers_nothing_that_would_fail_again(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, data=[{"product": "umbrella", "slogan": "rain"}] * 4)

    async def fails():
        panel = run.panel()
        run.start()
        with pytest.raises(DataError):
            await run
        await asyncio.sleep(0.01)
        return panel

    panel = asyncio.run(fails())
    assert panel.head["state"] == "failed"
    assert "`prompt_feature: product` and `completion_feature: slogan`" in panel.head["failure"]
    assert panel.head["next_step"] == "Fix the problem, then execute the cell again."
    assert panel.clicks == []


def test_a_run_that_is_over_says_how_it_trains_on(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, iters=2)
    panel = run.panel()
    assert panel.head["next_step"] == ""
    run.run()
    panel.refresh()
    assert "%finetune run 20 does 20 more" in panel.head["next_step"]
    assert not {"run", "step", "pause"} & set(panel.clicks)


def test_a_prompt_that_is_answered_again_at_the_same_update_has_one_answer_there():
    config = RunConfig(sample_prompts=["umbrella"])
    history = History()
    for step, answer in ((0, "base"), (4, "a"), (4, "b"), (6, "c")):
        history.append(SampleGenerated(step, "umbrella", answer, "base"))
    (reported,) = samples_of(history, config)
    assert reported["answers"] == [[0, "base"], [4, "b"], [6, "c"]]


# What is being done


@pytest.mark.long
def test_a_panel_is_updated_while_a_cell_blocks_the_kernel_and_says_that_clicks_wait(
    tmp_path, tiny_folder, monkeypatch
):
    monkeypatch.setattr("mlx_nb.view.panel.panel.SECONDS_BETWEEN_REFRESHES", 0.0)
    monkeypatch.setattr("mlx_nb.view.panel.panel.MAX_TIME_SHARE", 10.0)
    monkeypatch.setattr("mlx_nb.view.panel.panel.SECONDS_TO_OPEN", 0.0)

    async def queued():
        run = rows_run(tmp_path, tiny_folder, iters=30, steps_per_eval=-1, save_every=-1)
        panel = run.panel()
        run.start()
        reported = []
        for event in run.background.drive_in_cell():  # as in a cell that waits
            if isinstance(event, StepCompleted):
                reported.append((event.step - panel.progress["step"], KEPT in panel.activity.get("words", "")))
                if event.step == 25:
                    assert panel.clicks == []
        assert panel.clicks == []
        await asyncio.sleep(0.05)
        assert {"save", "rewind"} <= set(panel.clicks)
        return reported

    reported = asyncio.run(queued())
    assert {behind for behind, _ in reported[15:]} == {0}
    assert all(said for _, said in reported[20:-1])


def standing(state=RunState.RUNNING, step=0, *, trains=True, prepared=True, active=True):
    return SimpleNamespace(state=state, step_count=step, trains=trains, prepared=prepared, active=active)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (standing(), "computing the first update"),
        (standing(prepared=False), "loading"),
        (standing(step=7), "computing update 8"),
        (standing(step=10), "finishing the run"),
        (standing(step=7, trains=False), "carrying out a request"),
    ],
)
def test_what_is_being_done_is_reported_and_no_update_that_is_not_computed(run, words):
    assert Activity().as_data(run, 10)["words"] == words


def test_what_is_done_is_reported_with_how_long_it_takes(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    activity = Activity()
    assert activity.as_data(standing(RunState.PAUSED, active=False), 10) == {}
    assert activity.as_data(standing(step=0), 10)["words"] == "computing the first update"
    activity.note(Progress(0, "tokenizing train", 0, 400, 0.0))
    assert activity.as_data(standing(step=0), 10)["left"] is None
    now[0] = 102.0
    activity.note(Progress(0, "tokenizing train", 100, 400, 2.0))
    reported = activity.as_data(standing(step=0), 10)
    assert reported["words"] == "tokenizing train rows: 100 of 400, 50 rows a second"
    assert (reported["done"], reported["total"], reported["left"]) == (100, 400, 6.0)
    activity.note(Progress(0, "reference", 5, 50))
    now[0] = 103.0
    activity.note(Progress(0, "reference", 15, 50))
    assert activity.as_data(standing(step=0), 10)["left"] == pytest.approx(3.5)
    activity.note(None)
    assert activity.as_data(standing(step=7), 10)["words"] == "computing update 8"


def test_the_pace_is_that_of_the_last_updates():
    history = History(update(step, seconds=2.0) for step in range(1, 6))
    assert progress_of(history, 10, 500)["pace"] == pytest.approx(2.0)
    assert progress_of(History(), None, 0)["parts"] == ["not loaded yet"]


# Clicks


@pytest.mark.long
def test_clicks_do_what_they_say_and_their_result_is_reported(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, val_set_size=4, iters=20)

    async def clicks():
        panel = run.panel()
        await done(run, panel, {"do": "step", "updates": 3})
        assert run.step_count == 3
        await done(run, panel, {"do": "save"})
        assert panel.notice["text"] == f"saved to {run.folder}" or panel.notice["text"].startswith("saved to ")
        await done(run, panel, {"do": "evaluate"})
        assert panel.notice["text"].startswith("update 3: valid loss ")
        await done(run, panel, {"do": "set", "name": "learning_rate", "text": "2e-4"})
        assert run.config.learning_rate == 2e-4
        assert panel.settings[0][:2] == ["learning_rate", "0.0002"]
        await done(run, panel, {"do": "set", "name": "learning_rate", "text": "fast"})
        assert panel.notice["bad"]
        assert "learning_rate" in panel.notice["text"]
        await done(run, panel, {"do": "rewind", "to": 1})
        assert run.step_count == 1
        assert panel.notice["text"] == "went back from update 3 to 1"
        await done(run, panel, {"do": "no such click"})
        assert "does not know 'no such click'" in panel.notice["text"]
        await done(run, panel, {"do": "keep", "prompt": "say red"})
        assert [one["prompt"] for one in panel.samples] == ["say red"]
        assert [step for step, _ in panel.samples[0]["answers"]] == [1]
        await done(run, panel, {"do": "forget", "prompt": "say red"})
        assert run.config.sample_prompts in (None, ())
        await done(run, panel, {"do": "stop"})
        assert panel.head["state"] == "stopped"
        assert panel.notice["text"].startswith("finished after update 1 (stopped); saved to ")

    asyncio.run(clicks())


def test_a_pause_is_requested_on_whatever_thread_the_click_arrives(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder)
    run.step()
    asked, panel = [], run.panel()
    run.request = asked.append
    panel._later = lambda act: pytest.fail("a pause does not wait for the loop")
    received(panel, {"do": "pause"})
    assert asked == [Pause()]


def test_results_are_reported_once_where_they_were_asked_for():
    config, awaited = RunConfig(), {"save"}
    saved, measured = AdapterSaved(4, "adapters/bees", "last"), EvaluationCompleted(4, "valid", 1.5, 4.48, 40.0, 4, 0.2)
    assert result_of(saved, awaited, config) == "saved to adapters/bees"
    assert result_of(saved, awaited, config) == ""
    assert result_of(measured, awaited, config) == ""
    assert result_of(RunPaused(12, "pause requested"), awaited, config) == "paused after update 12"
    assert result_of(RunPaused(12, "the disk is full"), awaited, config) == "paused after update 12: the disk is full"
    assert result_of(RequestRefused(3, "there is no update 9"), awaited, config) == "there is no update 9"
    ended = RunFinished(60, "iters reached", 1.0, 10, 5.0, None, None, "adapters/bees")
    assert result_of(ended, awaited, config) == "finished after update 60 (iters reached); saved to adapters/bees"


def test_rows_come_in_pages_with_the_users_own_places(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, val_set_size=4)
    run.step(2)
    panel = run.panel()
    everything, row, batch, worst, missing = received(
        panel,
        {"show": "rows", "id": 1, "which": "all"},
        {"show": "row", "id": 2, "split": "train", "row": 3},
        {"show": "batch", "id": 3},
        {"show": "rows", "id": 4, "which": "worst"},
        {"show": "rows", "id": 5, "which": "all", "split": "test"},
    )
    examples = run.rows("train").examples
    assert [one[0] for one in everything["rows"]] == list(range(min(50, len(examples))))
    assert everything["rows"][3][2] == examples.source.location(3)
    assert row["html"] == run.rows("train")[3]._repr_html_()
    assert "mlx-nb-batch" in batch["html"]
    assert [one[0] for one in worst["rows"]] == list(run.row_losses())
    assert "test" in missing["error"]


def test_a_chat_grows_word_by_word_and_can_be_ended(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder)

    async def talks():
        panel, reported = run.panel(), []
        run.start(1)
        await run
        panel.observe(lambda change: reported.append(change.new), "talk")
        received(panel, {"do": "chat", "text": "say red"}, {"do": "chat", "text": "too early"})
        await asyncio.sleep(0)
        assert [turn["done"] for turn in panel.talk] == [True, False]
        received(panel, {"do": "enough"})
        await asyncio.sleep(0.05)
        await run
        (asked, answer) = panel.talk
        assert (asked["content"], answer["role"], answer["done"]) == ("say red", "assistant", True)
        assert len(answer["content"]) < 100
        await done(run, panel, {"do": "keep last"})
        assert run.config.sample_prompts in (["say red"], ("say red",))
        received(panel, {"do": "new chat"})
        await asyncio.sleep(0.01)
        assert panel.talk == []

    asyncio.run(talks())


@pytest.mark.long
def test_a_paused_run_that_answers_is_paused_and_can_be_run(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, iters=6)

    async def answers():
        panel, states, doing = run.panel(), set(), set()
        run.start(2)
        await run
        panel.observe(lambda change: states.add(change.new["state"]), "head")
        panel.observe(lambda change: doing.add(change.new.get("words", "").rstrip("0123456789 ")), "activity")
        received(panel, {"do": "chat", "text": "say red"})
        await asyncio.sleep(0.01)
        panel.refresh()
        assert run.active
        assert (str(run.state), panel.head["state"]) == ("paused", "paused")
        assert {"run", "step"} <= set(panel.clicks)
        assert "pause" not in panel.clicks
        received(panel, {"do": "run"})
        await asyncio.sleep(0.02)
        panel.refresh()
        assert panel.head["state"] == "running"
        await run
        assert run.step_count == 6
        assert panel.talk[-1]["done"]
        assert not any(words.startswith("computing update 3 ") for words in doing if "answer" in words)

    asyncio.run(answers())


@pytest.mark.long
def test_answers_to_kept_prompts_can_be_left_out_while_they_are_given(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, iters=3, sample_prompts=["say red", "say blue"], sample_tokens=60)

    async def leaves_out():
        panel = run.panel()
        run.request(Cancel())  # there is nothing to leave out yet
        run.start(1)
        await run
        answered = sum(isinstance(event, SampleGenerated) for event in run.history.events)
        received(panel, {"do": "sample"})
        while "answering" not in panel.activity.get("words", ""):
            await asyncio.sleep(0.005)
            panel.refresh()
        assert "cancel" in panel.clicks
        received(panel, {"do": "cancel"})
        await run
        panel.refresh()
        assert "cancel" not in panel.clicks
        assert sum(isinstance(event, SampleGenerated) for event in run.history.events) == answered
        run.start()
        await run
        assert str(run.state) == "finished"

    asyncio.run(leaves_out())


def test_a_rewind_while_counted_updates_are_done_leaves_the_run_there(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, val_set_size=4, iters=40)

    async def goes_back():
        panel = run.panel()
        run.start(3)
        await run
        facts = panel.head["facts"]
        run.start(10)
        while run.step_count < 6:
            await asyncio.sleep(0.002)
        await done(run, panel, {"do": "rewind", "to": 0})
        assert (run.step_count, str(run.state)) == (0, "paused")
        assert panel.head["facts"][:3] == facts[:3]
        assert panel.notice["text"].startswith("went back from update ")
        run.start(1)
        await run
        assert run.step_count == 1
        assert [row["step"] for row in run.history.evaluations("valid")] == [0]  # measured again

    asyncio.run(goes_back())


def test_the_log_gives_no_event_a_time_that_is_not_its_own(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, val_set_size=4, iters=8)
    run.run(until=4)
    run.release()
    resumed = Run.resume(run.folder)
    panel = resumed.panel()
    before = list(panel.event_log["lines"])
    assert before
    assert not any(re.match(r"\d\d:\d\d:\d\d", line) for line in before)
    resumed.run()
    (new, *_) = panel.event_log["lines"][len(before) :]
    assert re.match(r"\d\d:\d\d:\d\d  \S", new)


def test_an_event_and_its_remarks_are_one_entry_of_the_log_and_nothing_is_said_twice(tmp_path, tiny_folder):
    rows = [*tiny_rows(), {"messages": [{"role": "user", "content": 7}, {"role": "assistant", "content": "x"}]}]
    run = rows_run(tmp_path, tiny_folder, data=rows, iters=8)
    panel = run.panel()
    run.step()
    run.set(learning_rate=5e-5)
    run.step()
    entries = panel.event_log["lines"]
    assert all(re.match(r"\d\d:\d\d:\d\d  \S", entry) for entry in entries)  # the page lists entries newest first
    (left_out,) = [entry for entry in entries if "Left out of train" in entry]
    assert left_out.count("\n          ") == left_out.count("\n") >= 1
    assert sum(entry.count("It is the peak of the schedule") for entry in entries) == 1
    assert panel.event_log["count"] == len(entries)


# Pages without a kernel


def test_a_page_without_a_kernel_shows_the_last_state_as_picture_and_table(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder)
    run.run(until=4)
    panel = run.panel()
    data, _ = panel._repr_mimebundle_()
    html = data["text/html"]
    assert html == static_html(run, panel._device)
    assert "<svg" in html
    assert f"{run.name}: paused after update 4, when this was saved" in html
    assert "%finetune resume" in html
    assert "<script" not in html
    assert "running" not in html
    assert data["text/plain"] == run.status()


def test_the_script_comes_with_the_package_and_needs_nothing_else():
    script = str(Panel._esm)
    assert re.findall(r"https?://[\w./]+", script) == ["http://www.w3.org/2000/svg", "http://www.w3.org/1999/xhtml"]
    assert not re.search(r"^import\b|\bimport\(|\bfetch\(|innerHTML|insertAdjacentHTML|outerHTML", script, re.MULTILINE)
    assert "url(" not in str(Panel._css)
    assert "@import" not in str(Panel._css)


@pytest.mark.long
def test_heartbeats_come_from_a_thread_and_keep_no_panel_alive(monkeypatch):
    monkeypatch.setattr(heartbeat, "SECONDS_BETWEEN_BEATS", 0.01)

    class Page:
        def __init__(self, fails=False):
            self.beats, self.fails = 0, fails

        def send(self, content, buffers=None):
            assert content["kind"] == "beat"
            if self.fails:
                raise OSError("the page is gone")
            self.beats += 1

    page, broken = Page(), Page(fails=True)
    heartbeat.start_beats(broken)
    heartbeat.start_beats(page)
    until = time.monotonic() + 20
    while page.beats < 3 and time.monotonic() < until:  # while this thread computes
        sum(range(1000))
    assert page.beats >= 3
    heartbeat.stop_beats(page)
    time.sleep(0.1)
    silent = page.beats
    time.sleep(0.1)
    assert page.beats == silent
    other = Page()
    heartbeat.start_beats(other)
    gone = weakref.ref(other)
    del other
    time.sleep(0.1)
    gc.collect()
    assert gone() is None
