"""YAML that is odd, hostile or damaged: read as people mean it, or refused at once, in one line, at its place."""

from __future__ import annotations

import time

import pytest

from mlx_nb.config.run_config import RunConfig
from mlx_nb.config.yaml_text import load_mapping, read_value
from mlx_nb.errors import ConfigError

_LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 12)
)
UNREADABLE = {
    "a tag with a bad whole number": ("seed: !!int abc", "line 1, column 7: 'abc' is not a whole number."),
    "a tag with a bad number": ("seed: !!float x", "line 1, column 7: 'x' is not a number."),
    "a tag with a bad truth": ("test: !!bool x", "line 1, column 7: 'x' is not true or false."),
    "a tag of Python": (
        "model: !!python/object:os.x {}",
        "line 1, column 8: the tag !!python/object:os.x has no meaning",
    ),
    "a date by tag": ("model: !!timestamp 2001-99-99", "line 1, column 8: the tag !!timestamp has no meaning here."),
    "a tag of one's own": ("model: !mine x", "line 1, column 8: the tag !mine has no meaning here."),
    "5,000 digits": ("seed: " + "9" * 5000, "line 1, column 7: a number of 5,000 digits is too long."),
    "NUL": ("model: a\nseed: \x001", "line 2, column 7: it has the character U+0000."),
    "a control character": ("model: \x1b[31m", "line 1, column 8: it has the character U+001B."),
    "half a surrogate pair": ("model: \ud800", "line 1, column 8: it has the character U+D800."),
    "an escape beyond Unicode": ('model: "\\U00110000"', "line 1: there is no such character."),
    "100,000 brackets": ("data: " + "[" * 100_000, "line 1, column 38: nested more than 32 levels deep."),
    "an anchor that holds itself": ("data: &x [*x]", "line 1, column 7: an anchor that holds itself."),
    "anchors that multiply": (_LAUGHS, "the YAML holds more than 100,000 values once its aliases are written out."),
    "a merge key": ("optimizer_config: {<<: {eps: 1}}", "line 1, column 20: `<<` does not merge here."),
    "two documents": ("seed: 1\n---\nseed: 2", "line 2, column 1: there is a second document after `---`; keep one."),
    "a list as a key": ("? [a]\n: 3", "line 1, column 3: a list or mapping cannot be a key"),
    "an unknown alias": ("model: *m", "line 1, column 8: found undefined alias 'm'."),
    "a tab after a colon": ("iters:\t3", "line 1, column 7: found character '\\t'"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_refused_at_once_in_one_line(case):
    text, words = UNREADABLE[case]
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_yaml(text + "\n")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("\ufeffmodel: a\nseed: 3", {"model": "a", "seed": 3}),
        ("model: a\r\nseed: 3\r\n", {"model": "a", "seed": 3}),
        ("---\nmodel: a\n...", {"model": "a"}),
        ('model: "\\ud83d\\ude00"', {"model": "😀"}),
        ("subset: 2024-01-01\nmodel: 1:30", {"subset": "2024-01-01", "model": "1:30"}),
        ("stop: &s [a]\nsample_prompts: *s", {"stop": ["a"], "sample_prompts": ["a"]}),
        ("model: " + "x" * 100_000, {"model": "x" * 100_000}),
    ],
)
def test_what_people_write_is_read(text, values):
    assert load_mapping(text).values == values


def test_every_key_that_is_given_twice_is_reported_wherever_it_is():
    text = "lora_parameters: {rank: 2, rank: 4}\ndata:\n  - {path: a, path: b}\niters: 1\niters: 2\n"
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_yaml(text)
    assert str(caught.value).splitlines() == [
        "line 1, column 28: `rank` is given twice, first on line 1. Keep one of them.",
        "line 3, column 15: `path` is given twice, first on line 3. Keep one of them.",
        "line 5, column 1: `iters` is given twice, first on line 4. Keep one of them.",
    ]


def test_a_file_is_named_and_may_be_utf_16(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("iters: 3\n", encoding="utf-16")
    assert RunConfig.from_yaml(path).iters == 3
    path.write_text("model: a\niters: x\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_yaml(path)
    assert str(caught.value).startswith(f"{path}, line 2, column 1: `iters` cannot be 'x'.")
    path.write_bytes(b"model: a\nsubset: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"cannot be read at line 2: it is not UTF-8\. Save it as UTF-8\."):
        RunConfig.from_yaml(path)
    with pytest.raises(ConfigError, match="is a folder"):
        RunConfig.from_yaml(tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-5", 1e-5),
        ("true", True),
        ("null", None),
        ("runs/exp #2", "runs/exp #2"),
        ("Translate: good morning", "Translate: good morning"),
        ("[a, b]", ["a", "b"]),
        ("{rank: 4}", {"rank": 4}),
        ("'3'", "3"),
        ("- x", "- x"),
    ],
)
def test_the_value_of_a_word_on_a_command_line(text, value):
    assert read_value(text) == value


@pytest.mark.parametrize(
    ("text", "line", "written"),
    [
        ("model smollm2\ndata: rows\niters: 3", 1, "model: smollm2"),
        ("data: rows\niters 3\nbatch_size: 2", 2, "iters: 3"),
        ("data: rows\niters 3", 2, "iters: 3"),
        ("data: rows\niters 3\n", 2, "iters: 3"),
        ("data: rows\niters 3\n\n# a comment\n\nseed: 1\n", 2, "iters: 3"),
        ("lora_parameters:\n  rank 4\n  scale: 2\n", 2, "rank: 4"),
        ("data: rows\niters", 2, "iters: ..."),
        ("lr 1e-4", 1, "lr: 1e-4"),
    ],
)
def test_a_line_without_its_colon_is_the_line_that_is_named(text, line, written):
    with pytest.raises(ConfigError) as error:
        load_mapping(text, "the YAML")
    assert str(error.value).endswith(f" Line {line} has no colon: write `{written}`.")
    assert f"`{text.splitlines()[line - 1].strip()}`" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "line", "lacks", "written"),
    [
        ("model:smollm2\ndata: rows\n", 1, "no space behind its colon", "model: smollm2"),
        ("model: x\ndata:rows\niters: 4\n", 2, "no space behind its colon", "data: rows"),
        ("model: x\niters:60", 2, "no space behind its colon", "iters: 60"),
        ("lora_parameters:\n  rank:8\n  scale: 2\n", 2, "no space behind its colon", "rank: 8"),
        ("model=smollm2\ndata: rows", 1, "`=` in place of a colon", "model: smollm2"),
        ("data: rows\niters = 60\nseed: 1", 2, "`=` in place of a colon", "iters: 60"),
    ],
)
def test_a_line_that_is_nearly_a_setting_is_the_one_that_is_named(text, line, lacks, written):
    with pytest.raises(ConfigError) as error:
        load_mapping(text)
    assert str(error.value).startswith(f"the YAML cannot be read at line {line}. It reads `")
    assert str(error.value).endswith(f" Line {line} has {lacks}: write `{written}`.")


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("model: x\n  data: y\n", "Line 2 is indented more than the one before it: begin both at the same place."),
        ("model: x\n\n data: y\n", "Line 3 is indented more than the one before it: begin both at the same place."),
        ("data: a: b\nmodel: c", "A value with a colon is put in quotes: write `data: 'a: b'`."),
    ],
)
def test_what_yaml_takes_for_a_mapping_in_a_value_is_explained(text, advice):
    with pytest.raises(ConfigError) as error:
        load_mapping(text)
    assert str(error.value).endswith(advice)
