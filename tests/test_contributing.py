"""CONTRIBUTING names what is there: files, names, and how many places a change has."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import mlx_nb
from mlx_nb.config.methods import METHODS
from mlx_nb.config.optimizers import OPTIMIZERS, OptimizerName
from mlx_nb.config.run_config import RunConfig
from mlx_nb.errors import ConfigError
from mlx_nb.notebook.command import command
from mlx_nb.notebook.commands import COMMANDS
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

    monkeypatch.setitem(COMMANDS, "hello", command("hello", "say hello", lambda session, arguments: "hello"))
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


# The recipes, followed in a copy of the package: files of code, and in each what is put behind which line.
RECIPES = {
    "loss": {
        "objectives/dpo.py": {
            "def hinge(": "def exponential(pairs: PairLogprobs, *, beta: float = 0.1) -> mx.array:\n"
            '    """exp(-beta d)."""\n    return mx.exp(-_scaled(pairs, beta))\n\n\n'
        },
        "config/methods.py": {'                normalized=("beta",),': '                exponential=("beta",),\n'},
    },
    "setting": {
        "config/settings.py": {
            "    loss_spike: float | None = setting(": "    rate_factor: float = setting(\n"
            '        1.0, "What every learning rate is multiplied by.", group="optimizer", above=0, live=True\n    )\n'
        },
        "train/trainer.py": {"        tokens = sum(sum(": "        learning_rate *= config.rate_factor\n"},
    },
    "command": {
        "notebook/training_commands.py": {
            "def _pause(": "def _hello(session: Session, arguments: argparse.Namespace) -> Text:\n"
            '    return Text("hello")\n\n\n',
            '    "step": command("step"': '    "hello": command("hello", "say hello", _hello),\n',
        }
    },
    "button": {
        "view/panel/clicks.py": {
            '            "save": lambda _': '            "keep now": lambda _: self._request(Save(), "save"),\n',
            '        "save": prepared': '        "keep now": prepared,\n',
        },
        "view/panel/page/panel.js": {
            "  const set = (...children)": '  const keep = page.button("keep now", "Keep", '
            '"write it", () => act({ do: "keep now" }));\n',
            "    set(save, evaluate)": "    set(keep),\n",
        },
    },
    "optimizer": {
        "config/optimizers.py": {
            "OPTIMIZERS: dict": 'OptimizerName = Literal[OptimizerName, "adagrad"]\n',
            '    "lion": Optimizer(': '    "adagrad": Optimizer("mlx.optimizers:Adagrad", {"eps": _EPS}, '
            "decays=False),\n",
        }
    },
    "alias": {
        "data/rows/forms.py": {
            "# Columns of pairs and labels": 'ASKING_COLUMNS += ("errand",)\nANSWERING_COLUMNS += ("deed",)\n'
        }
    },
    "reward": {
        "rollouts/rewards/builtin.py": {
            "class BuiltIn(": "def shortness(completion: str) -> float:\n"
            '    """1 over the number of letters."""\n    return 1 / (1 + len(completion))\n\n\n',
            '    "number_match": BuiltIn(': '    "shortness": BuiltIn(shortness),\n',
        }
    },
}
MOST_FILES = {"loss": 2, "setting": 2, "command": 1, "button": 2, "optimizer": 1, "alias": 1, "reward": 1}
FOLLOWED = """
import asyncio, json, sys
folder, model = sys.argv[1:]
import mlx_nb
assert mlx_nb.__file__.startswith(folder), mlx_nb.__file__
from IPython.core.interactiveshell import InteractiveShell
from mlx_nb import Run, RunConfig
from mlx_nb.config.help import settings_markdown
from mlx_nb.data.examples.kinds import recognize
from mlx_nb.errors import ConfigError
from mlx_nb.events import AdapterSaved
from mlx_nb.notebook.magics import FinetuneMagics
from mlx_nb.view.panel.panel import page_script
from tiny import tiny_pairs, tiny_prompts, tiny_rows

def run(name, **settings):
    values = {"model": model, "data": tiny_rows(8), "val_set_size": 0, "iters": 2, "batch_size": 2, **settings}
    return Run(RunConfig.from_dict({**values, "adapter_path": f"{folder}/{name}"}), name=name)

found = {}
found["loss"] = run("loss", method="dpo", data=tiny_pairs(8), loss="exponential").step().loss
changed = run("setting", learning_rate=1e-3, rate_factor=0.5)
found["setting"] = [changed.step().learning_rate]
changed.set(rate_factor=2.0)
found["setting"].append(changed.step().learning_rate)
found["documented"] = "rate_factor" in settings_markdown()
try:
    RunConfig.from_dict({"rate_factor": -1})
except ConfigError as error:
    found["bounds"] = str(error)
magics = FinetuneMagics(InteractiveShell())
found["command"] = [str(magics.finetune_line("hello")), "say hello" in str(magics.finetune_line("help"))]
panel = changed.panel()

async def click():
    panel._answer({"do": "keep now"})
    await changed

asyncio.run(click())
found["button"] = ["keep now" in panel.clicks, any(isinstance(event, AdapterSaved) for event in changed.history.events)]
found["page"] = '"Keep"' in page_script()
found["optimizer"] = run("optimizer", optimizer="adagrad").step().step
row = recognize("tokens", {"errand": "Say red.", "deed": "red"})
found["alias"] = [message["content"] for message in row.messages]
sampling = {"rewards": ["shortness"], "group_size": 2, "max_completion_length": 4}
rewarded = run("reward", method="grpo", data=tiny_prompts(8), **sampling)
found["reward"] = rewarded.step().metrics["reward_shortness"]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def followed(tmp_path_factory, tiny_folder):
    """What a package has after all recipes were followed."""
    folder = tmp_path_factory.mktemp("recipes")
    shutil.copytree(ROOT / "mlx_nb", folder / "mlx_nb", ignore=shutil.ignore_patterns("__pycache__"))
    for files in RECIPES.values():
        for name, insertions in files.items():
            path = folder / "mlx_nb" / name
            text = path.read_text(encoding="utf-8")
            for line, added in insertions.items():
                assert text.count(f"\n{line}") == 1, (name, line)
                text = text.replace(f"\n{line}", f"\n{added}{line}")
            path.write_text(text, encoding="utf-8")
    paths = os.pathsep.join([str(folder), str(ROOT / "tests" / "support")])
    done = subprocess.run(
        [sys.executable, "-c", FOLLOWED, str(folder), str(tiny_folder)],
        env={**os.environ, "PYTHONPATH": paths},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_takes_no_more_files_than_it_says(recipe):
    assert len(RECIPES[recipe]) <= MOST_FILES[recipe]
    assert all(f"mlx_nb/{name}" in TEXT for name in RECIPES[recipe] if recipe != "setting")


@pytest.mark.long
def test_a_loss_that_was_added_is_trained_with(followed):
    assert followed["loss"] == pytest.approx(1.0, abs=1e-5)  # exp(0): the policy is still the reference


@pytest.mark.long
def test_a_setting_that_was_added_has_its_effect_its_bounds_and_its_help_and_can_change_live(followed):
    assert followed["setting"] == pytest.approx([5e-4, 2e-3])
    assert "rate_factor" in followed["bounds"]
    assert followed["documented"]


@pytest.mark.long
def test_a_command_that_was_added_is_run_and_listed(followed):
    assert followed["command"] == ["hello", True]


@pytest.mark.long
def test_a_button_that_was_added_is_on_the_page_and_does_what_it_says(followed):
    assert followed["button"] == [True, True]
    assert followed["page"]


@pytest.mark.long
def test_an_optimizer_that_was_added_trains(followed):
    assert followed["optimizer"] == 1


def test_a_name_of_a_column_that_was_added_is_read(followed):
    assert followed["alias"] == ["Say red.", "red"]


def test_a_reward_that_was_added_is_given(followed):
    assert 0 < followed["reward"] <= 1
