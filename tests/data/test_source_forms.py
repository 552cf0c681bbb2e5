"""Shards, folders of the hub, saved datasets, compressed files and json of splits give the rows that are in them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlx_nb.data.sources.splits import open_splits
from mlx_nb.errors import DataError

ROWS = [{"text": f"row {index}"} for index in range(12)]
VALID = [{"text": "held out"}]


def as_lines(rows: Sequence[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstandard(content: bytes) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue().to_pybytes())


def gzipped(content: bytes) -> bytes:
    """Compressed the same at any time of day: the bytes name a test."""
    return gzip.compress(content, mtime=0)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzipped,
    "zst": zstandard,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


def write(path: Path, rows: Sequence[Any]) -> Path:
    """The rows in the format of the path's endings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    endings = path.name.lstrip("._").split(".")[1:]
    if endings[0] == "parquet":
        import pyarrow.parquet

        schema = pyarrow.schema([("text", pyarrow.string())])
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema=schema), path)
        return path
    content = {
        "jsonl": as_lines,
        "ndjson": as_lines,
        "json": lambda rows: json.dumps(rows).encode(),
        "csv": lambda rows: ("text\n" + "".join(f"{row['text']}\n" for row in rows)).encode(),
        "tsv": lambda rows: ("n\ttext\n" + "".join(f"1\t{row['text']}\n" for row in rows)).encode(),
    }[endings[0]](rows)
    path.write_bytes(COMPRESS[endings[1]](content) if endings[1:] else content)
    return path


def texts(source: Any) -> list[str]:
    return [] if source is None else [record["text"] for record in source]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(data: Any, **settings: Any) -> str:
    with pytest.raises(DataError) as error:
        open_splits(data, **settings)
    message = str(error.value)
    assert "\n" not in message
    return message


# Compressed files


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("format", ["jsonl", "ndjson", "json", "csv", "tsv"])
def test_a_compressed_file_has_the_rows_and_the_fingerprint_of_its_content(here, format, compression):
    plain = write(here / f"plain.{format}", ROWS)
    packed = write(here / f"train.{format}.{compression}", ROWS)
    expected = open_splits(plain, val_set_size=0).train
    for data in (packed, str(here)):
        found = open_splits(data, val_set_size=0).train
        assert list(found) == list(expected)
        assert found.fingerprint() == expected.fingerprint()
        assert found.name == packed.name


def test_a_compressed_jsonl_file_is_indexed_and_not_held_in_memory(here):
    import tracemalloc

    path = here / "train.jsonl.gz"
    path.write_bytes(gzip.compress(as_lines([{"text": "x" * 400}]) * 50_000))
    tracemalloc.start()
    source = open_splits(path, val_set_size=0).train
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert source[49_999] == {"text": "x" * 400}
    assert source.location(49_999) == "train.jsonl.gz line 50000"
    assert peak < 16 << 20


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda whole: whole[:-3] + b"abc"])
def test_a_damaged_compressed_file_is_one_line(here, compression, damage):
    whole = COMPRESS[compression](as_lines(ROWS * 400))
    (here / f"train.jsonl.{compression}").write_bytes(damage(whole))
    message = refusal(f"train.jsonl.{compression}")
    assert message.startswith(f"train.jsonl.{compression} is damaged, or its download is incomplete (")
    assert message.endswith("). Download it again.")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl.gz", as_lines(ROWS), "a.jsonl.gz is not a .gz file: by its content it is not compressed that way."),
        ("a.jsonl.gz", as_lines(ROWS), "Rename it to a.jsonl."),
        ("a.jsonl", gzipped(b"{}"), "compressed with gzip. Rename it to a.jsonl.gz."),
        ("a.jsonl", zstandard(b"{}"), "compressed with zstandard. Rename it to a.jsonl.zst."),
        ("a.jsonl.zst", gzipped(b"{}"), "by its content it is compressed with gzip."),
        ("a.gz", gzipped(b"{}"), "a.gz does not say what is compressed. Give it a name such as a.jsonl.gz."),
        ("a.jsonl.gz", gzipped(b"PAR1"), "by its content it is a parquet file."),
        ("a.jsonl.gz", gzipped(b""), "a.jsonl.gz has no rows."),
        ("a.jsonl.gz", b"", "a.jsonl.gz is empty (0 bytes)."),
        ("a.arrow", b"x", "is part of a dataset. Give the folder that save_to_disk wrote"),
        ("a.csv", b"prompt;completion\nx;y\n", "a.csv line 1: the columns are separated by ';', not by ','."),
        ("a.csv", b"prompt\tcompletion\nx\ty\n", "Rename it to .tsv."),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_one_line(here, name, content, expected):
    (here / name).write_bytes(content)
    assert expected in refusal(name)


def test_the_index_that_pandas_writes_into_a_csv_file_is_a_column_like_others(here):
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame(ROWS).to_csv(here / "train.csv")
    assert open_splits("train.csv", val_set_size=0).train[3] == {"Unnamed: 0": "3", "text": "row 3"}


# Folders

SIX, SEVEN = ROWS[:6], ROWS[6:]
LAYOUTS: dict[str, dict[str, Sequence[Any]]] = {
    "shards": {"train-00000-of-00002.parquet": SIX, "train-00001-of-00002.parquet": SEVEN},
    "shards below data": {"data/train-00000-of-00002.parquet": SIX, "data/train-00001-of-00002.parquet": SEVEN},
    "shards with the hash of their content": {
        "data/train-00000-of-00002-a09b74b3ef9c3b56.parquet": SIX,
        "data/train-00001-of-00002-b19b74b3ef9c3b5a.parquet": SEVEN,
    },
    "shards that count from 1": {"train-00001-of-00002.jsonl": SIX, "train-00002-of-00002.jsonl": SEVEN},
    "a folder of each split": {"train/0000.parquet": SIX, "train/0001.parquet": SEVEN},
    "the hub's parquet branch": {"default/train/0000.parquet": SIX, "default/train/0001.parquet": SEVEN},
    "the hub's cache": {
        "snapshots/abc/data/train-00000-of-00002.parquet": SIX,
        "snapshots/abc/data/train-00001-of-00002.parquet": SEVEN,
    },
    "numbers alone": {"train_1.jsonl": SIX, "train_2.jsonl": SEVEN},
    "any names in the folder of a split": {"train/a.jsonl": SIX, "train/b.csv": SEVEN},
    "mixed compressions": {"train-0.jsonl.gz": SIX, "train-1.jsonl.zst": SEVEN},
    "an empty shard": {
        "train-00000-of-00003.parquet": ROWS,
        "train-00001-of-00003.parquet": [],
        "train-00002-of-00003.parquet": [],
    },
    "one shard": {"data/train-00000-of-00001.parquet": ROWS},
    "2 comes before 10": {f"train/part-{index}.jsonl": [row] for index, row in enumerate(ROWS)},
    "one compressed file": {"train.jsonl.gz": ROWS},
    "other rows above": {"schema.json": [{"a": 1}], "data/train.jsonl": ROWS},
    "a main folder beside others": {"default/train.jsonl": ROWS, "german/train.jsonl": VALID},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_gives_the_rows_of_all_its_files_in_order(here, name):
    for path, rows in LAYOUTS[name].items():
        write(here / "ds" / path, rows)
    (here / "ds" / "README.md").write_text("# Rows")
    (here / "ds" / "dataset_infos.json").write_text('{"default": {}}')
    write(here / "ds" / ".cache" / "huggingface" / "train.jsonl", VALID)
    write(here / "ds" / "._train.jsonl", VALID)
    found = [open_splits("ds", val_set_size=0) for _ in range(2)]
    assert texts(found[0].train) == texts(ROWS)
    assert found[0].train.fingerprint() == found[1].train.fingerprint()
    assert found[0].valid is None
    place = found[0].train.location(11)
    assert place.split(" ")[0] in {Path(path).name for path in LAYOUTS[name]}


def test_the_other_splits_lie_beside_the_train_split(here):
    for layout in ("data/{}-00000-of-00001.parquet", "default/{}/0000.parquet", "{}.jsonl.gz", "{}/rows.csv"):
        folder = here / layout.replace("/", " ")
        for split, rows in (("train", ROWS), ("validation", VALID), ("test", ROWS[:2])):
            write(folder / layout.format(split), rows)
        splits = open_splits(folder)
        assert texts(splits.train) == texts(ROWS)
        assert texts(splits.valid) == ["held out"]
        assert texts(splits.test) == ["row 0", "row 1"]


def test_a_fingerprint_of_shards_changes_with_each_of_them(here):
    layout = LAYOUTS["shards below data"]
    for path, rows in layout.items():
        write(here / path, rows)
    before = open_splits(here, val_set_size=0).train.fingerprint()
    write(here / "data/train-00001-of-00002.parquet", [*SEVEN[:-1], {"text": "Row 11"}])
    assert open_splits(here, val_set_size=0).train.fingerprint() != before


def test_a_path_or_a_name_chooses_one_file_or_one_folder_of_several(here):
    for path, rows in LAYOUTS["shards"].items():
        write(here / path, rows)
    splits = open_splits("train-00001-of-00002.parquet", val_set_size=0)
    assert texts(splits.train) == texts(SEVEN)
    assert splits.notes[0] == (
        "train-00001-of-00002.parquet is one of 2 shards. Give the folder to train on all of them."
    )
    assert texts(open_splits(here, train_split="train-00001-of-00002", val_set_size=0).train) == texts(SEVEN)
    write(here / "train" / "a.jsonl", SIX)
    write(here / "train" / "b.jsonl", SEVEN)
    assert texts(open_splits(here / "train", val_set_size=0).train) == texts(ROWS)
    assert texts(open_splits(here / "train", train_split="b", val_set_size=0).train) == texts(SEVEN)
    write(here / "ds" / "data" / "train_sft-00000-of-00001.parquet", SIX)
    write(here / "ds" / "data" / "test_sft-00000-of-00001.parquet", VALID)
    splits = open_splits("ds", train_split="train_sft", valid_split="test_sft")
    assert (texts(splits.train), texts(splits.valid)) == (texts(SIX), texts(VALID))


UNCLEAR: list[tuple[dict[str, Sequence[Any]], str]] = [
    (
        {"train-00000-of-00003.parquet": SIX, "train-00002-of-00003.parquet": SEVEN},
        "has 2 of the 3 shards of train; missing: train-00001-of-00003.parquet. Download them, or give the path of one",
    ),
    (
        {"data/train-00001-of-00002.parquet": SIX},
        "has 1 of the 2 shards of train; missing: train-00000-of-00002.parquet",
    ),
    (
        {"train-00003-of-00009.jsonl": SIX},
        "missing: train-00000-of-00009.jsonl, train-00001-of-00009.jsonl, train-00002-of-00009.jsonl and 5 more.",
    ),
    ({"train.jsonl": SIX, "train.csv": SEVEN}, "has train.csv and train.jsonl: which one?"),
    ({"train.jsonl": SIX, "train.jsonl.gz": SIX}, "has train.jsonl and train.jsonl.gz: which one?"),
    ({"train.jsonl": SIX, "train/a.jsonl": SEVEN}, "has train.jsonl and train/a.jsonl: which one?"),
    ({"train/a.jsonl": SIX, "train/a.jsonl.gz": SIX}, "has train/a.jsonl and train/a.jsonl.gz: which one?"),
    (
        {"train.jsonl": SIX, "train-00000-of-00001.jsonl": SEVEN},
        "has train-00000-of-00001.jsonl and train.jsonl: which one?",
    ),
    (
        {"train-00000-of-00001.parquet": SIX, "train-00000-of-00002.parquet": SIX, "train-00001-of-00002.parquet": SIX},
        "has train-00000-of-00001.parquet and train-00000-of-00002.parquet: which one?",
    ),
    ({"en/train.jsonl": SIX, "de/train.jsonl": SIX}, "has several sets of rows: de, en. Give the path of one: "),
    ({"data/train_sft.jsonl": SIX, "data/test_sft.jsonl": SIX}, "has no train split. It has: test_sft, train_sft."),
    ({"train-00000-of-00001.jsonl.gz": []}, "train-00000-of-00001.jsonl.gz has no rows."),
]


@pytest.mark.parametrize(("files", "expected"), UNCLEAR)
def test_a_folder_whose_train_split_is_not_clear_or_not_whole_is_one_line(here, files, expected):
    for path, rows in files.items():
        write(here / "ds" / path, rows)
    assert expected in refusal("ds")


# Datasets saved to disk


def test_a_dataset_that_was_saved_to_disk_has_its_rows(here):
    datasets = pytest.importorskip("datasets")
    rows, valid = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(VALID)
    rows.save_to_disk(str(here / "one"), num_shards=3)
    datasets.DatasetDict({"train": rows, "validation": valid}).save_to_disk(str(here / "both"))
    rows.save_to_disk(str(here / "apart" / "train"))
    valid.save_to_disk(str(here / "apart" / "valid"))
    expected = open_splits(rows, val_set_size=0).train.fingerprint()
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    for data in ("one", "both", "apart", "both/train", {"train": "one"}):
        train = open_splits(data, val_set_size=0).train
        assert texts(train) == texts(ROWS)
        assert train.fingerprint() == expected
    for data in ("both", "apart"):
        assert texts(open_splits(data).valid) == ["held out"]
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


def test_a_saved_dataset_that_is_not_whole_is_one_line(here):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(here / "one"), num_shards=2)
    next((here / "one").glob("data-00001*.arrow")).unlink()
    message = refusal("one")
    assert message.startswith("folder one was written by save_to_disk, and is damaged or not whole: ")
    assert "data-00001-of-00002.arrow" in message


# json of splits, and dicts of paths


def test_a_json_file_may_hold_its_splits(here):
    whole = {"train": ROWS, "valid": VALID, "test": ROWS[:2]}
    (here / "all.json").write_text(json.dumps(whole))
    write(here / "train.json", ROWS)
    for data in ("all.json", whole):
        splits = open_splits(data)
        assert (texts(splits.train), texts(splits.valid)) == (texts(ROWS), texts(VALID))
        assert texts(splits.test) == ["row 0", "row 1"]
    splits = open_splits("all.json")
    assert splits.valid
    assert splits.train.location(3) == "all.json['train'] row 3"
    assert len({splits.train.fingerprint(), splits.valid.fingerprint()}) == 2
    (here / "train_only.json.gz").write_bytes(gzip.compress(json.dumps({"train": ROWS}).encode()))
    assert texts(open_splits("train_only.json.gz", val_set_size=0).train) == texts(ROWS)
    assert texts(open_splits("all.json", train_split="test", val_set_size=0).train) == ["row 0", "row 1"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"rows": ROWS}, "a.json has no train split. It has: rows. Name one of them with train_split"),
        ({"messages": [{"role": "user", "content": "x"}]}, "a.json holds one object; expected a list of objects"),
        ({"prompt": "x", "completion": "y"}, "a.json holds one object; expected a list of objects"),
        ({"train": []}, "a.json['train'] has no rows."),
        (["text"], 'a.json row 0: a row must be a dict of columns, not str. Plain text is {"text": ...}.'),
    ],
)
def test_a_json_file_that_holds_neither_rows_nor_splits_is_one_line(here, value, expected):
    (here / "a.json").write_text(json.dumps(value))
    assert expected in refusal("a.json")


def test_a_dict_of_splits_may_name_files_lists_of_files_and_folders(here):
    write(here / "a.jsonl", SIX)
    write(here / "b.csv.gz", SEVEN)
    write(here / "ds" / "data" / "train-00000-of-00001.parquet", VALID)
    splits = open_splits({"train": ["a.jsonl", "b.csv.gz"], "validation": "ds"})
    assert (texts(splits.train), texts(splits.valid)) == (texts(ROWS), texts(VALID))


# Rows that are lists of messages

TALK = [{"role": "user", "content": "Ahoy?"}, {"role": "assistant", "content": "Arr."}]


def test_a_list_of_messages_is_a_row_wherever_it_is(here):
    talks = [TALK, [{"from": "human", "value": "x"}]]
    (here / "a.jsonl").write_bytes(as_lines(talks))
    (here / "a.json").write_text(json.dumps(talks))
    for data in (talks, {"train": talks}, "a.jsonl", "a.json"):
        assert list(open_splits(data, val_set_size=0).train) == [{"messages": talk} for talk in talks]
    assert "data[1]: a row must be a dict of columns, not list" in refusal([TALK, [1]])


def test_a_dict_of_columns_is_refused_by_what_it_is():
    message = refusal({"prompt": ["a", "b"], "completion": ["c", "d"]})
    assert message == (
        "the dict data holds columns (prompt, completion), not splits. "
        "Make rows of it: datasets.Dataset.from_dict(data)."
    )
