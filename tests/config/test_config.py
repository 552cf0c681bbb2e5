"""Settings: read as people mean them, refused in one clear line."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from mlx_nb.config.help import setting_help, settings_markdown, settings_text, short_help
from mlx_nb.config.run_config import SETTINGS, RunConfig
from mlx_nb.errors import ConfigError
from places import DOCS

BAD_YAML = {
    "unknown key": ("modle: x", "line 1", "Did you mean 'model'?"),
    "a word from elsewhere": ("model: x\nlr: 1e-4", "line 2", "`learning_rate`"),
    "nested key at the top": ("rank: 4", "line 1", "lora_parameters: {rank: ...}"),
    "unknown nested key": ("lora_parameters: {rnk: 3}", "line 1", "Did you mean 'rank'?"),
    "word for a number": ("learning_rate: fast", "line 1, column 1: ", "It takes a finite number"),
    "number out of bounds": ("batch_size: 0", "line 1", "at least 1"),
    "negative rate": ("learning_rate: -1e-4", "line 1", "above 0"),
    "dropout of one": ("lora_parameters: {dropout: 1.0}", "line 1", "below 1"),
    "dropout with completions": (
        "method: grpo\nrewards: [a]\nlora_parameters: {rank: 4, dropout: 0.1}",
        "line 3, column 28: ",
        "Set it to 0",
    ),
    "fraction for a count": ("iters: 2.5", "line 1", "a whole number"),
    "unknown choice": ("fine_tune_type: qlora", "line 1", "lora, dora, full"),
    "on is not true": ("test: on", "line 1", "true or false"),
    "repeated key": ("iters: 3\nmodel: a\niters: 4", "line 3", "first on line 1"),
    "no mapping": ("just some words", "", "key: value"),
    "unclosed bracket": ("lora_parameters: {rank: 4", "line 1", "expected ',' or '}'"),
    "tab": ("model: a\n\titers: 3", "line 2", "tabs"),
    "equals sign": ("iters = 3\nmodel: a", "line 1", "`=` in place of a colon"),
    "empty value": ("batch_size:", "line 1", "has no value"),
    "iters and epochs": ("iters: 3\nepochs: 1", "line 2", "Give one of them"),
    "rank with full": ("fine_tune_type: full\nlora_parameters: {rank: 4}", "line 2", "has no effect"),
    "decay with adam": ("optimizer: adam\nweight_decay: 0.2", "line 2", "has no effect"),
    "patience without validation": (
        "early_stopping_patience: 2\nsteps_per_eval: -1",
        "line 1",
        "has no effect",
    ),
    "test batches without test": ("test_batches: 3", "line 1", "has no effect"),
    "schedule without arguments": ("lr_schedule: step_decay", "line 1", "needs its arguments"),
    "too few schedule arguments": (
        "lr_schedule: {name: linear, arguments: [1e-4]}",
        "line 1",
        "[1e-4, 0, 500]",
    ),
    "rate against its schedule": (
        "learning_rate: 3e-4\nlr_schedule: {name: cosine, arguments: [1e-5, 10]}",
        "line 1",
        "has no effect",
    ),
    "warm-up longer than the run": ("iters: 10\nwarmup: 20", "line 2", "longer than the run"),
    "zero layers": ("num_layers: 0", "line 1", "trains nothing"),
    "zero saves": ("save_every: 0", "line 1", "-1"),
    "two words for one thing": (
        "target_modules: [q_proj]\nlora_parameters: {keys: [v_proj]}",
        "line 1",
        "differ",
    ),
    "group as a number": ("lora_parameters: 8", "line 1", "must be a mapping"),
    "bits that do not exist": ("load_in_bits: 5", "line 1", "2, 3, 4, 6, 8"),
}


@pytest.mark.parametrize("case", BAD_YAML)
def test_bad_yaml_gives_one_clear_line(case):
    text, place, hint = BAD_YAML[case]
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_yaml(text)
    message = str(caught.value)
    assert "\n" not in message
    assert place in message
    assert hint in message


def test_a_missing_yaml_file_is_named():
    with pytest.raises(ConfigError, match=r"no such file: nowhere/run\.yaml"):
        RunConfig.from_yaml(Path("nowhere/run.yaml"))


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("1E-5", 1e-5), ("2.5e-4", 2.5e-4), (".5", 0.5), ("1", 1.0), ("1_0", 10.0)],
)
def test_numbers_are_numbers(text, value):
    assert RunConfig.from_yaml(f"learning_rate: {text}").learning_rate == value


def test_words_stay_words():
    assert RunConfig.from_yaml("model: on").model == "on"
    assert RunConfig.from_yaml("seed: 012").seed == 12


def test_settings_survive_a_round_trip():
    config = RunConfig.from_yaml(
        "model: m\nlr_schedule: linear\nwarmup: 3\n"
        "target_modules: [q_proj]\nlora_parameters: {rank: 4}\ngrad_clip: null\n"
    )
    assert RunConfig.from_dict(config.to_dict()) == config
    assert config.lora_parameters.keys == ("q_proj",)
    assert config.lr_schedule.warmup == 3
    assert config.grad_clip is None
    assert config.changed()["model"] == "m"


def test_defaults_are_accepted_when_spelled_out():
    assert RunConfig.from_dict(RunConfig().to_dict()) == RunConfig()


def test_overrides_win_over_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("iters: 5\nmodel: a\n")
    assert RunConfig.from_yaml(path, iters=7).iters == 7


def test_the_reference_page_is_generated_from_the_declarations():
    page = DOCS / "settings.md"
    assert page.read_text(encoding="utf-8").rstrip() == settings_markdown().rstrip(), (
        "run `mlx-nb settings --markdown > docs/settings.md`"
    )


def test_help_names_every_setting():
    text = settings_text()
    assert all(f"  {name}: " in text for name in SETTINGS)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "dop"}, "Did you mean 'dpo'"),
        ({"method": "dpo", "loss": "hing"}, "Did you mean 'hinge'"),
        ({"beta": 0.1}, "`beta` has no effect with `method: sft`"),
        ({"method": "dpo", "loss": "hinge", "delta": 3}, "`delta` has no effect with `method: dpo`, `loss: hinge`"),
        (
            {"method": "dpo", "delta": 3},
            "`method: dpo`, `loss: sigmoid`. It needs `loss: dpop`. Set that, or remove it.",
        ),
        ({"method": "cpo", "simpo_gamma": 1}, "It needs `loss: simpo`."),
        ({"method": "dpo", "loss": "ipo", "label_smoothing": 0.1}, "It needs `loss: sigmoid` or `loss: robust`."),
        ({"method": "kto", "simpo_gamma": 1}, "`simpo_gamma` has no effect with `method: kto`. Remove it."),
        ({"method": "orpo", "reference_model": "x"}, "`reference_model` has no effect with `method: orpo`"),
        ({"group_size": 8}, "`group_size` has no effect"),
        ({"method": "grpo"}, "needs `rewards`"),
        ({"method": "grpo", "rewards": ["a"], "reward_weights": [1, 2]}, "2 numbers for 1 rewards"),
        (
            {"method": "grpo", "rewards": ["a"], "lora_parameters": {"dropout": 0.1}},
            "`lora_parameters.dropout` cannot be 0.1 with `method: grpo`: completions are drawn without dropout",
        ),
        ({"method": "kto", "reference_free": True}, "`reference_free` and `method: kto` exclude each other"),
        ({"method": "dpo", "loss": "dpop", "reference_free": True}, "`reference_free` and `loss: dpop` exclude"),
        ({"method": "dpo", "loss_on": "all"}, "`loss_on: all` trains prompts"),
        ({"method": "dpo", "loss": "robust", "label_smoothing": 0.5}, "below 0.5"),
        ({"method": "dpo", "method_options": {"beta": 1}}, "`beta` is a separate setting"),
        ({"dpo_cpo_loss_type": "ipo"}, "Here it is `loss`"),
        ({"method": "dpo", "beta": 0}, "leaves nothing of `method: dpo` to learn"),
        ({"method": "dpo", "text_feature": "x"}, "`text_feature` has no effect"),
        ({"method": "dpo", "truncate": "split"}, "`truncate: split` is for texts"),
        ({"method": "grpo", "rewards": ["a"], "loss_on": "final"}, "`loss_on` has no effect"),
    ],
)
def test_a_setting_without_effect_on_the_method_is_an_error(settings, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        RunConfig.from_dict(settings)


GRPO = {"method": "grpo", "rewards": ["a"]}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({**GRPO, "stop": [""]}, "`stop` has an empty text, which would end every completion at once."),
        ({**GRPO, "stop": [3]}, "`stop` cannot be [3]. It takes a list of texts, one at least. null is allowed."),
        ({**GRPO, "stop": []}, "`stop` cannot be an empty list. It takes a list of texts, one at least."),
        (
            {**GRPO, "reward_weights": [1, "a"]},
            "`reward_weights` cannot be [1, 'a']. It takes a list of finite numbers",
        ),
        ({**GRPO, "reward_weights": [math.inf]}, "`reward_weights` cannot be [inf]. It takes a list of finite numbers"),
        ({"method": "dpo", "beta": math.inf}, "`beta` cannot be inf. It takes a finite number. null is allowed."),
        ({"learning_rate": math.nan}, "`learning_rate` cannot be nan. It takes a finite number."),
        ({"lora_parameters": {"scale": math.inf}}, "`lora_parameters.scale` cannot be inf. It takes a finite number."),
    ],
)
def test_what_a_setting_accepts_is_explained_in_one_line(settings, words):
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        RunConfig.from_dict(settings)
    assert "\n" not in str(caught.value)


def test_a_reward_function_stays_a_function_when_a_setting_changes():
    def brief(completion):
        return -len(completion)

    config = RunConfig(method="grpo", rewards=[brief, "number_match"])
    assert config.replace(learning_rate=1e-5).rewards == [brief, "number_match"]
    assert config.to_dict()["rewards"] == ["brief", "number_match"]


def test_every_setting_is_in_the_table_that_proves_its_effect():
    from effect_table import ELSEWHERE, TABLE

    there = {name.partition(".")[0] for name in (*TABLE, *ELSEWHERE)}
    assert [name for name in SETTINGS if name not in there] == [], "add it to TABLE in tests/support/effect_table.py"


@pytest.mark.parametrize("name", ["lora_parameters", "lr_schedule", "optimizer_config", "method_options", "roles"])
def test_a_group_without_a_value_is_one_line(name):
    with pytest.raises(ConfigError, match=rf"`{name}` has no value\. It takes a mapping"):
        RunConfig.from_yaml(f"{name}:\n")


@pytest.mark.parametrize("longest", [30, 38, 48, 68])
def test_a_short_help_fits_and_closes_every_bracket_that_it_opens(longest):
    for line in setting_help():
        short = short_help(line.help, longest)
        assert 0 < len(short) <= longest
        assert all(short.count(a) == short.count(b) for a, b in ("()", "[]", "{}")), (line.name, short)
