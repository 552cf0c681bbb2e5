"""Settings of other programs are read as what they mean here, every key answered by its line; ours written for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mlx_nb
from foreign_settings import NEIGHBORS, TEXTS
from mlx_nb.cli import main
from mlx_nb.config.dialects.exported import export_settings
from mlx_nb.config.dialects.imported import import_settings
from mlx_nb.config.dialects.programs import DIALECTS
from mlx_nb.config.run_config import RunConfig
from mlx_nb.errors import ConfigError
from mlx_nb.notebook.commands import run_line
from mlx_nb.notebook.session import Session

# What mlx-lm trains with where its file says nothing.
MLX_LM = {
    "optimizer": "adam",
    "optimizer_config": {"bias_correction": False},
    "lr_schedule": {"name": "constant", "warmup": 0},
    "grad_clip": None,
    "steps_per_eval": 200,
}
BASIC = {
    **MLX_LM,
    "model": "mlx-community/Llama-3.2-3B-Instruct-4bit",
    "data": "./data",
    "iters": 1000,
    "num_layers": 16,
    "learning_rate": 1e-5,
    "loss_on": "all",
    "val_set_size": 0.0,
}
LORA = {**MLX_LM, "model": "<path_to_model>", "data": "<path_to_data>"}
LORA_DEFAULTS = {"batch_size": 1, "iters": 1000, "learning_rate": 1e-5, "lora_parameters": {"scale": 10.0}}

# (program, settings): the meaning of each text of `foreign_settings`, and of nothing else.
MEANT = {
    "LoRA-Studio, sft": (
        "lora-studio",
        {
            "method": "sft",
            "model": "mlx-community/Meta-Llama-3-8B-Instruct-4bit",
            "data": "mlx-community/JOSIE-v2-Instruct-5K",
            "fine_tune_type": "lora",
            "lora_parameters": {"rank": 16, "scale": 2.0, "dropout": 0.05},
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "learning_rate": 2e-4,
            "lr_schedule": {"name": "cosine", "warmup": 20},
            "weight_decay": 0.0,
            "grad_accumulation_steps": 8,
            "iters": 1000,
            "batch_size": 2,
            "max_seq_length": 2048,
            "save_every": 200,
            "adapter_path": "~/Library/Application Support/MLXLoRAStudio/runs/<id>/adapter",
        },
    ),
    "mlx-bun, the body of a request": (
        "mlx-bun",
        {
            "model": "/path/to/snapshot",
            "data": "/path/to/dataset",
            "adapter_path": "/path/to/output-adapter",
            "method": "sft",
            "lora_parameters": {"rank": 16, "scale": 1.0},
            "iters": 300,
            "learning_rate": 2e-4,
            "max_seq_length": 2048,
            "batch_size": 1,
            "steps_per_eval": 50,
            "loss_on": "final",
            "lr_schedule": {"name": "constant", "warmup": 0},
            "grad_clip": None,
        },
    ),
    "mlx-lm, basic": ("mlx-lm", BASIC),
    "mlx-lm, QLoRA": ("mlx-lm", BASIC),
    "mlx-lm, with all options": (
        "mlx-lm",
        {
            **BASIC,
            "batch_size": 4,
            "lora_parameters": {"rank": 8},
            "adapter_path": "./my-adapters",
            "save_every": 100,
            "val_batches": 25,
        },
    ),
    "mlx-lm, resume": (
        "mlx-lm",
        {**BASIC, "iters": 500, "resume_adapter_file": "./my-adapters/adapters.safetensors"},
    ),
    "mlx-lm, full": (
        "mlx-lm",
        {
            **BASIC,
            "model": "mlx-community/Llama-3.2-1B-Instruct",
            "fine_tune_type": "full",
            "batch_size": 1,
            "learning_rate": 1e-6,
        },
    ),
    "mlx-lm-lora, sft with a masked prompt": ("mlx-lm-lora", {**LORA, **LORA_DEFAULTS, "loss_on": "final"}),
    "mlx-lm-lora, orpo": ("mlx-lm-lora", {**LORA, **LORA_DEFAULTS, "method": "orpo", "beta": 0.1}),
    "mlx-lm-lora, dpo": ("mlx-lm-lora", {**LORA, **LORA_DEFAULTS, "method": "dpo", "beta": 0.1}),
    "TRL and PEFT": (
        "trl",
        {
            "model": "Qwen/Qwen2.5-0.5B",
            "data": "trl-lib/Capybara",
            "epochs": 1,
            "batch_size": 2,
            "grad_accumulation_steps": 8,
            "grad_checkpoint": True,
            "optimizer": "adamw",
            "lr_schedule": {"name": "cosine"},
            "grad_clip": 1.0,
            "steps_per_eval": 100,
            "lora_parameters": {"rank": 32, "scale": 0.5},
            "adapter_path": "out",
            "weight_decay": 0.0,
            "seed": 42,
            "max_seq_length": 1024,
            "learning_rate": 2e-5,
            "report_to": "wandb",
        },
    ),
    "axolotl": (
        "axolotl",
        {
            "model": "NousResearch/Llama-3.2-1B",
            "fine_tune_type": "lora",
            "load_in_bits": 4,
            "data": "mhenrichsen/alpaca_2k_test",
            "max_seq_length": 2048,
            "packing": True,
            "batch_size": 2,
            "val_set_size": 0.05,
            "method": "dpo",
        },
    ),
}


@pytest.mark.parametrize("case", MEANT)
def test_a_text_of_another_program_is_read_as_what_it_means_here(case):
    program, settings = MEANT[case]
    imported = import_settings(TEXTS[case][0])
    assert (imported.dialect, dict(imported.settings)) == (program, settings)
    assert RunConfig.from_yaml(imported.cell().partition("\n")[2]) == imported.config == RunConfig.from_dict(settings)


# (text, line): what one key of a file says, and what became of it.
LINES = {
    "train: true\niters: 1000\ngrad_accumulation_steps: 3": (
        "converted  line 2    iters: 1000 -> iters: 333. there it counts forward passes, 3 in an update; the last 1 "
        "are in no update there"
    ),
    "train: true\ngrad_accumulation_steps: 4\nsteps_per_eval: 200\niters: 400": (
        "converted  line 3    steps_per_eval: 200 -> steps_per_eval: 50. there it counts forward passes, 4 in an update"
    ),
    "train: true\noptimizer_config: {adam: {}, adamw: {}}": "ignored    line 2    optimizer_config: "
    "{adam: {}, adamw: {}}. it is empty",
    "train: true\noptimizer: adamw\noptimizer_config: {adamw: {weight_decay: 0.1}}": (
        "converted  line 3    optimizer_config: {adamw: {weight_decay: 0.1}} -> optimizer_config: {weight_decay: 0.1}"
    ),
    "train: true\nlora_parameters: {rank: 8, alpha: 16, dropout: 0.1}": (
        "converted  line 2    lora_parameters: {rank: 8, alpha: 16, dropout: 0.1} -> lora_parameters: {rank: 8, "
        "scale: 2, dropout: 0.1}. mlx-lm itself wants scale, not alpha"
    ),
    "mask_prompt: true": "converted  line 1    mask_prompt: true -> loss_on: final. of a conversation only the last "
    "message is trained there",
    "mask_prompt: false": "converted  line 1    mask_prompt: false -> loss_on: all",
    "train: true\nhf_dataset: {path: a/b, config: {name: main}, train_split: train, prompt_feature: q}": (
        "converted  line 2    hf_dataset: {path: a/b, config: {name: main}, train_split: train, prompt_feature: q} -> "
        "data: a/b, subset: main, train_split: train, prompt_feature: q"
    ),
    'train: true\nhf_dataset: {path: a/b, train_split: "train[:80%]"}': "not here   line 2    hf_dataset: {path: a/b, "
    'train_split: "train[:80%]"}. each dataset needs a path, and splits by name without slices',
    "train_mode: dpo\ndpo_cpo_loss_type: ipo": (
        "converted  line 2    dpo_cpo_loss_type: ipo -> loss: ipo. there every loss trains as sigmoid; mlx-lm-lora "
        "itself uses sigmoid instead, whatever a file says"
    ),
    "train_mode: sft\ngradient_accumulation_steps: 8": (
        "converted  line 2    gradient_accumulation_steps: 8 -> grad_accumulation_steps: 8. there each pass counts the "
        "same, here each token; mlx-lm-lora itself uses 1 instead, whatever a file says"
    ),
    "train_mode: sft\nqat_enable: true": "not here   line 2    qat_enable: true. mlx_nb has no quantization-aware "
    "training; there it has no effect on a quantized model",
    "train_mode: sft\nqat_enable: false": "ignored    line 2    qat_enable: false. it is off",
    "train_mode: sft\nload_in_mxfp4: true": "not here   line 2    load_in_mxfp4: true. mlx_nb has no mxfp4",
    "train_mode: sft\nefficient_long_context: true": "taken      line 2    efficient_long_context: true",
    "train_mode: sft\nlm_studio_name: bees": "ignored    line 2    lm_studio_name: bees. After training, `%finetune "
    "gguf --lm-studio NAME` writes the model there",
    "train_mode: sft\nwandb: bees": "converted  line 2    wandb: bees -> report_to: wandb, project_name: bees",
    "train: true\nreport_to: wandb,swanlab": 'taken      line 2    report_to: "wandb,swanlab"',
    "train: true\nproject_name: bees": "ignored    line 2    project_name: bees. nothing is reported",
    "train_mode: xpo": "not here   line 1    train_mode: xpo. mlx_nb has no method xpo",
    "model_dir: m\nsegment_size: 4": "taken      line 2    segment_size: 4",
    "model_dir: m\nrank_scaling: by_bits": "not here   line 2    rank_scaling: by_bits. mlx_nb has no separate rank "
    "for each layer",
    "model_name_or_path: m\nmax_steps: 200\nwarmup_ratio: 0.1": (
        "converted  line 3    warmup_ratio: 0.1 -> lr_schedule: {warmup: 20}. of the updates"
    ),
    "model_name_or_path: m\nr: 16\nlora_alpha: 8\nuse_rslora: true": (
        "converted  line 3    lora_alpha: 8 -> lora_parameters: {scale: 2}. alpha / sqrt(rank), with rank 16"
    ),
    "base_model: m\nadapter:\nlora_r: 8": "converted  line 2    adapter: null -> fine_tune_type: full",
    "base_model: m\ndatasets: [{path: a}, {path: b, split: train}]": (
        "converted  line 2    datasets: [{path: a}, {path: b, split: train}] -> data: [{path: a}, {path: b, "
        "train_split: train}]. mixed by number of rows"
    ),
    "finetuning_type: lora\nstage: dpo\npref_loss: simpo": "converted  line 3    pref_loss: simpo -> method: cpo, "
    "loss: simpo",
    "finetuning_type: lora\ntemplate: qwen": "ignored    line 2    template: qwen. the chat template is that of the "
    "model; qwen is not known by name",
    "train: true\nitres: 5": "not here   line 2    itres: 5. no such setting is known; is it `iters`?; mlx-lm itself "
    "has no such option",
    "train: true\niters: -5": "not here   line 2    iters: -5. `iters` must be at least 1, not -5.",
}


@pytest.mark.parametrize("text", LINES)
def test_a_key_says_what_became_of_it(text):
    lines = str(import_settings(text)).splitlines()
    assert any(line.startswith(LINES[text]) for line in lines), "\n".join(lines)


@pytest.mark.parametrize("program", NEIGHBORS)
@pytest.mark.long
def test_every_key_of_another_program_has_a_line(program):
    words = [word for word in NEIGHBORS[program].split() if word not in ("model", "config")]
    for word in words:
        for value in (None, True, 2, "x", ["x"], {"x": 1}):
            imported = import_settings(json.dumps({"dialect": "mlx-lm-lora", word: value}))
            (line,) = [line for line in imported.lines if line.number is not None and line.key.split(".")[0] == word][
                :1
            ]
            assert line.status in ("taken", "converted", "ignored", "not here")
            assert (line.status in ("taken", "converted")) >= bool(line.meaning.becomes)


def test_a_file_of_another_program_trains_as_it_is_and_one_with_more_is_refused_by_key_and_line(tmp_path):
    file = tmp_path / "lora.yaml"
    file.write_text("model: m\ntrain: true\ndata: d\niters: 10\n")
    run = mlx_nb.Run.from_yaml(file, batch_size=2)
    assert (run.config.optimizer, run.config.num_layers, run.config.batch_size) == ("adam", 16, 2)
    assert "num_layers: 16. ours is -1" in str(run.imported)
    file.write_text("model: m\ntrain_mode: sft\nqat_enable: true\n")
    with pytest.raises(ConfigError) as caught:
        mlx_nb.Run.from_yaml(file)
    assert str(caught.value).splitlines() == [
        f"{file}, not here line 3 qat_enable: true. mlx_nb has no quantization-aware training; there it has no effect "
        "on a quantized model",
        "These settings of mlx-lm-lora are not here. `%finetune import` and `mlx-nb import` write the other settings.",
    ]
    file.write_text("model: m\niters: 10\nlora_parameters: {rank: 4}\n")
    assert mlx_nb.Run.from_yaml(file).imported is None


def test_a_text_that_names_its_program_gets_its_defaults_and_no_other_text_does():
    run = mlx_nb.Run.from_yaml("dialect: mlx-lm\nmodel: m\niters: 10")
    assert (run.config.learning_rate, run.config.loss_on, run.config.grad_clip) == (1e-5, "all", None)
    assert mlx_nb.Run.from_yaml("model: m\niters: 10").config.learning_rate == 1e-4
    with pytest.raises(ConfigError, match="Did you mean 'mlx-lm'"):
        mlx_nb.Run.from_yaml("dialect: mlxlm\nmodel: m")
    with pytest.raises(ConfigError, match="no setting by which another program is recognized"):
        import_settings("model: m\niters: 10")


def test_a_command_with_a_file_takes_both_and_its_own_options_count_more(tmp_path):
    file = tmp_path / "lora.yaml"
    file.write_text("model: m\niters: 10\nbatch_size: 3\n")
    imported = import_settings(f"python -m mlx_lm lora -c {file} --train --iters 20")
    assert (imported.config.iters, imported.config.batch_size, imported.config.model) == (20, 3, "m")
    assert import_settings(f"python -m mlx_lm_lora -c {file}").dialect == "mlx-lm-lora"
    for command, message in {
        "mlx_lm.lora --model m --test --adapter-path a": "`mlx-nb evaluate a --split test`",
        "mlx_lm.fuse --model m": "`%finetune fuse FOLDER`",
    }.items():
        with pytest.raises(ConfigError, match=message):
            import_settings(command)


def test_the_command_of_the_notebook_shows_the_report_and_writes_the_cell(monkeypatch):
    written = []
    monkeypatch.setattr("mlx_nb.notebook.result_commands.insert_cell", written.append)
    shown = str(run_line(Session({}), 'import "mlx_lm.lora --model m --train --data d --iters 600"'))
    assert "default              num_layers: 16. ours is -1" in shown.splitlines()
    (cell,) = written
    assert cell.startswith("%%finetune --name run\nmodel: m\ndata: d\niters: 600\noptimizer: adam\n")


def test_the_command_of_the_terminal_prints_the_settings_alone_on_stdout(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("train_mode: sft\nmodel: m\nqat_enable: true\n")
    assert main(["import", str(file)]) == 1
    out, error = capsys.readouterr()
    assert "not here   line 3    qat_enable: true" in error
    assert RunConfig.from_yaml(out).model == "m"
    file.write_text("train_mode: sft\nmodel: m\n")
    assert main(["import", str(file)]) == 0


# Our settings for other programs


def test_what_another_program_cannot_do_is_reported_by_setting_or_refused():
    config = RunConfig.from_dict(
        {"iters": 60, "learning_rate": 1e-4, "loraplus_lr_ratio": 16, "grad_accumulation_steps": 2, "down_weight": [3]}
    )
    written = export_settings(config, "mlx-lm")
    assert [(line.key, line.status) for line in written.lines] == [
        ("grad_clip", "not here"),
        ("loraplus_lr_ratio", "not here"),
        ("down_weight", "not here"),
        ("loss_on", "converted"),
        ("grad_accumulation_steps", "converted"),
    ]
    for settings, message in {
        '{"method": "kto"}': "mlx-lm has no `method: kto`",
        '{"optimizer": "lion", "iters": 3}': "mlx-lm has no `optimizer: lion`",
        '{"data": [{"text": "a"}], "iters": 3}': "reads rows from a folder",
        '{"load_in_bits": 4, "iters": 3}': "mlx_lm.convert --hf-path smollm2-135m -q --q-bits 4",
        '{"epochs": 2}': "counts iterations, not epochs",
    }.items():
        with pytest.raises(ConfigError, match=message):
            export_settings(RunConfig.from_dict(json.loads(settings)), "mlx-lm")
    with pytest.raises(ConfigError, match="Did you mean 'mlx-lm'"):
        export_settings(config, "mlxlm")


@pytest.mark.parametrize("dialect", ["mlx-lm", "mlx-lm-lora"])
def test_settings_written_for_another_program_come_back_as_they_were(dialect, tmp_path):
    ours = {
        "model": "m",
        "data": "d",
        "iters": 60,
        "grad_accumulation_steps": 2,
        "batch_size": 3,
        "learning_rate": 2e-4,
        "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.1, "keys": ["q_proj"]},
        "lr_schedule": "constant",
        "warmup": 0,
        "optimizer_config": {"betas": [0.9, 0.98], "bias_correction": True},
        "grad_clip": None,
        "loss_on": "final",
        "num_layers": 4,
        "steps_per_eval": 20,
        "save_every": 30,
        "max_seq_length": 256,
        "seed": 3,
        "val_set_size": 0.0,
    }
    config = RunConfig.from_dict(ours)
    path = export_settings(config, dialect).save(tmp_path / "out.yaml")
    back = import_settings(path, dialect, val_set_size=0.0, test_batches=-1, adapter_path=None).config
    assert back.to_dict() == config.to_dict()
    with pytest.raises(ConfigError, match="exists"):
        export_settings(config, dialect).save(path)


def test_the_programs_are_those_of_the_documentation():
    page = Path(mlx_nb.__file__).parents[1] / "docs" / "other_programs.md"
    for name in DIALECTS:
        assert f"`{name}`" in page.read_text()
