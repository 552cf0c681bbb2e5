"""Tab completion of commands, options and the settings of a cell, as IPython gives it to a terminal or a notebook."""

from __future__ import annotations

import pytest
from IPython.core.completer import provisionalcompleter

from mlx_nb.config.methods import METHODS
from mlx_nb.config.run_config import LIVE_SETTINGS, SETTINGS
from mlx_nb.notebook.commands import COMMANDS
from mlx_nb.notebook.yaml_cursor import Place, place_of


@pytest.fixture
def complete(shell):
    def complete(text: str, after: str = "") -> dict[str, str]:
        """What may come at the end of `text`: by text, what is shown beside it."""
        with provisionalcompleter():
            found = list(shell.Completer.completions(text + after, len(text)))
        assert all(text[one.start :] == text[one.start : one.end] for one in found)
        return {one.text: one.type.replace("\u00a0", " ") for one in found}

    shell.user_ns |= {
        "bees": [{"question": "a", "reply": "b"}] * 30,
        "folds": {"train": [{"text": "a"}], "valid": [{"text": "b"}]},
        "methodical": 1,
        "numbers": [1, 2],
    }
    return complete


def test_method_offers_exactly_the_methods_with_what_they_learn_from(complete):
    assert complete("%%finetune\nmethod: ") == {name: method.kind.words for name, method in METHODS.items()}
    assert list(complete("%%finetune --name x\nmodel: m\nmethod: g", "\ndata: d")) == ["grpo"]


def test_two_dashes_offer_exactly_the_options_of_the_cell(complete, shell):
    actions = shell.magics_manager.magics["cell"]["finetune"].parser._actions
    assert list(complete("%%finetune --")) == [max(one.option_strings, key=len) for one in actions]
    assert {"--name", "--output", "--paused", "--wait", "--resume"} <= set(complete("%%finetune --"))
    assert "--name" not in complete("%%finetune --name x --")


@pytest.mark.parametrize(
    "text", ["%%finetune\nmethod: zz", "%%finetune\n# met", "%finetune nothing m", "%%finetune\nzz"]
)
def test_where_nothing_of_ours_fits_no_name_of_python_is_offered(complete, text):
    assert complete(text) == {}


@pytest.mark.long
def test_outside_of_our_cells_and_lines_python_is_completed_as_before(complete):
    assert "methodical" in complete("metho")
    assert "methodical" in complete("x = 1\nmetho")


def test_keys_have_one_line_of_help_and_are_those_of_the_method_that_are_not_given(complete):
    offered = complete("%%finetune\nmethod: dpo\niters: 3\n")
    assert offered["learning_rate: "] == "Peak learning rate"
    assert {"beta: ", "reference_model: "} <= set(offered)
    assert not {"iters: ", "method: ", "rewards: ", "group_size: "} & set(offered)
    assert all(0 < len(help) <= 68 and "\n" not in help for help in offered.values())
    assert set(complete("%%finetune\n")) == {f"{name}: " for name in SETTINGS}


@pytest.mark.parametrize(
    ("text", "offered"),
    [
        ("lora_parameters: {", ["rank: ", "scale: ", "dropout: ", "keys: "]),
        ("lora_parameters:\n  rank: 4\n  dro", ["dropout: "]),
        ("lr_schedule:\n  name: lin", ["linear_schedule"]),
        ("lr_schedule: co", ["constant", "cosine_decay"]),
        ("lr_schedule: {warmup: 3, name: con", ["constant"]),
        ("optimizer_config: {ni", []),
        ("optimizer: adam", ["adam", "adamw"]),
        ("optimizer: sgd\noptimizer_config: {nes", ["nesterov: "]),
        ("loss_on: ", ["assistant", "final", "completion", "all"]),
        ("test: ", ["true", "false"]),
        ("method: dpo\nloss: h", ["hinge"]),
        ("load_in_bits: ", ["2", "3", "4", "6", "8"]),
        ("learning_rate: ", ["0.0001"]),
        ("target_modules: [q_proj, v", ["v_proj"]),
        ("rewards:\n  - exact", ["exact_match"]),
        ("rewards:\n- exact", ["exact_match"]),
        ("metrics:\n  - exact", ["exact_match"]),
        ("data: bees\nprompt_feature: ", ["question", "reply"]),
        ("data:\n  - path: bee", ["bees"]),
        ("model: smoll", ["smollm2-135m"]),
        ("roles: {speaker_a: us", ["user"]),
    ],
)
def test_values_are_those_that_the_setting_takes(complete, text, offered):
    assert list(complete(f"%%finetune\n{text}")) == offered


def test_data_offers_variables_with_rows_and_files_of_rows(complete, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.jsonl").touch()
    (tmp_path / "folder" / "notes.txt").touch()
    assert complete("%%finetune\ndata: ") == {
        "bees": "30 rows",
        "folds": "splits train, valid",
        "folder/": "folder",
    }
    assert complete("%%finetune\ndata: folder/") == {"folder/a.jsonl": "file"}
    assert complete("%%finetune\ndata: ./folder/") == {"./folder/a.jsonl": "file"}


def test_models_in_the_caches_are_offered(complete, tmp_path, monkeypatch):
    (tmp_path / "hub" / "models--owner--some-model" / "snapshots").mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert complete("%%finetune\nmodel: own") == {"owner/some-model": "in the hub cache"}


def test_commands_have_their_help_and_each_its_arguments(complete):
    assert set(complete("%finetune ")) == set(COMMANDS)
    assert set(complete("x = %finetune st")) == {name for name in COMMANDS if name.startswith("st")}
    assert set(complete("%finetune set ")) >= {f"{name}=" for name in LIVE_SETTINGS}
    assert list(complete("%finetune eval t")) == ["train", "test"]
    assert list(complete("%finetune row 3 --split v")) == ["valid"]
    assert list(complete("%finetune row 3 --compare ")) == ["base"]
    assert list(complete("%finetune fork optimizer=s")) == ["sgd"]
    assert list(complete("%finetune resume x --allow-changed da")) == ["data"]
    assert list(complete("%finetune help gen")) == ["generate"]


@pytest.mark.parametrize("name", COMMANDS)
def test_two_dashes_offer_exactly_the_options_of_a_command(complete, name):
    assert set(complete(f"%finetune {name} --")) == {
        max(action.option_strings, key=len) for action in COMMANDS[name].parser._actions if action.option_strings
    }


def test_unloading_takes_the_matcher_away(shell):
    before = len(shell.Completer.custom_matchers)
    shell.run_line_magic("reload_ext", "mlx_nb")
    assert len(shell.Completer.custom_matchers) == before
    shell.run_line_magic("unload_ext", "mlx_nb")
    assert len(shell.Completer.custom_matchers) == before - 1
    shell.run_line_magic("load_ext", "mlx_nb")


@pytest.mark.parametrize(
    ("above", "before", "place"),
    [
        ([], "me", Place((), "me", True)),
        ([], "a: b", Place(("a",), "b", False)),
        ([], "a: {b: c, d", Place(("a",), "d", True)),
        ([], "a: {b: {c: 1}, d: e", Place(("a", "d"), "e", False)),
        ([], "a: ['x, y', z", Place(("a",), "z", False, True)),
        (["a:", "  b: 1"], "  c", Place(("a",), "c", True)),
        (["a:", "  b: 1"], "c", Place((), "c", True)),
        (["a:", "  b:", "    c: 1", ""], "    d: e", Place(("a", "b", "d"), "e", False)),
        (["a:", "- b"], "- c", Place(("a",), "c", False, True)),
        ([], "# a: b", None),
        ([], "a: b # c", None),
        ([], "a=b", None),
    ],
)
def test_the_place_of_a_cursor_in_settings_that_are_no_yaml_yet(above, before, place):
    assert place_of(above, before) == place
