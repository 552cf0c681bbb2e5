"""Whatever a row holds, it is taken as what it plainly means or refused in one line that names it; nothing breaks."""

from __future__ import annotations

import json

import pytest

from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.check.check import check_data, row_record, stops_a_run
from mlx_nb.data.examples.examples import Examples
from mlx_nb.data.examples.row_finder import RowFinder
from mlx_nb.data.examples.settings import ExampleSettings, LeftOut
from mlx_nb.data.rows.columns import read_messages, read_tools
from mlx_nb.data.rows.imitation import Columns
from mlx_nb.data.sources.files import open_file
from mlx_nb.data.sources.row_values import value_text
from mlx_nb.data.sources.splits import Splits, open_splits
from mlx_nb.data.sources.tables import table_in_memory
from mlx_nb.errors import DataError
from mlx_nb.view.rows.display import ShownRow
from odd_values import ALIKE, KINDS, ODD_COLUMNS, ODD_VALUES, PLACES, REFUSED, nested

GOOD = 3  # rows before the odd ones


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from mlx_nb.model.loading import load_tokenizer
    from tiny import save_tiny_model

    return load_tokenizer(save_tiny_model(tmp_path_factory.mktemp("tiny")), None)


def examples_of(rows, kind, tokenizer):
    source = open_splits(rows, val_set_size=0).train
    return Examples(source, tokenizer, ExampleSettings.of(RunConfig()), kind)


def walked(examples, tokenizer):
    """Every way of the rows through the data. Returns why each is left out, None where it is not."""
    examples.source.fingerprint()
    left = {one.row: one.reason for one in examples.tokenize_all() if isinstance(one, LeftOut)}
    check = check_data(Splits(examples.source, None, None), tokenizer, RunConfig(), kind=examples.kind)
    json.dumps(check.to_dict())
    search = RowFinder(examples, dict).search("left out", "a")
    while not search.examine(9):
        pass
    unreadable = dict(check.splits[0].unreadable.rows)
    for row in range(len(examples)):
        view = examples.view(row)
        page = ShownRow.of(view, tokenizer, "train")
        for shown in (page._repr_html_(), repr(page)):
            shown.encode("utf-8", "backslashreplace")
        json.dumps(row_record(view, examples.settings))
        stops_a_run(view, examples.settings)
        assert (view.content is None) == (row in unreadable), row
        assert view.error == left.get(row), row
    for row, reason in left.items():
        assert "\n" not in reason
        assert len(reason) < 1000
        assert row >= GOOD
        assert reason.startswith(f"row {row}"), reason
    for row in unreadable:
        assert f"data[{row}]" in left[row], left[row]
    return [left.get(row) for row in range(len(examples))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.matrix(every=21)
def test_an_odd_value_anywhere_is_taken_or_refuses_its_row_alone(kind, place, tokenizer):
    read_as, _, rows = KINDS[kind]
    rows = rows(GOOD + len(ODD_VALUES))
    for row, (make, _) in enumerate(ODD_VALUES.values(), GOOD):
        rows[row] = PLACES[place](rows[row], make(1))
    reasons = walked(examples_of(rows, read_as, tokenizer), tokenizer)[GOOD:]
    if place == "extra column":
        refused = {odd for odd, reason in zip(ODD_VALUES, reasons) if reason is not None}
        assert refused == {odd for odd, (_, becomes) in ODD_VALUES.items() if becomes == REFUSED}
    if place == "the row":
        assert None not in reasons


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_without_a_name_refuses_its_row(kind, tokenizer):
    read_as, _, rows = KINDS[kind]
    rows = rows(GOOD + len(ODD_COLUMNS))
    for row, column in enumerate(ODD_COLUMNS, GOOD):
        rows[row] = {**rows[row], column: 1}
    reasons = walked(examples_of(rows, read_as, tokenizer), tokenizer)[GOOD:]
    assert all("column name" in reason for reason in reasons)


def test_odd_first_rows_hide_no_good_ones(tokenizer):
    rows = [{"text": "a", "x": nested(500)}, {"text": "b", 3: 1}, {"text": "c", "x": 10**6000}, {"text": "d"}]
    results = list(examples_of(rows, "tokens", tokenizer).tokenize_all())
    assert [isinstance(one, LeftOut) for one in results] == [True, True, True, False]


@pytest.mark.parametrize("odd", ODD_VALUES)
def test_rows_that_differ_have_another_fingerprint_and_equal_rows_the_same(odd):
    make, _ = ODD_VALUES[odd]

    def fingerprint(content):
        return table_in_memory([{"text": "a", "x": make(content)}], "data").fingerprint()

    if odd not in ("unwritable object", "lock"):
        assert fingerprint(0) == fingerprint(0)
    if odd not in ALIKE:
        assert fingerprint(0) != fingerprint(1)


def test_a_fingerprint_of_plain_rows_is_that_of_their_json():
    row = {"b": [1, 2.5, None, True, "\ud800é"], "a": {"c": {}}}
    assert value_text(row) == json.dumps(row, sort_keys=True)
    assert value_text({1: 2}) != value_text({"1": 2})


def test_a_fingerprint_of_a_set_is_the_same_in_every_process():
    import os
    import subprocess
    import sys

    code = "from mlx_nb.data.sources.row_values import value_text; print(value_text({'x': {'red', 'green', 'blue'}}))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1


LINES = {
    "nested": '{"text": "a", "x": %s}' % ("[" * 5000 + "]" * 5000),
    "nested a little less": '{"text": "a", "x": %s}' % ("[" * 400 + "]" * 400),
    "huge number": '{"text": "a", "x": 1%s}' % ("0" * 6000),
    "nested arguments": json.dumps(
        {
            "messages": [
                {"role": "user", "content": "a"},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": {"name": "f", "arguments": '{"a": %s}' % ("[" * 450 + "]" * 450)}}],
                },
            ]
        }
    ),
    "huge number in tools": json.dumps(
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "tools": "[1%s]" % ("0" * 6000),
        }
    ),
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_a_file_refuses_itself_by_file_and_line(line, tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    good = [json.dumps({"text": f"row {number}"}) for number in range(4)]
    path.write_text("\n".join([*good, LINES[line], *good]) + "\n")
    examples = Examples(open_file(path), tokenizer, ExampleSettings.of(RunConfig()))
    left = [one for one in examples.tokenize_all() if isinstance(one, LeftOut)]
    assert [one.row for one in left] == [4]
    for one in left:
        assert "a.jsonl line 5" in one.reason
        assert "\n" not in one.reason
    assert examples.view(4).row == 4
    check = check_data(Splits(examples.source, None, None), tokenizer, RunConfig())
    assert json.dumps(check.to_dict())


def test_a_frame_with_odd_cells_refuses_those_rows(tokenizer):
    import pandas

    cells = [1, nested(500), {1: 2}, 10**6000, {"x"}]
    frame = pandas.DataFrame(
        {"text": [f"row {number}" for number in range(5)], "x": pandas.Series(cells, dtype=object)}
    )
    examples = Examples(open_splits(frame, val_set_size=0).train, tokenizer, ExampleSettings.of(RunConfig()))
    assert {one.row for one in examples.tokenize_all() if isinstance(one, LeftOut)} == {1, 3}
    assert examples.source.fingerprint()


def test_held_out_and_mixed_rows_keep_the_refusal(tokenizer):
    rows = [{"text": f"row {number}", **({number: 1} if number % 3 == 0 else {})} for number in range(12)]
    splits = open_splits([{"path": rows}, {"path": [{"said": "x", 3: 1}, {"said": "y"}], "text_feature": "said"}])
    for source in (splits.train, splits.valid):
        source.fingerprint()
        for one in Examples(source, tokenizer, ExampleSettings.of(RunConfig())).tokenize_all():
            if isinstance(one, LeftOut):
                assert "column name" in one.reason
                assert "data[" in one.reason


def test_what_is_asked_by_hand_is_read_by_the_same_rules():
    for value in (nested(500), 10**6000, {1: 2}):
        with pytest.raises(DataError):
            read_messages([{"role": "user", "content": "a", "note": value}], "prompt")
        with pytest.raises(DataError):
            read_tools({"tools": [{"name": "f", "parameters": value}]}, Columns())
