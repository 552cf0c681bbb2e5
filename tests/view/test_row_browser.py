"""Finding rows and leafing through them: what the widgets do is what a person would see."""

from __future__ import annotations

import json

import pytest

from mlx_nb import Run, RunConfig
from mlx_nb.data.examples.row_finder import FILTERS, RowFinder
from mlx_nb.errors import CommandError
from mlx_nb.notebook.commands import run_line
from mlx_nb.notebook.session import Session
from mlx_nb.view.rows.batch import BatchDisplay
from tiny import tiny_labels, tiny_pairs, tiny_prompts


def chat(user: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}


ROWS = [
    chat("one two three", "short"),
    chat("the longest request of them all " * 3, "ok"),
    chat("hello", "this answer has by far the most to train on, " * 2),
    {"messages": [{"role": "user", "content": "nobody answers"}]},
    chat("HELLO there", "x"),
    {"wrong": 1},
]


@pytest.fixture
def run(tiny_folder, tmp_path):
    config = RunConfig(model=str(tiny_folder), data=ROWS, val_set_size=0, iters=4, adapter_path=str(tmp_path / "a"))
    return Run(config, name="rows")


def found(run, *arguments, **options):
    search = RowFinder(run.rows().examples, lambda: run.row_losses()).search(*arguments, **options)
    assert search.examine(60)
    return list(search.found)


def test_each_filter_finds_its_rows(run):
    views = [run.rows()[row] for row in range(len(ROWS))]
    lengths = {view.row: len(view.conversation.tokens) for view in views if view.conversation is not None}
    trained = {view.row: int((view.example.loss_mask != 0).sum()) for view in views if view.example is not None}
    assert found(run) == list(range(len(ROWS)))
    assert found(run, "longest") == sorted(lengths, key=lambda row: (-lengths[row], row))
    assert found(run, "shortest") == sorted(lengths, key=lambda row: (lengths[row], row))
    assert found(run, "most trained") == sorted(trained, key=lambda row: (-trained[row], row))
    assert found(run, "left out") == [3, 5]
    assert found(run, "truncated") == []
    assert found(run, "all rows", "hello") == [2, 4]
    assert found(run, "left out", "nobody") == [3]
    assert found(run, "all rows", r"^h\w+o$", regex=True) == [2]
    assert found(run, "highest loss") == []
    run.run()
    losses = run.row_losses()
    assert set(losses) == {0, 1, 2, 4}
    assert found(run, "highest loss") == sorted(losses, key=lambda row: -losses[row])


def test_truncated_rows_are_found(run):
    run = Run(RunConfig(model=run.config.model, data=ROWS, val_set_size=0, max_seq_length=60))
    cut = [row for row in range(len(ROWS)) if (e := run.rows()[row].example) is not None and e.dropped_tokens]
    assert found(run, "truncated") == cut != []


def test_an_invalid_pattern_and_an_unknown_filter_are_reported(run):
    with pytest.raises(CommandError, match="not a regular expression"):
        found(run, "all rows", "(", regex=True)
    with pytest.raises(CommandError, match="Did you mean 'longest'"):
        found(run, "longets")


def test_a_search_reads_on_from_where_it_was(run):
    search = RowFinder(run.rows().examples, dict).search("longest")
    while not search.examine(0):
        assert search.read < search.total
        assert len(search.found) <= search.read
    assert list(search.found) == found(run, "longest")


def test_nothing_is_tokenized_until_it_is_shown(run):
    tokenized = []
    examples = run.rows().examples
    view = examples.view
    examples.view = lambda row: tokenized.append(row) or view(row)
    finder = RowFinder(examples, dict)
    assert finder.search("all rows", "hello").examine(60)
    assert tokenized == []
    assert finder.search("longest").examine(60)
    assert finder.search("shortest").examine(60)
    assert tokenized == list(range(len(ROWS)))


def test_the_buttons_lead_through_the_rows(run):
    browser = run.browse()
    assert browser.row == 0
    assert browser.previous.disabled
    assert not browser.next.disabled
    assert "6 rows" in browser.status.value
    browser.next.click()
    assert browser.row == 1
    assert "longest" in browser.view.value
    browser.jump.value = 4
    assert browser.row == 4
    browser.previous.click()
    assert browser.row == browser.jump.value == 3
    assert "left out" in browser.view.value
    browser.jump.value = 99
    assert browser.row == len(ROWS) - 1
    assert browser.next.disabled


def test_filters_text_and_roles_change_what_is_shown(run):
    browser = run.browse()
    browser.filter.value = "longest"
    assert browser.row == found(run, "longest")[0]
    assert "1 of 5 found in 6 of 6 rows" in browser.status.value
    browser.filter.value = FILTERS[0]
    browser.text.value = "hello"
    assert [browser.row, browser.next.click(), browser.row] == [2, None, 4]
    browser.text.value = "no such words"
    assert browser.row is None
    assert "nothing found" in browser.status.value
    assert browser.view.value == ""
    browser.text.value = ""
    assert browser.row == 0
    assert ", hidden" not in browser.view.value
    browser.roles["user"].value = False
    assert ", hidden" in browser.view.value
    assert "one two three" not in browser.view.value
    browser.roles["user"].value = True
    masked = browser.view.value
    browser.color.value = "nothing"
    assert "rgba" in masked
    assert len(browser.view.value) < len(masked)
    browser.regex.value = True
    browser.text.value = "("
    assert "not a regular expression" in browser.status.value


def test_reading_on_shows_the_first_of_all_or_keeps_the_row_that_was_gone_to(run, monkeypatch):
    monkeypatch.setattr("mlx_nb.view.rows.browser.SECONDS_PER_CLICK", 0.0)  # one row a click
    order = found(run, "longest")
    browser = run.browse()
    browser.filter.value = "longest"
    shown = [browser.row]
    while not browser.search.done:
        browser.more.click()
        shown.append(browser.row)
        assert browser.row == browser.search.found[0]
    assert shown[0] != shown[-1] == order[0]
    assert "1 of 5 found in 6 of 6 rows" in browser.status.value
    browser.filter.value = "shortest"
    while len(browser.search.found) < 2:
        browser.more.click()
    browser.next.click()
    kept = browser.row
    while not browser.search.done:
        browser.more.click()
        assert browser.row == kept == browser.search.found[browser.position]


def test_losses_color_the_row_and_earlier_visits_are_reported(run):
    browser = run.browse()
    run.run()
    browser.next.click()
    browser.previous.click()
    visits = run.history.row_losses()[0]
    assert len(visits) >= 1
    assert f"{visits[-1][1]:.3f} after update {visits[-1][0]}" in browser.view.value
    browser.color.value = "change against the base"
    assert "nats" in browser.view.value
    browser.filter.value = "highest loss"
    assert browser.row == next(iter(run.row_losses()))


def test_a_row_of_a_run_displays_itself(run):
    row = run.rows()[0]
    assert "mlx-nb-tokens" in row._repr_html_()
    assert "row 0" in repr(row)
    assert "left out" in run.rows()[3]._repr_html_()


def test_row_losses_are_those_of_the_steps(tiny_folder, tmp_path):
    folder = str(tmp_path / "alone")
    config = RunConfig(
        model=str(tiny_folder), data=ROWS[:1], val_set_size=0, iters=3, batch_size=1, adapter_path=folder
    )
    alone = Run(config)
    alone.run()
    assert [loss for _, loss in alone.history.row_losses()[0]] == pytest.approx(alone.history["loss"], rel=1e-5)


def test_batch_shows_the_arrays_of_the_next_update(run):
    session = Session()
    session.add(run)
    shown = run_line(session, "batch")
    batch = run.trainer.next_batches()[0]
    event = run.step()
    assert event.rows == batch.rows
    assert batch.packed
    assert f"{len(batch.rows)} segments in one row of {sum(batch.lengths)} positions" in repr(shown)
    apart = BatchDisplay([batch._replace(packed=False)], run.tokenizer)
    assert f"{len(batch.rows)} × {batch.tokens_BT.shape[1]}" in repr(apart)
    assert all(f"row {row}" in shown._repr_html_() for row in batch.rows)
    assert "mlx-nb-batch" in shown._repr_html_()


def test_top_loss_lists_the_hardest_rows_of_a_split(run):
    session = Session()
    session.add(run)
    with pytest.raises(CommandError, match="--measure"):
        run_line(session, "rows --top-loss 2")
    text = str(run_line(session, "rows --top-loss 2 --measure"))
    rows = [int(line.split()[1]) for line in text.splitlines()[1:]]
    assert rows == list(run.row_losses())[:2]
    assert "after update 0" in text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "(nats per trained token)"),
        ({"loss": "dft"}, "(mean over its trained tokens)"),
        ({"method": "dpo", "data": tiny_pairs(3)}, "(of the pair)"),
        ({"method": "kto", "data": tiny_labels(3)}, "(of the answer)"),
        (
            {
                "method": "grpo",
                "data": tiny_prompts(3),
                "rewards": [{"length": {"max": 200}}],
                "max_completion_length": 4,
            },
            "(minus the mean reward where measured,",
        ),
    ],
)
def test_top_loss_says_what_the_loss_of_a_row_is(tiny_folder, tmp_path, settings, words):
    session = Session()
    plain = {"model": str(tiny_folder), "data": ROWS, "val_set_size": 0, "iters": 1, "adapter_path": str(tmp_path)}
    session.add(Run(RunConfig(**{**plain, **settings}), name="rows"))
    text = str(run_line(session, "rows --top-loss 2 --measure"))
    assert text.startswith(f"highest loss {words}")
    assert len(text.splitlines()) == 3


def test_a_far_row_is_shown_without_reading_those_before_it(tmp_path, tiny_folder):
    path = tmp_path / "train.jsonl"
    line = json.dumps(ROWS[0]) + "\n"
    path.write_text(line * 20_000)
    run = Run(RunConfig(model=str(tiny_folder), data=str(path), val_set_size=0))
    browser = run.browse()
    browser.jump.value = 18_000
    assert browser.row == 18_000
    assert "line 18001" in browser.view.value
