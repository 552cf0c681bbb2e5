"""The pages of the methods say what the code does: rows, settings, defaults, metrics, examples."""

from __future__ import annotations

import json
import re
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_nb
from mlx_nb.config.help import setting_help
from mlx_nb.config.methods import METHODS, Method, is_built_in, options_of
from mlx_nb.config.run_config import SETTINGS, RunConfig
from mlx_nb.data.examples.kinds import recognize
from mlx_nb.errors import ConfigError
from mlx_nb.rollouts.rewards.builtin import REWARDS
from mlx_nb.rollouts.rewards.resolve import resolve_rewards
from places import DOCS
from tiny import tiny_labels, tiny_pairs, tiny_prompts, tiny_rows

FOLDER = DOCS / "methods"
NAMES = [name for name in METHODS if is_built_in(name)]
HEADINGS = [
    "Idea",
    "Formula",
    "Rows",
    "Settings",
    "Metrics and their healthy direction",
    "Paper to code",
    "Differences from TRL and mlx-lm-lora",
]
# A value that is not the default, for every setting that only some methods take.
GIVEN = {
    "chat_feature": "talk",
    "completion_feature": "reply",
    "text_feature": "body",
    "down_weight": [1],
    "down_weight_factor": 0.25,
    "beta": 0.3,
    "label_smoothing": 0.1,
    "z_loss": 1e-4,
    "delta": 5.0,
    "cpo_alpha": 0.5,
    "simpo_gamma": 1.0,
    "desirable_weight": 2.0,
    "undesirable_weight": 2.0,
    "reference_model": "other",
    "reference_adapter": "none",
    "reference_free": True,
    "group_size": 8,
    "max_completion_length": 64,
    "temperature": 0.8,
    "top_p": 0.9,
    "top_k": 50,
    "stop": ["\n"],
    "rewards": ["number_match", "exact_match"],
    "reward_weights": [2.0],
    "reward_timeout": 5.0,
    "scale_rewards": "batch",
    "updates_per_rollout": 2,
    "epsilon": 0.1,
    "epsilon_high": 0.3,
    "importance_sampling_level": "sequence",
    "mask_truncated_completions": True,
    "chosen_feature": "better",
    "rejected_feature": "worse",
    "label_feature": "good",
    "answer_feature": "solution",
    "preference_score_feature": "weight",
}


def page(name: str) -> str:
    return (FOLDER / f"{name}.md").read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """What stands under a heading of the second level."""
    return re.split(r"^## ", text.split(f"\n## {heading}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]


def table(text: str, first: str) -> list[list[str]]:
    """The rows of the table whose first column has this title."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def blocks(text: str, *languages: str) -> list[str]:
    return [body for language, body in re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL) if language in languages]


def words_in_code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def accepting(method: Method, name: str) -> list[str]:
    """The variants of a method with which a setting may be given."""
    needed = {"rewards": ["number_match"], "updates_per_rollout": 2} if method.row_kind == "prompts" else {}
    taking = []
    for variant in method.losses:
        try:
            RunConfig.from_dict({"method": method.name, "loss": variant, **needed, name: GIVEN[name]})
        except ConfigError as error:
            if name not in str(error):
                raise
        else:
            taking.append(variant)
    return taking


def default_text(method: Method, name: str) -> str | None:
    """The default as the page must have it; None where a loss function decides it by itself."""
    if SETTINGS[name].metadata["only_for"] != "option":
        return next(f"`{line.default}`" for line in setting_help() if line.name == name)
    defaults = {
        variant: options_of(loss.function())[name] for variant, loss in method.losses.items() if name in loss.options
    }
    first = next(iter(defaults.values()))
    parts = [f"`{'null' if first is None else first}`"]
    parts += [f"`{variant}` `{value}`" for variant, value in defaults.items() if value != first]
    return "; ".join(parts)


def test_every_setting_that_only_some_methods_take_is_tried_here():
    assert set(GIVEN) == {name for name, declared in SETTINGS.items() if declared.metadata["only_for"]}


def test_every_method_has_its_page_and_the_overview_links_them():
    assert {path.stem for path in FOLDER.glob("*.md")} == {*NAMES, "README", "your_own"}
    links = re.findall(r"\]\((\w+)\.md\)", page("README"))
    assert set(links) == {*NAMES, "your_own"}


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_the_fixed_headings_in_order(name):
    assert re.findall(r"^## (.*)$", page(name), re.MULTILINE) == HEADINGS


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_on_a_page_is_a_configuration_of_that_method(name):
    cells = blocks(page(name), "yaml")
    assert cells
    for cell in cells:
        assert RunConfig.from_yaml(cell).method == name


@pytest.mark.parametrize("name", NAMES)
def test_every_row_on_a_page_is_read_as_that_method_reads_it(name):
    examples = [line for block in blocks(page(name), "json", "jsonl") for line in block.splitlines()]
    assert examples
    for line in examples:
        recognize(METHODS[name].row_kind, json.loads(line))


@pytest.mark.parametrize("name", NAMES)
def test_the_settings_are_those_that_have_an_effect_with_their_defaults(name):
    method = METHODS[name]
    rows = {words_in_code(row[0])[0]: row for row in table(section(page(name), "Settings"), "setting")}
    effective = {setting: variants for setting in GIVEN if (variants := accepting(method, setting))}
    assert set(rows) == {*effective, *(["loss"] if len(method.losses) > 1 else [])}
    for setting, variants in effective.items():
        _, default, losses, _ = rows[setting]
        assert default == default_text(method, setting), setting
        if len(variants) == len(method.losses):
            assert losses == "all", setting
        else:
            assert words_in_code(losses) == variants, setting


@pytest.mark.parametrize("name", NAMES)
def test_the_variants_are_those_of_the_method_the_default_first(name):
    variants = list(METHODS[name].losses)
    if len(variants) > 1:
        assert [words_in_code(row[0])[0] for row in table(section(page(name), "Formula"), "`loss`")] == variants
        loss = next(row for row in table(section(page(name), "Settings"), "setting") if row[0] == "`loss`")
        assert loss[1] == f"`{variants[0]}`"


@pytest.mark.parametrize("name", NAMES)
def test_the_metrics_are_those_of_the_method_with_their_healthy_direction(name):
    rows = table(section(page(name), HEADINGS[4]), "metric")
    assert {words_in_code(row[0])[0]: row[2] for row in rows} == {
        metric: described.healthy for metric, described in METHODS[name].metrics.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_code_that_a_page_points_to_is_there(name):
    package = Path(mlx_nb.__file__).parent
    places = re.findall(r"`([\w/]+\.py)(?:: (\w+))?`", page(name))
    assert places
    for file, function in places:
        text = (package / file).read_text(encoding="utf-8")
        assert not function or f"def {function}(" in text, f"{file}: {function}"


def test_the_page_of_grpo_names_all_built_in_rewards_and_its_example_is_one():
    text = page("grpo")
    assert [words_in_code(row[0])[0].split(":")[0] for row in table(text, "reward")] == list(REWARDS)
    namespace: dict = {}
    exec(blocks(text, "python")[0], namespace)
    rewards = resolve_rewards(RunConfig.from_yaml(blocks(text, "yaml")[1]).rewards, namespace)
    assert [reward.name for reward in rewards] == ["short_and_right", "number_match", "regex", "length", "xml_tags"]
    assert rewards[0].function("It is 56", "56") == 1 - 0.008
    assert rewards[2].function("Answer: 56") == 1.0


@pytest.mark.long
def test_the_method_on_the_page_of_your_own_passes_its_check_and_trains(tmp_path, tiny_folder):
    text = page("your_own")
    try:
        exec(blocks(text, "python")[0], {})
        config = RunConfig.from_yaml(
            blocks(text, "yaml")[0],
            model=str(tiny_folder),
            data="rows",
            iters=2,
            adapter_path=str(tmp_path / "adapter"),
        )
        run = mlx_nb.Run(config, namespace={"rows": tiny_pairs()})
        run.run()
        metrics = run.history.last_step.metrics
        assert set(METHODS["dpo"].metrics) | {"pull"} == set(metrics)
        assert 0 < metrics["pull"] <= 0.5
    finally:
        METHODS.pop("apo_zero", None)


RETURNS = {
    "tokens": lambda targets: (-targets.logprob_S, {"extra": targets.logprob_S}),
    "pairs": lambda pairs: (pairs.rejected_P - pairs.chosen_P, {"extra": pairs.margin_P}),
    "labels": lambda answers: (-answers.label_B * answers.logprob_B, {"extra": answers.label_B}),
    "prompts": lambda completions: -completions.logprob_S * completions.advantage_S,
}


@pytest.mark.parametrize("kind", RETURNS)
@pytest.mark.matrix(every=4)
def test_a_loss_of_every_kind_may_return_what_the_page_says(kind, tmp_path, tiny_folder):
    titles = [words_in_code(row[0])[0].strip('"') for row in table(page("your_own"), "`rows=`")]
    assert titles == list(RETURNS)
    rows = {"tokens": tiny_rows, "pairs": tiny_pairs, "labels": tiny_labels, "prompts": tiny_prompts}[kind]()
    needed = {"rewards": [{"length": {"max": 3}}], "max_completion_length": 4} if kind == "prompts" else {}
    try:
        mlx_nb.register_objective("mine", rows=kind, reference=kind == "labels", metrics={"extra": "of its own"})(
            RETURNS[kind]
        )
        mlx_nb.check_objective("mine")
        config = RunConfig.from_dict(
            {
                "method": "mine",
                "model": str(tiny_folder),
                "data": "rows",
                "iters": 1,
                "adapter_path": str(tmp_path / "a"),
                **needed,
            }
        )
        run = mlx_nb.Run(config, namespace={"rows": rows})
        run.run()
        assert ("extra" in run.history.last_step.metrics) == (kind != "prompts")
        assert all(mx.isfinite(mx.array(loss)).item() for loss in run.history["loss"])
    finally:
        METHODS.pop("mine", None)
