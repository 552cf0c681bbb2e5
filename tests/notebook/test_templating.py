"""`{name}` in a body is the value of a variable, wherever it stands: no text is cut, split or turned into another."""

from __future__ import annotations

import enum
from pathlib import Path

import numpy as np
import pytest

from mlx_nb.config.yaml_text import load_mapping
from mlx_nb.errors import CommandError
from mlx_nb.notebook.templating import fill

TEXTS = [
    "plain",
    "Rate this #1 song",
    "runs/exp #2",
    "Translate: good morning",
    "key:",
    "- item",
    "# all",
    "Hello, how are you?",
    "[a] {b}",
    "{{ m }} # note",
    "{name}",
    "say 'it'",
    'say "it"',
    "back\\slash \\n",
    "two\nlines\n",
    "  spaces  ",
    "tab\there",
    "",
    "yes",
    "null",
    "~",
    "true",
    "123",
    "1e-5",
    "-",
    "*alias",
    "&anchor",
    "!tag",
    "%percent",
    "@at",
    "`tick`",
    "| bar",
    "> fold",
    "? key",
    "--- a",
    "...",
    "\r\n",
    "\x85\u2028\u2029",
    "\x00\x1b\x7f",
    "\ufeffmark",
    "Grüße, 世界 😀",
    "x" * 3000,
]
# Where a name stands, and what is read there when it is the text T.
PLACES = [
    ("k: {t}", lambda t: {"k": t}),
    ("k:   {t}   # note", lambda t: {"k": t}),
    ("k:\n  - {t}\n  - b", lambda t: {"k": [t, "b"]}),
    ("k: [{t}, b]", lambda t: {"k": [t, "b"]}),
    ("k: {a: {t}, b: 1}", lambda t: {"k": {"a": t, "b": 1}}),
    ("k: [{a: [{t}]}]", lambda t: {"k": [{"a": [t]}]}),
    ("k: before {t} after", lambda t: {"k": f"before {t} after"}),
    ("k: [before {t}, b]", lambda t: {"k": [f"before {t}", "b"]}),
    ('k: "before {t} after"', lambda t: {"k": f"before {t} after"}),
    ("k: 'before {t} after'", lambda t: {"k": f"before {t} after"}),
    ('k: "{t}"', lambda t: {"k": t}),
    ("k: '{t}'", lambda t: {"k": t}),
    ("k: |\n  before\n  {t}\n  after\nl: 1", lambda t: {"k": f"before\n{t}\nafter\n", "l": 1}),
    ("k: >-\n  before\n  {t}\nl: 1", lambda t: {"k": f"before {t}", "l": 1}),
    ("k: before\n  {t}\nl: 1", lambda t: {"k": f"before {t}", "l": 1}),
]


@pytest.mark.parametrize("place", range(len(PLACES)))
def test_a_text_is_read_as_itself_wherever_it_stands(place):
    body, read = PLACES[place]
    for text in TEXTS:
        filled = fill(body, {"t": text})
        assert load_mapping(filled).values == read(text), text
        assert filled.count("\n") == body.count("\n"), text


def test_a_text_can_be_a_key():
    for text in TEXTS:
        if 0 < len(text) < 1000:
            assert load_mapping(fill("{t}: 1", {"t": text})).values in ({text: 1}, {}) or text in ("null", "~")
    assert load_mapping(fill("k: {{t}: 1}", {"t": "a: b"})).values == {"k": {"a: b": 1}}


class Color(enum.StrEnum):
    RED = "red"


class Size(enum.IntEnum):
    BIG = 3


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (3, 3),
        (-1, -1),
        (1e-5, 1e-5),
        (True, True),
        (None, None),
        (Path("runs/exp #2"), "runs/exp #2"),
        (np.int64(3), 3),
        (np.float64(1e-3), 1e-3),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (np.array([1, 2]), [1, 2]),
        (Color.RED, "red"),
        (Size.BIG, 3),
        (["a: b", 1, None], ["a: b", 1, None]),
        (("a", Path("b")), ["a", "b"]),
        ({"rank": np.int64(4), "keys": ["q #1"]}, {"rank": 4, "keys": ["q #1"]}),
        ({"ü": "😀\n"}, {"ü": "😀\n"}),
        ([], []),
        ({}, {}),
    ],
)
def test_a_value_keeps_its_kind(value, read):
    for body in ("k: {v}", "k: [{v}]", "k: {a: {v}}", "k:\n  a: {v}"):
        expected = load_mapping(body.replace("{v}", "V")).values["k"]
        found = load_mapping(fill(body, {"v": value})).values["k"]
        if isinstance(expected, dict):
            found, expected = found["a"], None
        found = found[0] if isinstance(expected, list) else found
        assert found == read
        assert type(found) is type(read)


@pytest.mark.parametrize(
    ("body", "filled"),
    [
        ("learning_rate: {n}e-5", "learning_rate: 3e-5"),
        ("iters: {n}0", "iters: 30"),
        ("subset: {digits}0", 'subset: "120"'),
        ("adapter_path: out/{word}/x", "adapter_path: out/pirate/x"),
        ("adapter_path: out-{n}", "adapter_path: out-3"),
        ("# was {undefined}\nseed: {n}  # not {undefined}", "# was {undefined}\nseed: 3  # not {undefined}"),
        ('stop: ["{{word}}", "{word}"]', 'stop: ["{word}", "pirate"]'),
        ("chat_template: '{{ word }} {{word}} {% if n %}'", "chat_template: '{{ word }} {{word}} {% if n %}'"),
        ("lora_parameters: {rank: {n}, keys: [{word}]}", "lora_parameters: {rank: 3, keys: [pirate]}"),
        ("no names: here", "no names: here"),
    ],
)
def test_what_is_written(body, filled):
    assert fill(body, {"n": 3, "word": "pirate", "digits": "12"}) == filled


def test_every_undefined_name_is_reported_with_its_line():
    with pytest.raises(CommandError) as caught:
        fill("model: {modl}\nseed: 1\ndata: {rows}\n", {"model": "x"})
    assert str(caught.value).splitlines() == [
        "line 1: {modl} is not defined in the notebook. Did you mean 'model'?",
        "line 3: {rows} is not defined in the notebook. Run the cell that defines it first.",
    ]


@pytest.mark.parametrize(
    ("body", "value", "words"),
    [
        ("data: {v}", object(), "line 1: {v} is a object and cannot be written into the YAML. To train on rows"),
        ("data: {v}", {1: 2}, "is a dict and cannot be written"),
        ("data: {v}", {1, 2}, "is a set and cannot be written"),
        ("data: {v}", float("nan"), "is a float and cannot be written"),
        ("data: {v}", float("inf"), "is a float and cannot be written"),
        ("data: {v}", [{"a": 1}] * 20_000, "is a list with 20000 values and cannot be written"),
        ("\nmodel: a {v}", [1], "line 2: {v} is a list and cannot be part of a text."),
        ('model: "{v}"', {"a": 1}, "line 1: {v} is a dict and cannot be part of a text."),
        ("{v}: 1", [1], "line 1: {v} is a list and cannot be a key."),
    ],
)
def test_a_value_without_a_form_in_yaml_is_refused(body, value, words):
    with pytest.raises(CommandError) as caught:
        fill(body, {"v": value})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_has_no_end_or_too_many_digits_is_refused():
    endless: list = []
    endless.append(endless)
    for value in (endless, 10**5000):
        with pytest.raises(CommandError, match="cannot be written into the YAML"):
            fill("data: {v}", {"v": value})


@pytest.mark.parametrize(
    "template",
    [
        "{{bos_token}}{% for m in messages %}{{ m.role }}{{m.content}}{{eos_token}}{% endfor %}",
        "{{messages[0].content}}{{eos_token}}",
    ],
)
@pytest.mark.parametrize("form", ["chat_template: '{}'", 'chat_template: "{}"', "chat_template: |\n  {}"])
def test_a_chat_template_is_jinja_and_left_alone(template, form):
    body = form.replace("{}", template)
    namespace = {"eos_token": "wrong", "name": "right"}
    filled = load_mapping(fill(f"{body}\nmodel: {{name}}\n", namespace)).values
    assert filled["chat_template"].strip() == template
    assert filled["model"] == "right"
