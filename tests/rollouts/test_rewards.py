"""Reward functions are found by name, called with what they take, and cannot stop training whatever they do."""

from __future__ import annotations

import ast
import functools
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pandas as pd
import pytest

from mlx_nb.errors import ConfigError
from mlx_nb.rollouts import advantages
from mlx_nb.rollouts.rewards import builtin, call, resolve, score
from mlx_nb.rollouts.rewards.resolve import completion_batch, resolve_rewards
from reward_batches import batch_of, column_of, my_reward, scores_of

# Which functions


def test_rewards_are_found_as_callables_in_the_notebook_and_built_in():
    names = [my_reward, "other", "number_match", {"regex": "^Yes"}, {"length": {"max": 200}}, {"xml_tags": ["a"]}]
    found = resolve_rewards(names, {"other": lambda completion: 1})
    assert [one.name for one in found] == ["my_reward", "other", "number_match", "regex", "length", "xml_tags"]
    assert resolve_rewards("exact_match", {})[0].name == "exact_match"
    assert resolve_rewards([functools.partial(my_reward)], {})[0].name == "my_reward"


def test_a_function_of_the_notebook_comes_before_a_built_in_and_another_variable_does_not():
    assert resolve_rewards(["exact_match"], {"exact_match": my_reward})[0].function is my_reward
    assert resolve_rewards(["exact_match"], {"exact_match": 5})[0].function is builtin.exact_match


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["number_mach"], "'number_mach' is neither .* Did you mean 'number_match'?"),
        (["my_rewart"], "Did you mean 'my_reward'?"),
        (["plain"], "plain is a int in the notebook"),
        (["Kind"], "Kind is a type, not a function"),
        ([5], "cannot hold 5"),
        ([{"regex": "a", "length": 5}], "one key"),
        ([{"regx": "a"}], "'regx' with a value .* Did you mean 'regex'?"),
        ([{"my_reward": 1}], "'my_reward' with a value is not built in"),
        (["regex"], "regex needs a value: `regex: "),
        ([{"exact_match": 1}], "exact_match takes no value"),
        (["my_reward", my_reward], "my_reward twice"),
        ([{"regex": "a"}, {"regex": "b"}], "regex twice"),
        ([], "is empty"),
        ([lambda completions, /: []], "`completions` by position only"),
    ],
)
def test_what_cannot_be_a_reward_is_named(names, said):
    with pytest.raises(ConfigError, match=said):
        resolve_rewards(names, {"my_reward": my_reward, "plain": 5, "Kind": dict})


# What they are called with


def test_a_function_gets_what_it_names_for_all_completions():
    def seen(completions, answers, completion_tokens, difficulty, source=None):
        assert source is None
        assert completion_tokens == [[0], [1, 1], [2, 2, 2], [3]]
        return [len(text) + int(answer) + more for text, answer, more in zip(completions, answers, difficulty)]

    assert column_of(seen) == ([3.0, 11.0, 20.0, 10.0], [])


def test_a_function_of_one_completion_gets_one_of_everything():
    def seen(completion, *, prompt, answer, completion_tokens, difficulty):
        assert prompt == f"prompt {difficulty}"
        return len(completion) + len(completion_tokens) + int(answer)

    assert column_of(seen) == ([4.0, 12.0, 21.0, 8.0], [])


def test_keyword_arguments_get_all_and_own_names_come_before_columns():
    found = {}

    def for_all(completions, **rest):
        found.update(rest)
        return [0] * len(completions)

    def for_one(completion, **rest):
        found.update(rest)
        return 0

    scores_of(for_all, batch=batch_of(prompts=["a column"] * 4))
    assert set(found) == {"prompts", "answers", "completion_tokens", "prompt", "answer", "difficulty"}
    assert found["prompts"] == found["prompt"] == [f"prompt {k}" for k in range(4)]
    found.clear()
    scores_of(for_one)
    assert found == {"prompt": "prompt 3", "answer": "3", "completion_tokens": [3], "difficulty": 3}


def test_names_of_the_columns_work_beside_all_completions():
    def in_the_manner_of_trl(prompts, completions, answer, **kwargs):
        return [int(one) for one in answer]

    assert column_of(in_the_manner_of_trl)[0] == [0.0, 1.0, 2.0, 3.0]


def test_methods_partials_and_objects_are_functions():
    class Judge:
        def method(self, completions):
            return [1] * len(completions)

        def __call__(self, completion):
            return 2

    def scaled(completion, factor):
        return factor

    class AsyncJudge:
        async def __call__(self, completion):
            return 4

    scores = scores_of(Judge().method, Judge(), functools.partial(scaled, factor=3), AsyncJudge())
    assert scores.rewards_NF[0].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_a_function_that_names_only_the_row_in_the_singular_scores_one():
    assert column_of(lambda answer, completion_tokens: int(answer) * len(completion_tokens))[0] == [0.0, 2.0, 6.0, 3.0]


def test_a_parameter_that_there_is_not_is_an_error_before_anything_is_called():
    called = []

    def first(completion):
        called.append(completion)

    def second(completions, solution):
        called.append(solution)

    def third(completion, completions):
        called.append(completions)

    with pytest.raises(ConfigError, match=r"second requires parameter `solution`.*can take: prompts, .*difficulty\."):
        scores_of(first, second)
    with pytest.raises(ConfigError, match=r"third requires parameter `completions`.*scores one .* mean 'completion'"):
        scores_of(first, third)
    assert called == []


def test_a_function_cannot_change_what_the_next_one_sees():
    def greedy(completions, completion_tokens, difficulty):
        result = [1.0] * len(completions)
        completions.clear()
        difficulty.clear()
        completion_tokens[0].append(99)
        return result

    def counting(completions, completion_tokens, difficulty):
        return [len(completions) + len(completion_tokens[0]) + len(difficulty)] * 4

    assert scores_of(greedy, counting).rewards_NF[:, 1].tolist() == [9.0] * 4


def test_a_batch_is_made_from_rows_with_different_columns():
    rows = [
        SimpleNamespace(prompt="a", answer="1", columns={"x": 1}, row=3),
        SimpleNamespace(prompt="b", answer=None, columns={"y": 2}, row=5),
    ]
    batch = completion_batch(rows, ["c", "d"], [[1], [2]], ("x", "y", "z"))
    assert batch.columns == {"x": [1, None], "y": [None, 2], "z": [None, None]}
    assert (batch.prompts, batch.answers, batch.rows) == (["a", "b"], ["1", None], [3, 5])
    with pytest.raises(ValueError, match="1 items"):
        completion_batch(rows, ["c"], [[1]], ())


@pytest.mark.parametrize("kind", [list, tuple, np.array, pd.Series, mx.array, lambda x: [np.float32(one) for one in x]])
def test_any_list_of_numbers_will_do(kind):
    assert column_of(lambda completions: kind([0.5, 1.0, 2.0, 0.25])) == ([0.5, 1.0, 2.0, 0.25], [])


@pytest.mark.parametrize("value", [1, 1.0, True, np.float32(1), np.bool_(True), np.array(1), mx.array(1), Fraction(1)])
def test_any_number_will_do_for_one(value):
    assert column_of(lambda completion: value) == ([1.0] * 4, [])
    assert column_of(lambda completions: [value] * len(completions)) == ([1.0] * 4, [])


@pytest.mark.parametrize("module", [advantages, call, builtin, resolve, score])
def test_rewards_do_not_know_mlx(module):
    tree = ast.parse(Path(module.__file__).read_text())
    roots = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    roots |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "mlx" not in roots
