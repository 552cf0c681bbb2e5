"""Rows are found wherever they are, read where they lie, and every failure to do so is one clear line."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlx_nb
from mlx_nb.data.sources import files
from mlx_nb.data.sources.splits import RowSource, open_splits
from mlx_nb.errors import DataError


def rows(count: int, tag: str = "row") -> list[dict]:
    return [{"text": f"{tag} {index}"} for index in range(count)]


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def row_count(source: RowSource | None) -> int:
    return len(source) if source else 0


def texts(source: RowSource | None) -> list[str]:
    assert source is not None
    return [record["text"] for record in source]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Every kind of data


@pytest.mark.parametrize("valid_name", ["valid", "validation", "val", "dev"])
def test_a_folder_gives_its_splits(here, valid_name):
    for name, count in (("train", 5), (valid_name, 3), ("test", 2)):
        write_jsonl(here / f"{name}.jsonl", rows(count, name))
    splits = open_splits(str(here))
    assert texts(splits.train) == [f"train {index}" for index in range(5)]
    assert texts(splits.valid) == [f"{valid_name} {index}" for index in range(3)]
    assert texts(splits.test) == ["test 0", "test 1"]
    assert splits.notes == ()


def as_json(path: Path, records: list[dict]) -> None:
    path.write_text(json.dumps(records, indent=1))


def as_csv(path: Path, records: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text"])
        writer.writeheader()
        writer.writerows(records)


def as_parquet(path: Path, records: list[dict]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(records), path)


@pytest.mark.parametrize(
    ("name", "write", "place"),
    [
        ("train.jsonl", write_jsonl, "train.jsonl line 18"),
        ("train.json", as_json, "train.json row 17"),
        ("train.json", write_jsonl, "train.json line 18"),
        ("train.csv", as_csv, "train.csv line 19"),
        ("train.parquet", as_parquet, "train.parquet row 17"),
    ],
)
def test_every_file_format_gives_the_same_rows(here, name, write, place):
    write(here / name, rows(40))
    for data in (name, str(here), here / name):
        splits = open_splits(data, val_set_size=0)
        assert list(splits.train) == rows(40)
        assert splits.train.location(17) == place


def test_variables_of_the_notebook_are_rows():
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    kinds = {
        "mine": rows(20),
        "frame": pandas.DataFrame(rows(20)),
        "hub_rows": datasets.Dataset.from_list(rows(20)),
    }
    for name, value in kinds.items():
        for data, namespace in ((name, kinds), (value, None)):
            splits = open_splits(data, namespace=namespace, val_set_size=0)
            assert list(splits.train) == rows(20)
            assert name in splits.train.location(17) or namespace is None
    assert open_splits("mine", namespace=kinds).train.name == "mine"


def test_dicts_of_splits_are_splits(here):
    datasets = pytest.importorskip("datasets")
    whole = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list(rows(9)),
            "validation": datasets.Dataset.from_list(rows(2, "valid")),
        }
    )
    write_jsonl(here / "a.jsonl", rows(9))
    for data in (
        whole,
        {"train": rows(9), "validation": rows(2, "valid")},
        {"train": "a.jsonl", "dev": rows(2, "valid")},
    ):
        splits = open_splits(data)
        assert list(splits.train) == rows(9)
        assert texts(splits.valid) == ["valid 0", "valid 1"]
    assert texts(open_splits({"big": rows(9), "small": rows(3)}, train_split="small", val_set_size=0).train) == [
        "row 0",
        "row 1",
        "row 2",
    ]


def test_a_missing_cell_is_none():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": ["a", None], "score": [1.5, float("nan")], "messages": [np.array(["x"]), None]})
    assert list(open_splits(frame, val_set_size=0).train) == [
        {"text": "a", "score": 1.5, "messages": ["x"]},
        {"text": None, "score": None, "messages": None},
    ]


def test_nulls_that_arrow_adds_inside_messages_are_taken_out(here):
    records: list[dict] = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b", "name": "c"}]},
        {"messages": None},
    ]
    as_parquet(here / "train.parquet", records)
    assert list(open_splits("train.parquet", val_set_size=0).train) == records


def test_an_existing_path_wins_over_a_variable_and_says_so(here):
    write_jsonl(here / "train.jsonl", rows(5))
    (here / "data").mkdir()
    write_jsonl(here / "data" / "train.jsonl", rows(4, "file"))
    splits = open_splits("data", namespace={"data": rows(3)}, val_set_size=0)
    assert texts(splits.train)[0] == "file 0"
    assert splits.notes[0] == "`data` is a folder and a variable: the folder is used. Rename one of them."


def hub(monkeypatch, splits: dict) -> list[tuple]:
    """Stands in for the network: records the calls, answers with `splits`."""
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(path, name=None, split=None):
        calls.append((path, name, split))
        if split is not None:
            return datasets.Dataset.from_list(rows(4, split))
        return datasets.DatasetDict({key: datasets.Dataset.from_list(value) for key, value in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_hub_id_is_loaded_with_its_subset_and_splits(here, monkeypatch):
    calls = hub(monkeypatch, {"train": rows(6), "validation": rows(2), "extra": rows(3, "extra")})
    splits = open_splits("pirates/songs", subset="sea")
    assert (len(splits.train), row_count(splits.valid), splits.test) == (6, 2, None)
    assert calls == [("pirates/songs", "sea", None)]
    assert splits.train.location(3) == "pirates/songs[train] row 3"
    assert texts(open_splits("pirates/songs", train_split="extra").train) == ["extra 0", "extra 1", "extra 2"]
    part = open_splits("pirates/songs", train_split="train[:80%]", valid_split="train[80%:]")
    assert texts(part.train)[0] == "train[:80%] 0"
    assert texts(part.valid)[0] == "train[80%:] 0"


# Lines of a jsonl file


def test_blank_lines_bom_and_crlf_do_not_move_line_numbers(here):
    (here / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf\r\n{"text": "a"}\r\n  \t\r\n\n{"text": "b\\u00e9"}\n \n{"text": "c"}\n   '
    )
    source = open_splits("a.jsonl", val_set_size=0).train
    assert texts(source) == ["a", "b\u00e9", "c"]
    assert [source.location(row) for row in range(3)] == [
        "a.jsonl line 2",
        "a.jsonl line 5",
        "a.jsonl line 7",
    ]


@given(
    lines=st.lists(st.sampled_from(["", " ", "\t", "x", "long " * 9, "\u2028", "\x85"]), max_size=30),
    scan=st.integers(1, 40),
)
def test_rows_do_not_depend_on_how_the_file_is_scanned(tmp_path_factory, lines, scan):
    content = [line if not line.strip(" \t") else json.dumps({"text": line}, ensure_ascii=False) for line in lines]
    expected = [(number, line) for number, line in enumerate(lines, start=1) if line.strip(" \t")]
    path = tmp_path_factory.mktemp("scan") / "a.jsonl"
    path.write_text("\n".join([*content, '{"text": "last"}']), encoding="utf-8", newline="")
    expected.append((len(lines) + 1, "last"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_SCAN_BYTES", scan)
        source = open_splits(path, val_set_size=0).train
    assert [(f"a.jsonl line {number}", text) for number, text in expected] == [
        (source.location(row), source[row]["text"]) for row in range(len(source))
    ]


def test_a_bad_line_is_named_when_it_is_read_and_the_others_stay_readable(here):
    lines = [json.dumps(record) for record in rows(40)]
    lines[17] = '{"a":1 "b":2}'
    (here / "train.jsonl").write_text("\n".join(lines))
    source = open_splits("train.jsonl", val_set_size=0).train
    with pytest.raises(DataError) as error:
        source[17]
    assert str(error.value) == (
        "train.jsonl line 18: not valid JSON (Expecting ',' delimiter at column 8). Fix or delete the line."
    )
    assert source[16] == {"text": "row 16"}
    assert source[-1] == {"text": "row 39"}


def test_the_file_is_not_held_in_memory_and_opens_fast(here):
    path = here / "train.jsonl"
    line = json.dumps({"text": "x" * 400}) + "\n"
    path.write_text(line * 50_000)
    started = time.perf_counter()
    source = open_splits(path, val_set_size=0).train
    assert time.perf_counter() - started < 2
    assert len(source) == 50_000
    assert source[49_999] == {"text": "x" * 400}


def test_a_file_that_changes_while_it_is_open_is_refused(here):
    path = write_jsonl(here / "train.jsonl", rows(9))
    source = open_splits(path, val_set_size=0).train
    path.write_text('{"text": "other"}\n')
    with pytest.raises(DataError, match="was changed while it was open"):
        source[5]


def test_cells_of_a_csv_file_keep_commas_and_line_breaks_and_its_lines_their_numbers(here):
    (here / "a.csv").write_text('\ufeffprompt,completion\n"a\nb","c, d"\n\n\u2028,\nlast,"' + "x" * 200_000 + '"\n')
    limit = csv.field_size_limit()
    source = open_splits("a.csv", val_set_size=0).train
    assert list(source) == [
        {"prompt": "a\nb", "completion": "c, d"},
        {"prompt": "\u2028", "completion": None},
        {"prompt": "last", "completion": "x" * 200_000},
    ]
    assert [source.location(row) for row in range(3)] == ["a.csv line 2", "a.csv line 5", "a.csv line 6"]
    assert csv.field_size_limit() == limit


# What cannot be opened

BAD_FILES = [
    ("a.jsonl", b"", "a.jsonl is empty (0 bytes)."),
    ("a.jsonl", b"\n \n", "a.jsonl has no rows."),
    ("a.jsonl", b"\xef\xbb\xbf", "a.jsonl has no rows."),
    ("a.jsonl", b'{"a": 1}\n{"a": \n', "a.jsonl line 2: not valid JSON (Expecting value at column 6)."),
    ("a.jsonl", b'{"a": "b\n', "a.jsonl line 1: not valid JSON (Unterminated string starting at column 7)."),
    ("a.json", b'[{"a": "b\n"}]', "a.json: not valid JSON (Invalid control character at line 1 column 10)."),
    ("a.jsonl", b"\n\nhello\n", "a.jsonl line 3: not valid JSON (Expecting value at column 1)."),
    ("a.jsonl", b'{"a": 1}\n[1]\n', "a.jsonl line 2: a row must be a JSON object {...}, not an array."),
    ("a.jsonl", b'"text"\n', "a.jsonl line 1: a row must be a JSON object {...}, not 'text'."),
    ("a.jsonl", b'[{"a": 1}]', "not an array. Rename the file to .json."),
    ("a.jsonl", b'[\n{"a": 1}\n]', "a.jsonl line 1: the file holds JSON over several lines"),
    ("a.jsonl", b'{\n"a": 1\n}', "a.jsonl line 1: the file holds JSON over several lines"),
    ("a.jsonl", b'{"a": "caf\xe9"}', "a.jsonl line 1: not valid UTF-8 (byte 0xe9 at byte 11 of the line)."),
    ("a.jsonl", b"[" * 100_000, "a.jsonl line 1: not readable"),
    ("a.jsonl", b'{"a": ' + b"1" * 5000 + b"}", "a.jsonl line 1: not readable"),
    ("a.jsonl", b"\xff\xfe{\x00}\x00", "a.jsonl is not a .jsonl file: by its content it is text in UTF-16."),
    ("a.jsonl", b"PAR1....", "by its content it is a parquet file. Rename it to .parquet."),
    ("a.jsonl", b"\x1f\x8b....", "by its content it is compressed with gzip."),
    (
        "a.jsonl",
        b"version https://git-lfs.github.com/spec/v1\n",
        "it is a Git LFS pointer. Run `git lfs pull`.",
    ),
    ("a.jsonl", b"<!DOCTYPE html>", "it is a web page."),
    ("a.json", b'{"a": 1}', "a.json holds one object; expected a list of objects"),
    ("a.json", b"[1, 2]", "a.json row 0: a row must be a dict of columns, not int."),
    (
        "a.json",
        b'[{"a": 1},\n{"a" 2}]',
        "a.json: not valid JSON (Expecting ':' delimiter at line 2 column 6).",
    ),
    ("a.json", b"[]", "a.json has no rows."),
    ("a.csv", b"a,b\n1,2\n1,2,3\n", "a.csv line 3: 3 cells, but the header has 2."),
    ("a.csv", b"a,a\n1,2\n", "a.csv line 1: the header has an empty or repeated column name: a, a."),
    ("a.csv", b'a,b\n1,"2\n', "a.csv line 2: not valid CSV (unexpected end of data)."),
    ("a.csv", b"a,b\n1,caf\xe9\n", "a.csv line 2: not valid UTF-8."),
    ("a.csv", b"a,b\n", "a.csv has no rows."),
    ("a.parquet", b"PAR1 and nothing else", "a.parquet is not a readable parquet file"),
    (
        "a.jsnl",
        b"{}",
        "and .csv files. Did you mean '.json",
    ),
    ("a", b"{}", "a has no ending; rows are read from"),
]


@pytest.mark.parametrize(("name", "content", "expected"), BAD_FILES)
def test_a_bad_file_is_one_line_that_names_file_line_and_fault(here, name, content, expected):
    (here / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        open_splits(name)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


SPEC = {"path": "data/pirates.jsonl"}
BAD_DATA = [
    (
        "data/pirate.jsonl",
        {},
        "no such file or folder: data/pirate.jsonl. Did you mean 'pirates.jsonl'? (in data)",
    ),
    ("dada/pirates.jsonl", {}, "There is no folder dada. Did you mean 'data'?"),
    ("./nothing", {}, "no such file or folder: ./nothing."),
    ("./nothing", {}, "The variable `my_rows` may hold rows: `data: my_rows`."),
    ("my_row", {}, "no file, folder or variable 'my_row'. Did you mean 'my_rows'?"),
    ("dat", {}, "no file, folder or variable 'dat'. Did you mean 'data'?"),
    ("", {}, "`data` is empty."),
    ("number", {}, "variable `number` is of type int, which holds no rows."),
    (7, {}, "data is of type int, which holds no rows. Data is a folder"),
    ([], {}, "data has no rows."),
    (
        "my_rows",
        {"train_split": "train"},
        "`train_split: train` has no effect: my_rows has no splits. Remove it.",
    ),
    ("my_rows", {"subset": "sea"}, "`subset: sea` has no effect: only hub datasets have subsets."),
    ([{"text": "a"}, "b"], {}, "data[1]: a row must be a dict of columns, not str."),
    ("data", {}, "folder data has no train split. It has: pirates. Name one of them with train_split"),
    (
        "data",
        {"train_split": "pirate"},
        "folder data has no split 'pirate' (`train_split`). Did you mean 'pirates'?",
    ),
    ("empty", {}, "folder empty has no .jsonl, .json, .parquet or .csv file; it holds: nothing."),
    ("twice", {}, "folder twice has train.csv and train.jsonl: which one?"),
    ({"messages": []}, {}, "the dict data has no train split. It has: messages."),
    ("my_rows", {"val_set_size": 9}, "val_set_size: 9 would hold out all 9 training rows."),
    ("my_rows", {"val_set_size": 2.5}, "val_set_size must be a whole number of rows, at least 1, not 2.5."),
    (
        "my_rows",
        {"val_set_size": -0.1},
        "val_set_size must be a share such as 0.1 or a number of rows, not -0.1.",
    ),
    ([{**SPEC, "wieght": 2}], {}, "source 1 of data has the unknown key 'wieght'. Did you mean 'weight'?"),
    ([SPEC, {**SPEC, "weight": 0}], {}, "weight of source 2 of data must be a number above 0, not 0."),
    ([SPEC, {**SPEC, "weight": 1e-6}], {}, "make an epoch of "),
    ([SPEC, {"weight": 2}], {}, "source 2 of data needs a path"),
    ([SPEC, "dat"], {}, "no file, folder or variable 'dat'."),
    ([{**SPEC, "text_feature": "body"}], {}, "pirates.jsonl line 1: no column 'body'. The row has: 'text'."),
    ([SPEC], {"train_split": "train"}, "`train_split: train` has no effect: data is a list of sources."),
]


@pytest.mark.parametrize(("data", "settings", "expected"), BAD_DATA)
def test_data_that_cannot_be_found_is_one_line_with_the_nearest_name(here, data, settings, expected):
    (here / "data").mkdir()
    write_jsonl(here / "data" / "pirates.jsonl", rows(9))
    (here / "empty").mkdir()
    (here / "twice").mkdir()
    write_jsonl(here / "twice" / "train.jsonl", rows(2))
    as_csv(here / "twice" / "train.csv", rows(2))
    with pytest.raises(DataError) as error:
        open_splits(data, namespace={"my_rows": rows(9), "number": 7}, **settings)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_hub_dataset_that_cannot_be_loaded_is_one_line(here, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def no_network(*_, **__):
        raise ConnectionError("Couldn't reach 'pirates/songs' on the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(DataError) as error:
        open_splits("pirates/songs")
    assert str(error.value) == (
        "no folder 'pirates/songs' here, and the hub dataset of that name could not be loaded: Couldn't "
        "reach 'pirates/songs' on the Hub. Check the name and the network, or give a local path."
    )


def test_a_streaming_dataset_is_refused():
    datasets = pytest.importorskip("datasets")
    stream = datasets.Dataset.from_list(rows(3)).to_iterable_dataset()
    with pytest.raises(DataError, match="streaming dataset, which has no rows by number"):
        open_splits(stream)


# Holding out


def test_held_out_rows_are_drawn_by_seed_and_not_trained_on():
    splits = open_splits(rows(340))
    assert splits.notes == ("No validation split: held out 34 of 340 training rows (seed 0).",)
    assert row_count(splits.valid) == 34
    assert sorted(texts(splits.train) + texts(splits.valid)) == sorted(f"row {index}" for index in range(340))
    assert not set(texts(splits.train)) & set(texts(splits.valid))
    assert texts(open_splits(rows(340)).valid) == texts(splits.valid)
    assert texts(open_splits(rows(340), seed=1).valid) != texts(splits.valid)


@pytest.mark.parametrize(
    ("count", "size", "held_out"),
    [
        (340, 0.1, 34),
        (10_000, 0.1, 200),
        (3, 0.1, 1),
        (2, 0.99, 1),
        (1, 0.1, 0),
        (9, 0, 0),
        (9, 8, 8),
        (9, 1.0, 1),
    ],
)
def test_how_many_rows_are_held_out(count, size, held_out):
    splits = open_splits(rows(count), val_set_size=size)
    assert len(splits.train) == count - held_out
    assert row_count(splits.valid) == held_out
    assert len(splits.notes) == 1


def test_a_held_out_row_keeps_its_place(here):
    write_jsonl(here / "train.jsonl", rows(50))
    splits = open_splits("train.jsonl")
    assert splits.valid
    for source in (splits.train, splits.valid):
        for row in range(len(source)):
            number = int(source[row]["text"].split()[1])
            assert source.location(row) == f"train.jsonl line {number + 1}"


# Mixtures


def test_without_weights_a_mixture_holds_every_row_once(here):
    write_jsonl(here / "a.jsonl", rows(30, "a"))
    write_jsonl(here / "b.jsonl", rows(5, "b"))
    splits = open_splits(["a.jsonl", "b.jsonl"], val_set_size=0)
    assert sorted(texts(splits.train)) == sorted(f"{tag} {i}" for tag, n in (("a", 30), ("b", 5)) for i in range(n))
    assert splits.notes[-1] == "Mixed 35 training rows an epoch: 30 from a.jsonl, 5 from b.jsonl."


@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=4, max_size=4),
    seed=st.integers(0, 5),
)
def test_rows_are_drawn_in_the_proportion_of_the_weights_and_none_is_missing(sizes, weights, seed):
    variables = {f"source_{index}": rows(size, str(index)) for index, size in enumerate(sizes)}
    data = [{"path": name, "weight": weight} for name, weight in zip(variables, weights)]
    splits = open_splits(data, namespace=variables, val_set_size=0, seed=seed)
    drawn = Counter(texts(splits.train))
    per_source = [sum(drawn[f"{index} {row}"] for row in range(size)) for index, size in enumerate(sizes)]
    rounds = max(size / weight for size, weight in zip(sizes, weights))
    for index, (size, weight) in enumerate(zip(sizes, weights)):
        assert abs(per_source[index] - weight * rounds) <= 0.5 or per_source[index] == size
        counts = {drawn[f"{index} {row}"] for row in range(size)}
        assert min(counts) >= 1
        assert max(counts) - min(counts) <= 1
    again = open_splits(data, namespace=variables, val_set_size=0, seed=seed)
    assert texts(again.train) == texts(splits.train)


def test_a_source_with_weight_two_is_drawn_twice_as_often_everywhere_in_the_epoch(here):
    write_jsonl(here / "a.jsonl", rows(100, "a"))
    write_jsonl(here / "b.jsonl", rows(100, "b"))
    splits = open_splits([{"path": "a.jsonl", "weight": 2.0}, "b.jsonl"], val_set_size=0)
    owners = np.array([text[0] for text in texts(splits.train)])
    assert (np.sum(owners == "a"), np.sum(owners == "b")) == (200, 100)
    for start in range(0, 300, 30):
        assert np.sum(owners[start : start + 30] == "a") in (19, 20, 21)


def test_a_held_out_row_of_a_mixture_is_never_trained_on(here):
    write_jsonl(here / "a.jsonl", rows(20, "a"))
    write_jsonl(here / "b.jsonl", rows(200, "b"))
    splits = open_splits([{"path": "a.jsonl", "weight": 5}, {"path": "b.jsonl"}])
    assert row_count(splits.valid) == 22
    assert not set(texts(splits.train)) & set(texts(splits.valid))


def test_each_source_has_its_own_columns_and_splits(here):
    write_jsonl(here / "a.jsonl", [{"q": "x", "a": "y", "text": "no"}] * 3)
    (here / "b").mkdir()
    write_jsonl(here / "b" / "part.jsonl", [{"text": "z"}] * 2)
    write_jsonl(here / "b" / "valid.jsonl", [{"text": "v"}])
    data = [
        {"path": "a.jsonl", "prompt_feature": "q", "completion_feature": "a"},
        {"path": "b", "train_split": "part"},
    ]
    splits = open_splits(data)
    assert Counter(map(str, splits.train)) == {
        str({"prompt": "x", "completion": "y"}): 3,
        str({"text": "z"}): 2,
    }
    assert texts(splits.valid) == ["v"]


# Fingerprints


@pytest.mark.long
def test_a_fingerprint_is_the_same_in_every_process_and_for_every_object(here):
    write_jsonl(here / "train.jsonl", rows(30))
    code = (
        "from mlx_nb.data.sources.splits import open_splits;"
        "rows = [{'text': f'row {index}', 'b': {1.5: None}, 'a': 2} for index in range(30)];"
        "print(open_splits('train.jsonl').train.fingerprint(), open_splits(rows).valid.fingerprint())"
    )
    package = Path(mlx_nb.__file__).parent.parent
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": str(package)},
        ).stdout
        for seed in (1, 2)
    }
    assert len(found) == 1
    assert open_splits("train.jsonl").train.fingerprint() == found.pop().decode().split()[0]


@pytest.mark.long
@given(st.data())
def test_a_fingerprint_changes_with_any_row_order_or_value(data):
    records = data.draw(st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=3) | st.none()), min_size=1))
    other = data.draw(st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=3) | st.none()), min_size=1))
    first, second = (open_splits(value, val_set_size=0).train.fingerprint() for value in (records, other))
    assert (first == second) == (records == other)
    assert len(first) == 64


def test_a_fingerprint_changes_with_bytes_seed_and_split(here):
    write_jsonl(here / "train.jsonl", rows(30))
    whole = open_splits("train.jsonl", val_set_size=0).train
    splits, other_seed = open_splits("train.jsonl"), open_splits("train.jsonl", seed=1)
    assert splits.valid
    assert other_seed.valid
    found = {source.fingerprint() for source in (whole, splits.train, splits.valid, other_seed.train, other_seed.valid)}
    assert len(found) == 5
    write_jsonl(here / "train.jsonl", [*rows(29), {"text": "Row 29"}])
    assert open_splits("train.jsonl", val_set_size=0).train.fingerprint() not in found


def test_opening_local_rows_imports_nothing_heavy(here):
    write_jsonl(here / "train.jsonl", rows(30))
    code = (
        "import sys; from mlx_nb.data.sources.splits import open_splits; open_splits('train.jsonl');"
        "open_splits([{'text': 'a'}]);"
        "print([name for name in ('mlx', 'datasets', 'pandas', 'pyarrow') if name in sys.modules])"
    )
    package = Path(mlx_nb.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(package)}
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("data", [["a slogan for a lamp", "another one for a chair"], "a slogan for a lamp"])
def test_texts_in_place_of_rows_are_answered_with_what_a_row_is(data):
    with pytest.raises(
        DataError, match=r"'a slogan for a lamp' is not a file or folder, and text alone is not a row"
    ) as error:
        open_splits(data)
    assert '{"prompt": ..., "completion": ...}' in str(error.value)
