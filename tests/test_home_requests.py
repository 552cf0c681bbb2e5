"""The quickstart's rows: made by the script beside them, in house format, nothing of the test split in training."""

from __future__ import annotations

import importlib.util
import json

import pytest

from places import NOTEBOOKS

SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("make_home_requests", NOTEBOOKS / "make_home_requests.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(split):
    return [json.loads(line) for line in (NOTEBOOKS / "home_requests" / f"{split}.jsonl").read_text().splitlines()]


def test_the_script_makes_the_files_as_they_are(generator):
    assert generator.make() == {split: read(split) for split in SPLITS}


def plain(request):
    """A request without its politeness."""
    request = request.lower().strip("?")
    for manner in ("hey, ", "please ", "could you ", "can you ", "would you "):
        request = request.removeprefix(manner)
    return request.removesuffix(", please").removesuffix(" please")


def test_no_request_stands_twice_politeness_aside():
    requests = [plain(row["messages"][0]["content"]) for split in SPLITS for row in read(split)]
    assert len(set(requests)) == len(requests) == 640


def test_no_answer_of_one_split_stands_in_another():
    answers = {split: {row["messages"][1]["content"] for row in read(split)} for split in SPLITS}
    assert not answers["test"] & (answers["train"] | answers["valid"])
    assert not answers["valid"] & answers["train"]


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_one_line_of_house_format(split, generator):
    for row in read(split):
        text = row["messages"][1]["content"]
        fields = json.loads(text)
        assert text == json.dumps(fields, separators=(",", ":"))
        assert list(fields) == ["device", "room", "action", "value"]
        assert fields["device"] in generator.DEVICES
        assert fields["room"] in generator.ROOMS
        assert (fields["value"] is not None) == (fields["action"] == "set")


def test_every_value_of_the_test_split_was_trained():
    seen = {split: [json.loads(row["messages"][1]["content"]) for row in read(split)] for split in SPLITS}
    for key in ("device", "room", "action", "value"):
        assert {answer[key] for answer in seen["test"]} <= {answer[key] for answer in seen["train"]}
