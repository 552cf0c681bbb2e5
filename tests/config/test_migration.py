"""What people bring from other programs: each text gives all its messages in one go, each with what to write."""

from __future__ import annotations

import re

import pytest

from foreign_settings import NEIGHBORS, TEXTS
from mlx_nb.config.methods import METHODS
from mlx_nb.config.neighbor_words import (
    AFTERWARDS,
    ALPHAS,
    INSTEAD,
    SAME,
    SECTIONS,
    SWITCHES,
    UNNECESSARY,
    UNSUPPORTED,
    VALUES,
)
from mlx_nb.config.run_config import _GROUPS, SETTINGS, RunConfig
from mlx_nb.config.yaml_text import read_words
from mlx_nb.errors import CommandError, ConfigError


@pytest.mark.parametrize("case", TEXTS)
def test_a_text_of_another_program_gives_all_its_messages_in_one_go(case):
    text, lines = TEXTS[case]
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_yaml(text)
    assert str(caught.value).splitlines() == lines


def test_what_the_messages_say_to_write_is_what_the_text_meant():
    _, lines = TEXTS["LoRA-Studio, sft"]
    written = [re.findall(r"`([a-z_]+: [^`]*)`", line)[-1] for line in lines]
    inside = [line.removeprefix("lora_parameters: {").removesuffix("}") for line in written if "{" in line]
    flat = [line for line in written if "{" not in line]
    config = RunConfig.from_yaml("\n".join([*flat, "model: m", f"lora_parameters: {{{', '.join(inside)}}}"]))
    assert (config.lora_parameters.rank, config.lora_parameters.scale, config.lora_parameters.dropout) == (16, 2, 0.05)
    assert config.lora_parameters.keys == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert (config.learning_rate, config.lr_schedule.name, config.lr_schedule.warmup) == (2e-4, "cosine_decay", 20)
    assert (config.iters, config.batch_size, config.grad_accumulation_steps) == (1000, 2, 8)
    assert config.data == ["mlx-community/JOSIE-v2-Instruct-5K"]


@pytest.mark.parametrize("program", NEIGHBORS)
def test_every_word_of_another_program_is_a_setting_or_known_for_what_it_is(program):
    known = {*SETTINGS, *SAME, *SWITCHES, *INSTEAD, *UNNECESSARY, *AFTERWARDS, *UNSUPPORTED, *ALPHAS, *SECTIONS}
    assert [word for word in NEIGHBORS[program].split() if word not in known] == []


@pytest.mark.parametrize("word", sorted({*SAME, *SWITCHES, *INSTEAD, *UNNECESSARY, *AFTERWARDS, *UNSUPPORTED, *ALPHAS}))
def test_a_word_of_another_program_is_answered_by_what_there_is(word):
    assert word not in SETTINGS
    assert sum(word in table for table in (SAME, SWITCHES, INSTEAD, UNNECESSARY, AFTERWARDS, UNSUPPORTED, ALPHAS)) == 1
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict({word: "x"})
    first, *others = str(caught.value).splitlines()
    assert first.startswith(f"unknown setting `{word}`. ")
    assert all(line.startswith(f"`{SAME[word]}` ") for line in others)
    assert "Did you mean" not in first
    if word in UNSUPPORTED:
        assert first.endswith(f"mlx_nb has no {UNSUPPORTED[word]} yet. Remove it.")
    if word in AFTERWARDS:
        assert re.search(r"After training, `%finetune (fuse|gguf) .* Remove it\.$", first)
    for name in re.findall(r"`([a-z_]+)(?:: [^`]*)?`", first)[1:]:
        assert name in SETTINGS, first
    if word in SAME:
        outer, _, inner = SAME[word].partition(".")
        assert outer in SETTINGS
        assert not inner or outer == "optimizer_config" or inner in _GROUPS[outer]
    if word in INSTEAD:
        assert INSTEAD[word][0] in ("", *SETTINGS)
    if word in SWITCHES:
        assert SWITCHES[word][0] in SETTINGS


@pytest.mark.parametrize("off", ["false", "null", "0", "no"])
@pytest.mark.parametrize("word", SWITCHES)
def test_a_switch_that_is_off_is_never_answered_by_what_it_is_when_on(word, off):
    name, on, when_off = SWITCHES[word]
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_yaml(f"{word}: {off}")
    advice = f"Here it is `{name}: {when_off}`." if when_off else "That is the default here. Remove it."
    assert str(caught.value) == f"line 1, column 1: unknown setting `{word}`. {advice}"
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_yaml(f"{word}: true")
    advice = f"Here it is `{name}: {on}`." if on else "That is the default here. Remove it."
    assert str(caught.value) == f"line 1, column 1: unknown setting `{word}`. {advice}"


# (text, lines): words whose meaning depends on their value or on what stands beside them.
LINES = {
    "rl:": [
        "line 1, column 1: unknown setting `rl`. That is the default here. Remove it.",
    ],
    "rl: false": [
        "line 1, column 1: unknown setting `rl`. That is the default here. Remove it.",
    ],
    "max_steps: 0": [
        "line 1, column 1: unknown setting `max_steps`. That is the default here. Remove it.",
    ],
    "quantization_bit: 0": [
        "line 1, column 1: unknown setting `quantization_bit`. That is the default here. Remove it.",
    ],
    "ref_model: null": [
        "line 1, column 1: unknown setting `ref_model`. That is the default here. Remove it.",
    ],
    "patience: false": [
        "line 1, column 1: unknown setting `patience`. That is the default here. Remove it.",
    ],
    "adapter: false": [
        "line 1, column 1: unknown setting `adapter`. Here it is `fine_tune_type: full`.",
    ],
    "load_in_4bit: false\nload_in_8bit: true": [
        "line 1, column 1: unknown setting `load_in_4bit`. That is the default here. Remove it.",
        "line 2, column 1: unknown setting `load_in_8bit`. Here it is `load_in_bits: 8`.",
    ],
    "rl: ipo": [
        "line 1, column 1: unknown setting `rl`. Here it is `method`: write `method: dpo` and `loss: ipo`.",
    ],
    "rl: simpo": [
        "line 1, column 1: unknown setting `rl`. Here it is `method`: write `method: cpo` and `loss: simpo`.",
    ],
    "rl: orpo": [
        "line 1, column 1: unknown setting `rl`. Here it is `method`: write `method: orpo`.",
    ],
    "rl: gspo": [
        "line 1, column 1: unknown setting `rl`. Here it is `method`: write `method: grpo` and "
        "`importance_sampling_level: sequence`.",
        "`method: grpo` needs `rewards`: a list of functions in the notebook or built-in rewards, for "
        "instance [number_match].",
    ],
    "stage: pt": [
        "line 1, column 1: unknown setting `stage`. Here it is `method`: write `method: sft`.",
    ],
    "stage: dpo\npref_loss: orpo": [
        "line 1, column 1: unknown setting `stage`. Here it is `method`: write `method: dpo`.",
        "line 2, column 1: unknown setting `pref_loss`. Here it is `method: orpo`, in place of `method: dpo`.",
    ],
    "stage: dpo\npref_loss: simpo\npref_beta: 0.2": [
        "line 1, column 1: unknown setting `stage`. Here it is `method`: write `method: dpo`.",
        "line 2, column 1: unknown setting `pref_loss`. Here it is `loss`: write `method: cpo` and `loss: simpo`, "
        "in place of `method: dpo`.",
        "line 3, column 1: unknown setting `pref_beta`. Here it is `beta`: write `beta: 0.2`.",
    ],
    "stage: dpo\npref_loss: ipo": [
        "line 1, column 1: unknown setting `stage`. Here it is `method`: write `method: dpo`.",
        "line 2, column 1: unknown setting `pref_loss`. Here it is `loss`: write `loss: ipo`.",
    ],
    "stage: rm": [
        "line 1, column 1: unknown setting `stage`. Here it is `method`, and mlx_nb has no rm yet. It "
        "has: sft, dpo, cpo, orpo, kto, grpo.",
    ],
    "finetuning_type: freeze": [
        "line 1, column 1: unknown setting `finetuning_type`. Here it is `fine_tune_type`.",
    ],
    "lora_target: all": [
        "line 1, column 1: unknown setting `lora_target`. Every linear layer is adapted unless "
        "`target_modules` names others. Remove it.",
    ],
    "lora_target: q_proj,v_proj": [
        "line 1, column 1: unknown setting `lora_target`. Here it is `target_modules`: write "
        '`target_modules: ["q_proj", "v_proj"]`.',
    ],
    "lora_target_modules: all-linear": [
        "line 1, column 1: unknown setting `lora_target_modules`. Every linear layer is adapted unless "
        "`target_modules` names others. Remove it.",
    ],
    "target_modules: all-linear": [
        "line 1, column 1: `target_modules` takes names of modules. Every linear layer is adapted "
        "unless `target_modules` names others. Remove it.",
    ],
    "lora_parameters: {keys: [all-linear]}": [
        "line 1, column 19: `lora_parameters.keys` takes names of modules. Every linear layer is "
        "adapted unless `target_modules` names others. Remove it.",
    ],
    "target_modules: [all-linear]": [
        "line 1, column 1: `target_modules` takes names of modules. Every linear layer is adapted "
        "unless `target_modules` names others. Remove it.",
    ],
    "quantization_bit: 4": [
        "line 1, column 1: unknown setting `quantization_bit`. Here it is `load_in_bits`: write `load_in_bits: 4`.",
    ],
    "quantization_bit: null": [
        "line 1, column 1: unknown setting `quantization_bit`. That is the default here. Remove it.",
    ],
    "max_grad_norm: 0": [
        "line 1, column 1: unknown setting `max_grad_norm`. Here it is `grad_clip`: write `grad_clip: null`.",
    ],
    "num_generations: 8": [
        "line 1, column 1: unknown setting `num_generations`. Here it is `group_size`. `group_size` has "
        "no effect with `method: sft`, `loss: nll`. Remove it.",
    ],
    "method: orpo\ndpo_beta: 0.1": [
        "line 2, column 1: unknown setting `dpo_beta`. Here it is `beta`: write `beta: 0.1`.",
    ],
    "dpo_beta: 0.1": [
        "line 1, column 1: unknown setting `dpo_beta`. Here it is `beta`. `beta` has no effect with "
        "`method: sft`, `loss: nll`. Remove it.",
    ],
    "loss_type: ipo": [
        "line 1, column 1: unknown setting `loss_type`. Here it is `loss`: write `method: dpo` and `loss: ipo`.",
    ],
    "loss_type: zzz": [
        "line 1, column 1: unknown setting `loss_type`. Here it is `loss`. `loss` cannot be 'zzz' with "
        "`method: sft`. It has: nll, dft.",
    ],
    "num_iterations: 2": [
        "line 1, column 1: unknown setting `num_iterations`. Here it is `updates_per_rollout`. "
        "`updates_per_rollout` has no effect with `method: sft`, `loss: nll`. Remove it.",
    ],
    "lora_parameters: {alpha: 16, rank: 8}": [
        "line 1, column 19: unknown setting `lora_parameters.alpha`. Here it is `lora_parameters: "
        "{scale: 2}` (alpha / rank).",
    ],
    "lora_parameters: {alpha: 16}": [
        "line 1, column 19: unknown setting `lora_parameters.alpha`. Here it is `lora_parameters: "
        "{scale: ...}` (alpha / rank).",
    ],
    "lora_parameters: {r: 16, lora_alpha: 3, foo: 1}": [
        "line 1, column 19: unknown setting `lora_parameters.r`. It belongs inside: `lora_parameters: "
        "{rank: ...}`, here `lora_parameters: {rank: 16}`.",
        "line 1, column 26: unknown setting `lora_parameters.lora_alpha`. Here it is `lora_parameters: "
        "{scale: 0.1875}` (alpha / rank).",
        "line 1, column 41: unknown setting `lora_parameters.foo`. Known: rank, scale, dropout, keys.",
    ],
    '"a\\nb": 1': [
        "line 1, column 1: unknown setting `a\\nb`. `%%finetune?` lists all settings.",
    ],
    '"a\\x1b[31m": 1': [
        "line 1, column 1: unknown setting `a\\x1b[31m`. `%%finetune?` lists all settings.",
    ],
    'lora_parameters: {"a\\nb": 1}': [
        "line 1, column 19: unknown setting `lora_parameters.a\\nb`. Known: rank, scale, dropout, keys.",
    ],
    'roles: {"a\\nb": x}': [
        "line 1, column 9: `roles.a\\nb` cannot be 'x'. Choose one of: system, developer, user, "
        "assistant, tool, function_call, function, ipython.",
    ],
    '"a\\nb": 1\n"a\\nb": 2': [
        "line 2, column 1: `a\\nb` is given twice, first on line 1. Keep one of them.",
        "line 2, column 1: unknown setting `a\\nb`. `%%finetune?` lists all settings.",
    ],
    "adapter:": [
        "line 1, column 1: unknown setting `adapter`. Here it is `fine_tune_type: full`.",
    ],
    "truncation_mode: keep_end": [
        "line 1, column 1: unknown setting `truncation_mode`. Here it is `truncate`: write `truncate: left`.",
    ],
    "excess_length_strategy: raise": [
        "line 1, column 1: unknown setting `excess_length_strategy`. Here it is `truncate`: write `truncate: error`.",
    ],
    "template: qwen": [
        "line 1, column 1: unknown setting `template`. The chat template is that of the model, or "
        "`chat_template`: Jinja text, or a file with it.",
    ],
    "kto_chosen_weight: 2": [
        "line 1, column 1: unknown setting `kto_chosen_weight`. Here it is `desirable_weight`. "
        "`desirable_weight` has no effect with `method: sft`, `loss: nll`. Remove it.",
    ],
    "warmup_steps: 20\niters: 10": [
        "line 1, column 1: unknown setting `warmup_steps`. Here it is `warmup`. `warmup` (20) is longer "
        "than the run (`iters: 10`).",
    ],
    "steps_per_generation: 4": [
        "line 1, column 1: unknown setting `steps_per_generation`. mlx_nb has no splitting of a set of "
        "completions over several updates yet. Remove it.",
    ],
    "excess_length_strategy: drop": [
        "line 1, column 1: unknown setting `excess_length_strategy`. Here it is `truncate`: write `truncate: drop`.",
    ],
    "rl: kto": [
        "line 1, column 1: unknown setting `rl`. Here it is `method`: write `method: kto`.",
    ],
    "rl: dpo": [
        "line 1, column 1: unknown setting `rl`. Here it is `method`: write `method: dpo`.",
    ],
    "rl: grpo\nrewards: [number_match]": [
        "line 1, column 1: unknown setting `rl`. Here it is `method`: write `method: grpo`.",
    ],
    "pref_ftx: 0.1": [
        "line 1, column 1: unknown setting `pref_ftx`. mlx_nb has no likelihood term in dpo yet. Remove it.",
    ],
    "neat_packing: true": [
        "line 1, column 1: unknown setting `neat_packing`. Here it is `packing`: write `packing: true`.",
    ],
    "val_size: 0.1": [
        "line 1, column 1: unknown setting `val_size`. Here it is `val_set_size`: write `val_set_size: 0.1`.",
    ],
    "cutoff_len: 1024": [
        "line 1, column 1: unknown setting `cutoff_len`. Here it is `max_seq_length`: write `max_seq_length: 1024`.",
    ],
    "finetuning_type: lora": [
        "line 1, column 1: unknown setting `finetuning_type`. Here it is `fine_tune_type`: write "
        "`fine_tune_type: lora`.",
    ],
    "roles_to_train: [assistant]": [
        "line 1, column 1: unknown setting `roles_to_train`. Here it is `loss_on: assistant` (the "
        "default) or `loss_on: all`.",
    ],
    "lora_modules_to_save: [embed_tokens]": [
        "line 1, column 1: unknown setting `lora_modules_to_save`. mlx_nb has no full training of more modules yet. "
        "Remove it."
    ],
    "lr_scheduler_kwargs: {}": [
        "line 1, column 1: unknown setting `lr_scheduler_kwargs`. Here it is `lr_schedule: {name: ..., "
        "arguments: [...]}`.",
    ],
    "rl: dpo\nrl_beta: 0.1": [
        "line 1, column 1: unknown setting `rl`. Here it is `method`: write `method: dpo`.",
        "line 2, column 1: unknown setting `rl_beta`. Here it is `beta`: write `beta: 0.1`.",
    ],
    "stage: dpo\ndpo_label_smoothing: 0.1": [
        "line 1, column 1: unknown setting `stage`. Here it is `method`: write `method: dpo`.",
        "line 2, column 1: unknown setting `dpo_label_smoothing`. Here it is `label_smoothing`: write "
        "`label_smoothing: 0.1`.",
    ],
    "stage: kto\nkto_rejected_weight: 2": [
        "line 1, column 1: unknown setting `stage`. Here it is `method`: write `method: kto`.",
        "line 2, column 1: unknown setting `kto_rejected_weight`. Here it is `undesirable_weight`: "
        "write `undesirable_weight: 2`.",
    ],
    "stage: sft": [
        "line 1, column 1: unknown setting `stage`. Here it is `method`: write `method: sft`.",
    ],
    "stage: ppo": [
        "line 1, column 1: unknown setting `stage`. Here it is `method`, and mlx_nb has no ppo yet. It "
        "has: sft, dpo, cpo, orpo, kto, grpo.",
    ],
    "method: sft\nloss_type: ipo": [
        "line 2, column 1: unknown setting `loss_type`. Here it is `loss`: write `method: dpo` and `loss: ipo`, "
        "in place of `method: sft`.",
    ],
    "method: dpo\nloss_type: ipo": [
        "line 2, column 1: unknown setting `loss_type`. Here it is `loss`: write `loss: ipo`.",
    ],
    "lora_parameters: {rank: 8}\nlora_alpha: 16": [
        "line 2, column 1: unknown setting `lora_alpha`. Here it is `lora_parameters: {scale: 2}` (alpha / rank).",
    ],
}


@pytest.mark.parametrize("text", LINES)
def test_each_word_of_another_program_gets_one_line_that_says_what_its_value_is_here(text):
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_yaml(text)
    assert str(caught.value).splitlines() == LINES[text]


def test_the_values_of_other_programs_are_values_here():
    for name, values in VALUES.items():
        for value in values.values():
            assert RunConfig.from_dict({name: value})
        for foreign, value in values.items():
            with pytest.raises(ConfigError, match=f"Here it is `{name}: {value}`"):
                RunConfig.from_dict({name: foreign})


def test_a_method_that_does_not_exist_is_a_plain_error():
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict({"train_mode": "online_dpo"})
    assert str(caught.value) == (
        "unknown setting `train_mode`. Here it is `method`, and mlx_nb has no online_dpo yet. It has: "
        f"{', '.join(METHODS)}."
    )


def test_settings_on_a_command_line_are_answered_all_at_once(tmp_path, capsys):
    from mlx_nb.cli import main

    (tmp_path / "run.yaml").write_text("model: m\n")
    assert main(["train", str(tmp_path / "run.yaml"), "lr=1e-4", "max_grad_norm=1", "iters=x"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"mlx-nb: {tmp_path / 'run.yaml'}: unknown setting `lr`. Here it is `learning_rate`: write "
        "`learning_rate: 0.0001`.",
        f"mlx-nb: {tmp_path / 'run.yaml'}: unknown setting `max_grad_norm`. Here it is `grad_clip`: write "
        "`grad_clip: 1`.",
        f"mlx-nb: {tmp_path / 'run.yaml'}: `iters` cannot be 'x'. It takes a whole number. null is allowed.",
    ]
    assert main(["check", "data", "lr", "a=1", "a=2", "stop=[a"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "mlx-nb: mlx-nb check: 'lr' is not key=value. For example: mlx-nb check data max_seq_length=1024",
        "mlx-nb: mlx-nb check: `a` is given twice. Keep one of them.",
        "mlx-nb: mlx-nb check: the value [a cannot be read at line 1, column 10: expected ',' or ']', but got "
        "'<stream end>'. The line reads: value: [a",
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["learning_rate", "5e-5"], "'learning_rate 5e-5' is not key=value. Write `learning_rate=5e-5`."),
        (["lora_parameters.rank", "4"], "'lora_parameters.rank 4' is not key=value. Write `lora_parameters.rank=4`."),
        (["iters"], "'iters' is not key=value. For example: set iters=2"),
        (["5e-5"], "'5e-5' is not key=value. For example: set iters=2"),
        (["iters", "seed=1"], "'iters' is not key=value. For example: set iters=2"),
    ],
)
def test_a_key_and_its_value_as_two_words_are_one_mistake(words, told):
    with pytest.raises(CommandError) as caught:
        read_words(words, "set", "iters=2")
    assert str(caught.value) == f"set: {told}"


# What says "off", "no limit" or "as it comes" elsewhere

OFF_ELSEWHERE = {
    "max_steps: -1": "That is the default here. Remove it.",
    "max_steps: 0": "That is the default here. Remove it.",
    "num_train_epochs: -1": "That is the default here. Remove it.",
    "num_train_epochs: -1.0": "That is the default here. Remove it.",
    "max_grad_norm: 0.0": "Here it is `grad_clip`: write `grad_clip: null`.",
    "max_grad_norm: -1": "Here it is `grad_clip`: write `grad_clip: null`.",
    "save_total_limit: null": "Here it is `keep`. To keep all checkpoints, write a large number: `keep: 1000`.",
    "save_total_limit: -1": "Here it is `keep`. To keep all checkpoints, write a large number: `keep: 1000`.",
    "max_length: null": "Here it is `max_seq_length`. For no limit, write the length of the longest row, as the data "
    "check gives it.",
    "max_seq_len: -1": "Here it is `max_seq_length`. For no limit, write the length of the longest row, as the data "
    "check gives it.",
    "random_state: null": "Here it is `seed`. A run always has a seed. Remove it for 0.",
    "lora_dropout: null": "That is the default here. Remove it.",
    "warmup_steps: 0": "Here it is `warmup`: write `warmup: 0`.",
    "patience: 0": "That is the default here. Remove it.",
    "test_size: null": "Here it is `val_set_size`. For no validation, write `val_set_size: 0`.",
}
OFF_HERE = {
    "iters: -1": "`iters` must be at least 1, not -1. null = as many as epochs take.",
    "epochs: -1": "`epochs` must be above 0, not -1.0. null = 1 when iters is not given.",
    "grad_clip: 0": "`grad_clip` must be above 0, not 0.0. null = no clipping.",
    "early_stopping_patience: 0": "`early_stopping_patience` must be at least 1, not 0. null = never stop early.",
    "loss_spike: 0": "`loss_spike` must be above 0, not 0.0. null = never.",
    "keep: 0": "`keep` must be at least 1, not 0. To keep all checkpoints, write a large number: `keep: 1000`.",
    "val_set_size: null": "`val_set_size` has no value. It takes a finite number. For no validation, write "
    "`val_set_size: 0`.",
    "max_seq_length: -1": "`max_seq_length` must be at least 2, not -1. For no limit, write the length of the longest "
    "row, as the data check gives it.",
}


@pytest.mark.parametrize("text", OFF_ELSEWHERE)
def test_what_is_off_in_another_program_is_answered_by_what_to_write_here(text):
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_yaml(text)
    assert str(caught.value) == f"line 1, column 1: unknown setting `{text.split(':')[0]}`. {OFF_ELSEWHERE[text]}"


@pytest.mark.parametrize("text", OFF_HERE)
def test_what_would_be_off_elsewhere_is_answered_by_what_to_write_here(text):
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_yaml(text)
    assert str(caught.value) == f"line 1, column 1: {OFF_HERE[text]}"


def test_of_updates_and_epochs_that_another_program_has_both_the_one_that_counts_there_is_named():
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_yaml("max_steps: 100\nnum_train_epochs: 3\n")
    assert str(caught.value).splitlines() == [
        "line 1, column 1: unknown setting `max_steps`. Here it is `iters`: write `iters: 100`.",
        "line 2, column 1: unknown setting `num_train_epochs`. There `max_steps` goes before it. Remove it.",
    ]
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_yaml("max_steps: -1\nnum_train_epochs: 3\n")
    assert str(caught.value).splitlines() == [
        "line 1, column 1: unknown setting `max_steps`. That is the default here. Remove it.",
        "line 2, column 1: unknown setting `num_train_epochs`. Here it is `epochs`: write `epochs: 3`.",
    ]
