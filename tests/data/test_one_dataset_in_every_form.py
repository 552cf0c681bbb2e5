"""The same rows give the same tokens and the same masks, in whatever form a person has them."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.examples.examples import Examples
from mlx_nb.data.examples.settings import ExampleSettings, LeftOut
from mlx_nb.data.rows.columns import Columns
from mlx_nb.data.sources.splits import open_splits

SYSTEM = {"role": "system", "content": "Be a pirate."}
TOOL = {"type": "function", "function": {"name": "sail", "description": "Go.", "parameters": {"type": "object"}}}


def asked(number: int) -> dict[str, Any]:
    return {"role": "user", "content": f'Where, mate {number}?\nTell: \u00e9, "x", 1;2'}


def answered(number: int, how: str = "Arr") -> dict[str, Any]:
    return {"role": "assistant", "content": f"{how}, to {number} isles.\n"}


def talk(number: int) -> list[dict[str, Any]]:
    """Conversations of several lengths; the odd ones with keys that the others lack."""
    more = [{"role": "user", "content": "And?"}, {**answered(number), "train": False}, asked(2), answered(2)]
    return [SYSTEM, asked(number), answered(number), *(more if number % 2 else [])]


def hh(number: int, how: str) -> str:
    return f"\n\nHuman: Where {number}?\n\nAssistant: There.\n\nHuman: And?\n\nAssistant: {how}, {number}."


# One row by its number, of each kind that a method takes and in each way to write it.
ROWS: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "chat": ("tokens", lambda n: {"messages": talk(n)}),
    "chat with tools": ("tokens", lambda n: {"messages": talk(n), "tools": [TOOL]}),
    "ShareGPT": (
        "tokens",
        lambda n: {"conversations": [{"from": "human", "value": f"Where {n}?"}, {"from": "gpt", "value": "There."}]},
    ),
    "Alpaca": ("tokens", lambda n: {"instruction": f"Where {n}?", "input": "Sea" if n % 2 else "", "output": "There."}),
    "prompt and completion": ("tokens", lambda n: {"prompt": f"Where {n}?", "completion": f"There, {n}."}),
    "prompt and completion with a system prompt": (
        "tokens",
        lambda n: {"prompt": f"Where {n}?", "completion": f"There, {n}.", "system": "Be a pirate." if n % 2 else None},
    ),
    "prompt and completion as messages": (
        "tokens",
        lambda n: {"prompt": [SYSTEM, asked(n)], "completion": [answered(n)]},
    ),
    "text": ("tokens", lambda n: {"text": f'Once, {n} pirates:\n"Arr".'}),
    "pairs of texts": ("pairs", lambda n: {"prompt": f"Where {n}?", "chosen": f"There, {n}.", "rejected": "Here."}),
    "pairs with numbers": (
        "pairs",
        lambda n: {"prompt": f"Where {n}?", "chosen": "There.", "rejected": "Here.", "preference_score": n + 1.5},
    ),
    "pairs of conversations": (
        "pairs",
        lambda n: {"chosen": [asked(n), answered(n)], "rejected": [asked(n), answered(n, "No")]},
    ),
    "pairs of conversation objects": (
        "pairs",
        lambda n: {
            "prompt": "User prompt",
            "chosen": {"messages": [asked(n), answered(n)]},
            "rejected": {"messages": [asked(n), answered(n, "No")]},
        },
    ),
    "pairs of one message": (
        "pairs",
        lambda n: {"prompt": f"Where {n}?", "chosen": answered(n), "rejected": answered(0, "No")},
    ),
    "pairs of HH texts": ("pairs", lambda n: {"chosen": hh(n, "There"), "rejected": hh(n, "Here")}),
    "pairs of OpenAI": (
        "pairs",
        lambda n: {
            "input": {"messages": [asked(n)], "tools": [TOOL]},
            "preferred_output": [answered(n)],
            "non_preferred_output": [answered(n, "No")],
        },
    ),
    "labels": ("labels", lambda n: {"prompt": f"Where {n}?", "completion": f"There, {n}.", "label": n % 2 == 0}),
    "labels of conversations": ("labels", lambda n: {"messages": [asked(n), answered(n)], "label": n % 2 == 0}),
    "prompts": ("prompts", lambda n: {"prompt": f"Where {n}?", "answer": f"There, {n}."}),
    "prompts as messages": ("prompts", lambda n: {"prompt": [SYSTEM, asked(n)], "answer": f"There, {n}."}),
}
COUNT = 7


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    """As csv: everything that is no text as its JSON."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    for row in rows:
        cells = {
            name: value if isinstance(value, str) else "" if value is None else json.dumps(value)
            for name, value in row.items()
        }
        writer.writerow(cells)
    return out.getvalue().encode()


def zstandard(content: bytes) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue().to_pybytes())


def dataset(rows: list[dict[str, Any]]) -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(rows)


def saved(rows: list[dict[str, Any]], folder: Path) -> Path:
    dataset(rows).save_to_disk(str(folder / "saved"), num_shards=2)
    return folder / "saved"


def saved_dict(rows: list[dict[str, Any]], folder: Path) -> Path:
    pytest.importorskip("datasets").DatasetDict({"train": dataset(rows)}).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def parquet(rows: list[dict[str, Any]], folder: Path, name: str = "train.parquet") -> Path:
    import pyarrow.parquet

    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    return folder / name


def shards(rows: list[dict[str, Any]], folder: Path) -> Path:
    parquet(rows[:3], folder, "data/train-00000-of-00002.parquet")
    parquet(rows[3:], folder, "data/train-00001-of-00002.parquet")
    return folder


def mixed_shards(rows: list[dict[str, Any]], folder: Path) -> Path:
    written(folder / "train-00000-of-00003.jsonl", lines(rows[:2]))
    written(folder / "train-00001-of-00003.jsonl.gz", gzip.compress(lines(rows[2:5])))
    written(folder / "train-00002-of-00003.jsonl.zst", zstandard(lines(rows[5:])))
    return folder


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def frame(rows: list[dict[str, Any]], folder: Path) -> Any:
    return pytest.importorskip("pandas").DataFrame(rows)


FORMS: dict[str, Callable[[list[dict[str, Any]], Path], Any]] = {
    "Dataset": lambda rows, folder: dataset(rows),
    "DatasetDict": lambda rows, folder: pytest.importorskip("datasets").DatasetDict({"train": dataset(rows)}),
    "DataFrame": frame,
    "DataFrame from parquet": lambda rows, folder: pytest.importorskip("pandas").read_parquet(parquet(rows, folder)),
    "dict of splits": lambda rows, folder: {"train": rows},
    "jsonl": lambda rows, folder: written(folder / "a.jsonl", lines(rows)),
    "jsonl.gz": lambda rows, folder: written(folder / "a.jsonl.gz", gzip.compress(lines(rows))),
    "jsonl.zst": lambda rows, folder: written(folder / "a.jsonl.zst", zstandard(lines(rows))),
    "json": lambda rows, folder: written(folder / "a.json", json.dumps(rows).encode()),
    "json.gz": lambda rows, folder: written(folder / "a.json.gz", gzip.compress(json.dumps(rows).encode())),
    "json of splits": lambda rows, folder: written(folder / "a.json", json.dumps({"train": rows}).encode()),
    "csv": lambda rows, folder: written(folder / "a.csv", table(rows)),
    "csv.gz": lambda rows, folder: written(folder / "a.csv.gz", gzip.compress(table(rows))),
    "tsv": lambda rows, folder: written(folder / "a.tsv", table(rows, "\t")),
    "parquet": parquet,
    "shards": shards,
    "shards of several compressions": mixed_shards,
    "save_to_disk": saved,
    "save_to_disk of a dict": saved_dict,
}


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folder)


def trained(data: Any, kind: str, tokenizer: Any) -> list[Any]:
    """What each row is for training: tokens, masks, and all that its method takes besides."""
    source = open_splits(data, val_set_size=0).train
    settings = ExampleSettings("assistant", 4000, "right", Columns())
    found = []
    for example in Examples(source, tokenizer, settings, kind).tokenize_all():
        assert not isinstance(example, LeftOut), example
        facts = {name: getattr(example, name, None) for name in ("weight", "margin", "label", "row", "answer")}
        arrays = [(said.tokens.tolist(), said.loss_mask.tolist()) for said in example.sequences]
        found.append((arrays, facts))
    return found


@pytest.mark.parametrize("kind_of_row", ROWS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.matrix(every=61)
def test_one_dataset_is_trained_alike_in_every_form(form, kind_of_row, tokenizer, tmp_path):
    kind, row = ROWS[kind_of_row]
    rows = [row(number) for number in range(COUNT)]
    expected = trained(rows, kind, tokenizer)
    data = FORMS[form](rows, tmp_path)
    assert trained(data, kind, tokenizer) == expected
    assert len(expected) == COUNT
    assert all(np.any(mask) for arrays, _ in expected for _, mask in arrays) or kind == "prompts"
    again = open_splits(data, val_set_size=0).train.fingerprint()
    assert again == open_splits(data, val_set_size=0).train.fingerprint()


def test_a_null_in_a_tool_call_is_named_in_every_form_that_has_it(tmp_path, monkeypatch):
    from datasets import Dataset

    from chat_shapes import saved_tokenizer
    from mlx_nb.data.check.check import check_data

    monkeypatch.chdir(tmp_path)
    tokenizer = saved_tokenizer("chatml", tmp_path / "tokenizer")
    rows = []
    for given in ({"x": 1}, {"y": "b"}, {"x": 2}):
        call = {"type": "function", "function": {"name": "f", "arguments": given}}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        rows.append({"messages": [{"role": "user", "content": str(given)}, answer]})
    table = Dataset.from_list(rows)
    table.to_parquet("rows.parquet")
    table.to_json("rows.jsonl")
    table.save_to_disk("saved")

    def nulls_of(data):
        result = check_data(open_splits(data, val_set_size=0), tokenizer, RunConfig())
        found = [item for item in result.findings if item.kind == "tool_values" and "null is left out" in item.what]
        return [(item.severity, item.count, item.looked_at, item.examples[0]) for item in found]

    first = (
        "message 1 (assistant): null is left out, such as at 'y' (1 in all): in a table it says that the row has no "
    )
    expected = [("note", 3, 3, (0, f"{first}such key. Arguments as JSON text keep it."))]
    for data in (table, list(table), table.to_pandas(), "rows.parquet", "rows.jsonl", "saved"):
        assert nulls_of(data) == expected, data
    assert nulls_of(rows) == []
