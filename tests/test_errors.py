"""Words that messages are made of are right for none, one and many."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import mlx_nb
from mlx_nb.errors import and_more, counted, did_you_mean, listed_problems, nearest


@pytest.mark.parametrize(
    ("count", "most", "words"),
    [
        (0, 2, ""),
        (1, 2, "n0"),
        (2, 2, "n0, n1"),
        (3, 2, "n0, n1 and 1 more"),
        (1, 1, "n0"),
        (2, 1, "n0 and 1 more"),
        (5000, 1, "n0 and 4,999 more"),
    ],
)
def test_names_are_listed_with_the_right_number_of_further_ones(count, most, words):
    assert and_more([f"n{index}" for index in range(count)], most) == words


@pytest.mark.parametrize(("count", "words"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (1200, "1,200 rows")])
def test_a_noun_agrees_with_its_number(count, words):
    assert counted(count, "row") == words


@pytest.mark.parametrize(
    ("count", "last"), [(1, "0"), (200, "199"), (201, "and 1 more problem."), (202, "and 2 more problems.")]
)
def test_a_long_list_of_problems_ends_with_how_many_more_there_are(count, last):
    lines = listed_problems([str(index) for index in range(count)]).splitlines()
    assert (lines[-1], len(lines)) == (last, min(count, 201))


def test_no_module_counts_further_names_by_itself():
    by_hand = re.compile(r"and \{[^}]*\} more|\} more [a-z]+s\b")
    found = [
        path.name for path in Path(mlx_nb.__file__).parent.rglob("*.py") if by_hand.search(path.read_text("utf-8"))
    ]
    assert found == ["errors.py"]


def test_the_nearest_word_is_found_whatever_the_case_of_its_letters():
    assert did_you_mean("Tiny.GGUF", ["other", "tiny.gguf"]) == " Did you mean 'tiny.gguf'?"
    assert did_you_mean("xyz", ["tiny.gguf"]) == ""


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("stpe", "step"),
        ("stp", "step"),
        ("stap", "step"),
        ("stopp", "stop"),
        ("gen", "generate"),
        ("compare", None),
        ("restore", None),
        ("st", None),
    ],
)
def test_a_suggestion_is_a_misspelling_and_never_a_word_of_another_meaning(word, meant):
    known = ["step", "run", "pause", "stop", "status", "generate", "rewind", "resume", "save", "reward"]
    assert nearest(word, known) == meant


def test_another_letter_in_a_short_word_makes_another_word():
    assert nearest("ppo", ["sft", "dpo", "cpo", "orpo", "kto", "grpo"]) is None
    assert nearest("dop", ["sft", "dpo", "cpo"]) == "dpo"
    assert nearest("chosen", ["messages", "prompt", "completion", "text"]) is None
