"""The built-in reward functions give what their tables say, for whatever a model writes."""

from __future__ import annotations

import sys
import time
from decimal import Decimal, localcontext

import numpy as np
import pytest

from mlx_nb.errors import ConfigError
from mlx_nb.rollouts.rewards import builtin
from mlx_nb.rollouts.rewards.builtin import (
    REWARDS,
    chrf,
    exact_match,
    json_schema,
    json_valid,
    length,
    number_match,
    regex,
    rouge_l,
    stated_number,
    xml_tags,
)
from mlx_nb.rollouts.rewards.resolve import resolve_rewards


def test_exact_match_ignores_space_around_either_and_nothing_else():
    assert exact_match(" Paris\n", "Paris ") == 1.0
    assert exact_match("paris", "Paris") == 0.0
    assert exact_match("12", 12) == 1.0


@pytest.mark.parametrize("score", [exact_match, number_match])
@pytest.mark.parametrize("answer", [None, ["12"], {"a": 1}])
def test_an_answer_that_is_none_or_a_container_is_an_error_not_a_zero(score, answer):
    with pytest.raises(ValueError, match="answer"):
        score("12", answer)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is 12.", "12"),
        ("7 and then 12", "12"),
        ("1,234.50 in all", "1234.50"),
        ("1{,}234", "1234"),
        ("1, 2, 3", "3"),
        ("1,2,3", "3"),
        ("12345,678", "678"),
        ("$12", "12"),
        ("-$12", "-12"),
        ("\\$12", "12"),
        ("50%", "50"),
        ("x = -3", "-3"),
        ("x = −3", "-3"),
        ("10-5", "5"),
        ("pages 3-4", "4"),
        (".5", "0.5"),
        ("1e-4", "0.0001"),
        ("3/4", "0.75"),
        ("\\frac{3}{4}", "0.75"),
        ("-\\dfrac{3}{4}", "-0.75"),
        ("答案是12。", "12"),
        ("\\boxed{12} in 2024", "12"),
        ("\\boxed{\\frac{1}{2}}, \\boxed{\\text{about } 7}, 9", "7"),
        ("\\boxed{yes} 5", "5"),
        ("#### 12", "12"),
        ("#### $1,200.\nin 2024", "1200"),
        ("#### 2. Add them up\nThe sum is 15", "15"),
    ],
)
def test_the_stated_number_is_the_marked_one_or_the_last(text, number):
    assert stated_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none", "3/0", "..."])
def test_without_a_number_there_is_none_and_the_match_is_0(text):
    assert stated_number(text) is None
    assert number_match(text, 3) == 0.0


def test_number_match_compares_values_not_text():
    assert number_match("The answer is 1,234.0", "so far\n#### 1234") == 1.0
    assert number_match("1/3", "2/6") == 1.0
    assert number_match("1/4", "3/4") == 0.0
    assert number_match("0.1", np.float32(0.1)) == 1.0
    assert number_match("0.3", 0.1 + 0.2) == 0.0
    assert number_match("13", "12") == 0.0
    with localcontext(prec=3):  # of the notebook
        assert number_match("0.333", "1/3") == 0.0
    with pytest.raises(ValueError, match="no number"):
        number_match("12", "twelve")


@pytest.mark.parametrize(
    "text", ["1" * 20_000, "1e999999999/3", "\\boxed{" * 3000, "####" * 5000, "1," * 9000, "/1" * 9000]
)
def test_a_model_that_lost_its_way_costs_no_time_and_no_error(text):
    started = time.monotonic()
    assert number_match(text, 5) == 0.0
    assert time.monotonic() - started < 1.0


def test_regex_searches_anywhere_unless_anchored():
    assert regex(r"\d+ apples")("I have 12 apples.") == 1.0
    assert regex(r"^Answer: \d+$")("Let me see.\nAnswer: 12") == 0.0
    assert regex(r"(?m)^Answer: \d+$")("Let me see.\nAnswer: 12") == 1.0


def test_json_schema_gives_half_for_json_that_is_not_valid():
    score = json_schema({"type": "object", "required": ["name"], "properties": {"age": {"type": "integer"}}})
    assert score(' {"name": "Ann", "age": 3}\n') == 1.0
    assert score('{"name": "Ann", "age": "three"}') == 0.5
    assert score("[]") == 0.5
    for text in ("", "Sure! {}", '{"name": NaN}', "[" * 100_000, "1" * 10_000):
        assert score(text) == 0.0


def test_json_schema_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(ConfigError, match="pip install jsonschema"):
        json_schema({"type": "object"})


@pytest.mark.parametrize(
    ("limits", "size", "reward"),
    [
        ({"max": 10}, 0, 1.0),
        ({"max": 10}, 10, 1.0),
        ({"max": 10}, 15, 0.5),
        ({"max": 10}, 30, 0.0),
        ({"target": 10}, 10, 1.0),
        ({"target": 10}, 5, 0.5),
        ({"target": 10}, 15, 0.5),
        ({"target": 10}, 0, 0.0),
        ({"target": 10}, 99, 0.0),
    ],
)
def test_length_falls_evenly_from_its_limit(limits, size, reward):
    assert length(limits)("", [0] * size) == reward
    assert length({**limits, "unit": "characters"})("x" * size, []) == reward


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("<think>a</think> <answer>b</answer>", 1.0),
        ("<answer>b</answer> <think>a</think>", 0.5),
        ("<think>a</think> <answer>b", 0.5),
        ("<think>a</think> <think>a</think> <answer>b</answer>", 0.5),
        ("<think><answer></think></answer>", 0.5),
        ("</think><think> </answer><answer>", 0.0),
        ("", 0.0),
    ],
)
def test_xml_tags_is_the_share_of_tags_once_closed_and_in_order(text, share):
    assert xml_tags(["think", "answer"])(text) == share


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("regex", "(unclosed"),
        ("regex", 7),
        ("json_schema", {"type": "objekt"}),
        ("json_schema", "object"),
        ("length", 200),
        ("length", {"max": 1, "target": 2}),
        ("length", {"max": 0}),
        ("length", {"max": True}),
        ("length", {"max": 5, "unit": "words"}),
        ("length", {"max": 5, "units": "tokens"}),
        ("xml_tags", []),
        ("xml_tags", ["think", "think"]),
        ("xml_tags", ["<think>"]),
        ("xml_tags", [1]),
    ],
)
def test_a_wrong_value_is_an_error_that_names_the_reward(name, value):
    with pytest.raises(ConfigError, match=f"reward {name}"):
        REWARDS[name].function(value)


def test_json_valid_takes_any_json_and_nothing_else():
    assert [json_valid(text) for text in ('{"a": 1}', " [1, 2] ", "3", "NaN", "{'a': 1}", "[" * 9999)] == [
        1,
        1,
        1,
        0,
        0,
        0,
    ]


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence_of_words():
    pytest.importorskip("rouge_score")
    # "the cat sat" in common: 3 of 4 and of 6 words.
    assert rouge_l("The cat sat down", "the cat sat on the mat") == pytest.approx(2 * 0.75 * 0.5 / 1.25)
    assert rouge_l("", "the cat") == 0.0


def test_chrf_is_that_of_sacrebleu_from_0_to_1():
    pytest.importorskip("sacrebleu")
    assert chrf("the cat", "the cat") == pytest.approx(1.0)
    assert chrf("xyz", "the cat") == 0.0
    assert 0 < chrf("the hat", "the cat") < 1


def test_a_function_whose_package_is_missing_says_what_to_install(monkeypatch):
    monkeypatch.setattr(builtin, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"chrf needs the package sacrebleu\. Run: pip install 'mlx-nb\[metrics\]'"):
        resolve_rewards(["chrf"], {}, "metrics")
