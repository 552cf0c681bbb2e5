"""CONTRIBUTING names what is there: files, names, and how many places a change has."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import get_args

import pytest

import mlx_nb
from mlx_nb.config.methods import METHODS
from mlx_nb.config.optimizers import OPTIMIZERS, OptimizerName
from mlx_nb.config.run_config import RunConfig
from mlx_nb.errors import ConfigError
from mlx_nb.notebook.commands import COMMANDS, _command
from mlx_nb.notebook.magics import FinetuneMagics
from mlx_nb.rollouts.rewards import builtin

ROOT = Path(mlx_nb.__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_every_file_and_page_that_it_names_is_there():
    named = re.findall(r"`((?:mlx_nb|tests|docs)/[\w/.]+|\.ci/run|CHANGELOG\.md)`", TEXT)
    links = re.findall(r"\]\(([\w/.]+)\)", TEXT)
    assert len(named) > 15
    assert [name for name in [*named, *links] if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("mlx_nb.config.row_kinds", "ROW_KINDS"),
        ("mlx_nb.data.examples.kinds", "ROW_KINDS"),
        ("mlx_nb.objectives.kinds", "LOSS_KINDS"),
        ("mlx_nb.notebook.commands", "COMMANDS"),
        ("mlx_nb.config.optimizers", "OPTIMIZERS"),
    ],
)
def test_the_tables_of_the_recipes_are_there(module, name):
    assert len(getattr(importlib.import_module(module), name)) >= 4


def test_a_command_is_one_entry(monkeypatch):
    from IPython.core.interactiveshell import InteractiveShell

    monkeypatch.setitem(COMMANDS, "hello", _command("hello", "say hello", lambda session, arguments: "hello"))
    magics = FinetuneMagics(InteractiveShell())
    assert magics.finetune_line("hello") == "hello"
    assert "say hello" in str(magics.finetune_line("help"))


def test_an_optimizer_is_an_entry_and_a_name():
    assert set(get_args(OptimizerName)) == set(OPTIMIZERS)
    for name in OPTIMIZERS:
        assert RunConfig.from_dict({"optimizer": name}).optimizer == name
    with pytest.raises(ConfigError):
        RunConfig.from_dict({"optimizer": "none of them"})


def test_a_loss_of_a_method_is_a_function_and_a_name():
    for method in METHODS.values():
        for loss in method.losses.values():
            assert callable(loss.function())


def test_a_reward_function_is_a_function_with_its_help():
    assert builtin.exact_match.__doc__
    assert RunConfig.from_dict({"method": "grpo", "rewards": ["exact_match"]}).rewards == ["exact_match"]
