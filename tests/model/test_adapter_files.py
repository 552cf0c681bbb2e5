"""An adapter that a run starts from, or is compared with, counts in its own shape, on its own base, or not at all."""

from __future__ import annotations

import json
import math
import shutil

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from mlx_nb import Run, RunConfig
from mlx_nb.errors import MlxNbError, ModelError
from mlx_nb.model.adapter_files import REFERENCE, START, open_adapter
from mlx_nb.model.adapters import load_adapter_weights
from tiny import tiny_pairs, tiny_prompts, tiny_rows

SHAPE = {"rank": 3, "scale": 7.0, "dropout": 0.25, "keys": ["q_proj", "mlp.up_proj"]}
SETTINGS = {"fine_tune_type": "dora", "num_layers": 1, "lora_parameters": SHAPE}


def run_of(folder, tiny_folder, name="run", allow_changed=(), **settings):
    base = {
        "model": str(tiny_folder),
        "data": tiny_pairs(20) if settings.get("method") == "dpo" else tiny_rows(20),
        "iters": 4,
        "learning_rate": 2e-2,
        "steps_per_eval": -1,
        "val_set_size": 6,
        "adapter_path": str(folder),
    }
    return Run(RunConfig.from_dict({**base, **settings}), name=name, allow_changed=allow_changed)


def trained(folder, tiny_folder, **settings):
    run = run_of(folder, tiny_folder, **settings)
    run.run()
    return run


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory):
    """A DoRA adapter of an unusual shape, its folder and its validation loss."""
    folder = tmp_path_factory.mktemp("adapter") / "sft"
    run = trained(folder, tiny_folder, **SETTINGS)
    return folder, run.evaluate().loss


@pytest.fixture
def copied(adapter, tmp_path):
    """A copy to spoil: a function that edits its adapter_config.json and gives its folder."""
    folder = tmp_path / "copied"
    shutil.copytree(adapter[0], folder)

    def edit(remove=(), **changes):
        path = folder / "adapter_config.json"
        described = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({name: value for name, value in described.items() if name not in remove}))
        return folder

    return edit


def other_base(tiny_folder, target):
    """A model of the same shapes with other weights."""
    shutil.copytree(tiny_folder, target)
    weights = mx.load(str(target / "model.safetensors"))
    weights = {name: array + 0.1 for name, array in weights.items()}
    mx.save_safetensors(str(target / "model.safetensors"), weights)
    return target


def refusal(call):
    with pytest.raises(MlxNbError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


# Its own shape


def test_the_shape_is_the_adapters_where_nothing_is_given(adapter, tiny_folder, tmp_path):
    folder, loss = adapter
    run = run_of(tmp_path / "b", tiny_folder, resume_adapter_file=str(folder))
    assert run.evaluate().loss == loss
    config = run.config
    assert (config.fine_tune_type, config.num_layers) == ("dora", 1)
    lora = config.lora_parameters
    assert (lora.rank, lora.scale, lora.dropout, lora.keys) == (3, 7.0, 0.25, ("self_attn.q_proj", "mlp.up_proj"))
    run.run()
    written = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert written["lora_parameters"]["scale"] == 7.0
    assert written["fine_tune_type"] == "dora"


def test_the_weights_in_a_folder_or_file_go_into_the_attached_adapter(adapter, tiny_folder, tmp_path):
    folder, loss = adapter
    run = run_of(tmp_path / "b", tiny_folder, **SETTINGS)
    assert run.evaluate().loss != loss
    for source in (folder, str(folder / "adapters.safetensors")):
        load_adapter_weights(run.model, source)
        assert run.evaluate().loss == loss


CONFLICTS = {
    "scale": ({"lora_parameters": {"scale": 2.0}}, "lora_parameters.scale", "7", "2"),
    "the default scale": ({"lora_parameters": {"scale": 20.0}}, "lora_parameters.scale", "7", "20"),
    "rank": ({"lora_parameters": {"rank": 8}}, "lora_parameters.rank", "3", "8"),
    "dropout": ({"lora_parameters": {"dropout": 0.0}}, "lora_parameters.dropout", "0.25", "0"),
    "keys": (
        {"lora_parameters": {"keys": ["q_proj"]}},
        "lora_parameters.keys",
        "self_attn.q_proj, mlp.up_proj",
        "q_proj",
    ),
    "target_modules": ({"target_modules": ["v_proj"]}, "lora_parameters.keys", "mlp.up_proj", "v_proj"),
    "every module": ({"lora_parameters": {"keys": None}}, "lora_parameters.keys", "mlp.up_proj", "every linear layer"),
    "layers": ({"num_layers": 2}, "num_layers", "1", "2"),
    "all layers": ({"num_layers": -1}, "num_layers", "1", "-1"),
    "type": ({"fine_tune_type": "lora"}, "fine_tune_type", "dora", "lora"),
    "full": ({"fine_tune_type": "full"}, "fine_tune_type", "dora", "full"),
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_a_conflicting_setting_is_refused_with_both_values(case, adapter, tiny_folder, tmp_path):
    settings, name, theirs, ours = CONFLICTS[case]
    message = refusal(
        lambda: run_of(tmp_path / "own", tiny_folder, resume_adapter_file=str(adapter[0]), **settings).step()
    )
    assert f"{name} is " in message
    in_adapter, here = message.split(f"{name} is ")[1].split(" in the adapter and ")
    assert theirs in in_adapter
    assert here.startswith(f"{ours} here")
    direct = RunConfig(resume_adapter_file=str(adapter[0]), model=str(tiny_folder), **settings)
    assert refusal(lambda: Run(direct).step()) == message


def test_given_settings_that_say_the_same_are_accepted(adapter, tiny_folder, tmp_path):
    folder, loss = adapter
    same = {**SETTINGS, "lora_parameters": {**SHAPE, "keys": ["self_attn.q_proj", "up_proj"]}}
    assert run_of(tmp_path / "own", tiny_folder, resume_adapter_file=str(folder), **same).evaluate().loss == loss
    every = trained(tmp_path / "every", tiny_folder)
    named = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = {"num_layers": 2, "target_modules": named, "resume_adapter_file": str(tmp_path / "every")}
    assert run_of(tmp_path / "c", tiny_folder, **settings).evaluate().loss == every.evaluate().loss


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize(("theirs", "ours"), [(2, -1), (-1, 2)])
@pytest.mark.matrix(every=6)
def test_all_layers_are_the_same_by_number_and_as_minus_1(theirs, ours, kind, tiny_folder, tmp_path):
    first = trained(tmp_path / "a", tiny_folder, fine_tune_type=kind, num_layers=theirs)
    settings = {"num_layers": ours, "resume_adapter_file": str(tmp_path / "a")}
    if kind == "full" and theirs == -1:  # the number leaves embeddings and norm out
        assert "num_layers" in refusal(lambda: run_of(tmp_path / "b", tiny_folder, **settings).step())
        return
    if kind == "full":
        assert "num_layers is 2 in the adapter and -1 here" in refusal(
            lambda: run_of(tmp_path / "b", tiny_folder, **settings).step()
        )
        return
    second = run_of(tmp_path / "b", tiny_folder, **settings)
    assert second.evaluate().loss == first.evaluate().loss
    assert second.config.num_layers == ours


def test_a_setting_changed_before_the_start_takes_the_shape_too(adapter, tiny_folder, tmp_path):
    run = run_of(tmp_path / "own", tiny_folder)
    run.set(resume_adapter_file=str(adapter[0]))
    assert run.evaluate().loss == adapter[1]
    given = run_of(tmp_path / "own", tiny_folder, lora_parameters={"scale": 20.0})
    assert "7 in the adapter and 20 here" in refusal(lambda: given.set(resume_adapter_file=str(adapter[0])))


@pytest.mark.parametrize("kind", ["lora", "dora", "full", "full of one layer"])
@pytest.mark.matrix(every=4)
def test_every_kind_of_adapter_continues_where_it_was(kind, tiny_folder, tmp_path):
    settings = {"fine_tune_type": kind.split()[0], **({"num_layers": 1} if "one" in kind else {})}
    first = trained(tmp_path / "a", tiny_folder, **settings)
    second = run_of(tmp_path / "b", tiny_folder, resume_adapter_file=str(tmp_path / "a"))
    assert second.evaluate().loss == first.evaluate().loss
    assert second.adapter_bytes() == first.adapter_bytes()


def test_dropout_of_an_adapter_does_not_keep_completions_from_being_trained(tiny_folder, tmp_path):
    trained(tmp_path / "a", tiny_folder, lora_parameters={"dropout": 0.1})
    for dropout in ({}, {"lora_parameters": {"dropout": 0.0}}):
        settings = {
            "method": "grpo",
            "data": tiny_prompts(8),
            "rewards": [lambda completion: float(len(completion))],
            "max_completion_length": 3,
        }
        run = run_of(tmp_path / "b", tiny_folder, resume_adapter_file=str(tmp_path / "a"), **settings, **dropout)
        assert run.config.lora_parameters.dropout == 0.0
        run.step()


def test_a_resume_and_a_fork_do_not_need_the_adapter_again(adapter, tiny_folder, tmp_path):
    shutil.copytree(adapter[0], tmp_path / "start")
    settings = {"resume_adapter_file": str(tmp_path / "start"), "data": "rows"}
    (tmp_path / "rows").mkdir()
    rows = "".join(json.dumps(row) + "\n" for row in tiny_rows(20))
    (tmp_path / "rows" / "train.jsonl").write_text(rows)
    settings["data"] = str(tmp_path / "rows")
    run = run_of(tmp_path / "b", tiny_folder, **settings)
    given = run_of(tmp_path / "b", tiny_folder, **{**settings, "resume_adapter_file": None}).config.replace(
        resume_adapter_file=settings["resume_adapter_file"]
    )
    run.step(2)
    run.checkpoint("pause")
    shutil.rmtree(tmp_path / "start")
    fork = run.fork(adapter_path=str(tmp_path / "fork"))
    for copy in ("c", "d"):  # a folder has one writer at a time
        shutil.copytree(tmp_path / "b", tmp_path / copy)
    resumed = Run.resume(tmp_path / "c")
    expected_config = Run.resume(tmp_path / "d", config=given)
    expected = run.fork(name="again", adapter_path=str(tmp_path / "again")).step(1).loss
    for other in (fork, resumed, expected_config):
        assert other.config.lora_parameters.scale == 7.0
        assert other.step(1).loss == pytest.approx(expected, abs=1e-6)


# What its adapter_config.json may hold


def test_an_adapter_of_mlx_lm_keeps_the_settings_in_its_file(tiny_folder, tmp_path):
    made = trained(tmp_path / "a", tiny_folder, lora_parameters={"rank": 4, "scale": 10.0})
    path = tmp_path / "a" / "adapter_config.json"
    of_mlx_lm = {
        "model": str(tiny_folder),
        "fine_tune_type": "lora",
        "num_layers": 16,
        "optimizer": "adam",
        "lora_parameters": {"rank": 4, "dropout": 0.0, "scale": 10.0},
        "seed": 0,
    }
    of_mlx_lm_lora = {**of_mlx_lm, "train_type": "lora", "num_layers": -1, "train_mode": "sft"}
    del of_mlx_lm_lora["fine_tune_type"]
    for described in ({**of_mlx_lm, "num_layers": 2}, {**of_mlx_lm, "num_layers": 0}, of_mlx_lm_lora):
        path.write_text(json.dumps(described))
        run = run_of(tmp_path / "b", tiny_folder, resume_adapter_file=str(tmp_path / "a"))
        assert run.evaluate().loss == made.evaluate().loss
        assert run.config.lora_parameters.keys is None
    path.write_text(json.dumps(of_mlx_lm))
    message = refusal(run_of(tmp_path / "b", tiny_folder, resume_adapter_file=str(tmp_path / "a")).step)
    assert "16" in message
    assert "2 layers" in message


def test_a_full_adapter_of_mlx_lm_changes_the_layers_alone(tiny_folder, tmp_path):
    trained(tmp_path / "a", tiny_folder, fine_tune_type="full", num_layers=2)
    path = tmp_path / "a" / "adapter_config.json"
    described = {"model": str(tiny_folder), "fine_tune_type": "full", "num_layers": -1, "lora_parameters": None}
    path.write_text(json.dumps(described))
    run = run_of(tmp_path / "b", tiny_folder, resume_adapter_file=str(tmp_path / "a"))
    assert run.config.num_layers == 2
    run.step()


BAD_CONFIGS = {
    "no JSON": "{",
    "a list": "[1]",
    "a rank in words": '{"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": "many", "scale": 1.0}}',
    "a rank of 0": '{"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 0, "scale": 1.0}}',
    "an unknown type": '{"fine_tune_type": "vera", "num_layers": 1, "lora_parameters": {"rank": 3, "scale": 1.0}}',
    "layers in words": '{"fine_tune_type": "dora", "num_layers": "all", "lora_parameters": {"rank": 3, "scale": 1.0}}',
    "keys of a kind": '{"num_layers": 1, "lora_parameters": {"rank": 3, "scale": 1.0, "keys": 5}}',
    "no scale": '{"fine_tune_type": "dora", "num_layers": 1, "lora_parameters": {"rank": 3, "dropout": 0.0}}',
    "nothing": "{}",
}


@pytest.mark.parametrize("setting", [START, REFERENCE])
@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_config_that_cannot_be_used_is_named_in_one_line(case, setting, copied, tiny_folder, tmp_path):
    folder = copied()
    (folder / "adapter_config.json").write_text(BAD_CONFIGS[case])
    message = refusal(lambda: run_of(tmp_path / "b", tiny_folder, method="dpo", **{setting: str(folder)}).step())
    assert message.startswith(f"{setting}: ")
    assert str(folder) in message


def test_without_a_config_the_scale_must_be_given(adapter, tiny_folder, tmp_path):
    folder, loss = adapter
    bare = tmp_path / "bare.safetensors"
    shutil.copy(folder / "adapters.safetensors", bare)
    shape = {**SETTINGS, "lora_parameters": {name: value for name, value in SHAPE.items() if name != "scale"}}
    message = refusal(lambda: run_of(tmp_path / "b", tiny_folder, resume_adapter_file=str(bare), **shape))
    assert "lora_parameters.scale" in message
    run = run_of(tmp_path / "b", tiny_folder, resume_adapter_file=str(bare), **SETTINGS)
    assert run.evaluate().loss == loss
    assert any("is not recorded" in note for note in run.trainer.notes)
    wrong = {**SETTINGS, "fine_tune_type": "lora"}
    message = refusal(run_of(tmp_path / "b", tiny_folder, resume_adapter_file=str(bare), **wrong).step)
    assert "fine_tune_type" in message


def test_the_config_of_a_numbered_file_lies_beside_it(tiny_folder, tmp_path):
    run = trained(tmp_path / "a", tiny_folder, save_every=2, **SETTINGS)
    path = tmp_path / "a" / "0000002_adapters.safetensors"
    for setting, method in ((START, "sft"), (REFERENCE, "dpo")):
        assert open_adapter(str(path), setting).config == tmp_path / "a" / "adapter_config.json"
        run_of(tmp_path / "b", tiny_folder, method=method, **{setting: str(path)}).step()
    started = run_of(tmp_path / "c", tiny_folder, resume_adapter_file=str(path))
    assert started.config.lora_parameters.scale == 7.0
    saved = {name: np.array(array).tobytes() for name, array in mx.load(str(path)).items()}
    assert started.adapter_bytes() == saved != run.adapter_bytes()


# Tensors


def spoiled(folder, change):
    weights = dict(mx.load(str(folder / "adapters.safetensors")))
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)


NAME = "model.layers.1.mlp.up_proj.lora_a"
SPOILS = {
    "mis-shaped": (lambda weights: weights.update({NAME: mx.zeros((5, 3))}), "(5, 3)"),
    "of another rank": (lambda weights: weights.update({NAME: mx.zeros((32, 4))}), "(32, 4)"),
    "unknown": (lambda weights: weights.update({"model.layers.0.mlp.up_proj.lora_a": weights[NAME]}), "layers.0.mlp"),
    "missing": (lambda weights: weights.pop(NAME), f"lacks {NAME}"),
    "whole numbers": (lambda weights: weights.update({NAME: mx.zeros((32, 3), mx.int32)}), "int32"),
    "no numbers": (lambda weights: weights.update({NAME: mx.full((32, 3), mx.nan)}), f"{NAME} (96 of 96 values"),
    "infinite": (lambda weights: weights.update({NAME: mx.full((32, 3), -mx.inf)}), f"{NAME} (96 of 96 values"),
}


@pytest.mark.parametrize("setting", [START, REFERENCE])
@pytest.mark.parametrize("case", SPOILS)
@pytest.mark.matrix
def test_tensors_that_do_not_belong_are_named(case, setting, copied, tiny_folder, tmp_path):
    change, words = SPOILS[case]
    folder = copied()
    spoiled(folder, change)
    message = refusal(run_of(tmp_path / "b", tiny_folder, method="dpo", **{setting: str(folder)}).step)
    assert message.startswith(f"{setting}: ")
    assert words in message
    assert "skip" not in message


@pytest.mark.parametrize("setting", [START, REFERENCE])
def test_files_that_are_no_adapter_are_refused(setting, copied, tiny_folder, tmp_path):
    folder = copied()
    whole = (folder / "adapters.safetensors").read_bytes()
    for content in (whole[:-40], whole[:100], b"", b"not safetensors at all", b"\x02\0\0\0\0\0\0\0{}"):
        (folder / "adapters.safetensors").write_bytes(content)
        message = refusal(lambda: run_of(tmp_path / "b", tiny_folder, method="dpo", **{setting: str(folder)}).step())
        assert str(folder / "adapters.safetensors") in message
    (folder / "adapters.safetensors").unlink()
    assert "no such file" in refusal(
        lambda: run_of(tmp_path / "own", tiny_folder, method="dpo", **{setting: str(folder)}).step()
    )


def test_an_adapter_in_half_precision_is_trained_in_the_precision_of_the_run(copied, tiny_folder, tmp_path):
    folder = copied()
    spoiled(folder, lambda weights: weights.update({name: array.astype(mx.float16) for name, array in weights.items()}))
    run = run_of(tmp_path / "b", tiny_folder, resume_adapter_file=str(folder))
    run.step()
    arrays = run.trainer.snapshot().arrays["parameters"].values()
    assert {array.dtype for array in arrays} == {mx.float32}


@pytest.mark.parametrize("setting", [START, REFERENCE])
@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_of_peft_that_is_no_lora_is_refused_by_name(setting, as_file, with_config, tiny_folder, tmp_path):
    folder = tmp_path / "peft"
    folder.mkdir()
    weights = {"base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_b": mx.zeros((4,))}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), weights)
    if with_config:
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "VERA", "r": 4}))
    source = folder / "adapter_model.safetensors" if as_file else folder
    message = refusal(lambda: run_of(tmp_path / "own", tiny_folder, method="dpo", **{setting: str(source)}).step())
    assert message.startswith(f"{setting}: {folder}")
    assert ("`peft_type: VERA`" if with_config else "has no adapter_config.json") in message


# Its own base


def test_an_adapter_of_another_base_is_named_and_can_be_allowed(adapter, tiny_folder, tmp_path):
    other = other_base(tiny_folder, tmp_path / "other")
    settings = {"model": str(other), "resume_adapter_file": str(adapter[0])}
    message = refusal(run_of(tmp_path / "b", tiny_folder, **settings).step)
    for word in (
        START,
        str(adapter[0]),
        str(tiny_folder),
        str(other),
        "--allow-changed model",
        "allow_changed=['model']",
    ):
        assert word in message
    refusal(run_of(tmp_path / "b", tiny_folder, allow_changed=["data"], **settings).step)
    run = run_of(tmp_path / "b", tiny_folder, allow_changed=["model"], **settings)
    run.step(2)
    assert any(str(tiny_folder) in note for note in run.trainer.notes)
    run.checkpoint("pause")
    assert Run.resume(tmp_path / "b", data=tiny_rows(20)).step().step == 3
    assert run.fork(adapter_path=str(tmp_path / "c")).step().step == 3


def test_the_same_weights_elsewhere_are_the_same_base(adapter, copied, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "moved")
    moved = {"model": str(tmp_path / "moved")}
    assert (
        run_of(tmp_path / "own", tiny_folder, resume_adapter_file=str(adapter[0]), **moved).evaluate().loss
        == adapter[1]
    )
    unmarked = str(copied(remove=["mlx_nb"]))
    assert run_of(tmp_path / "own", tiny_folder, resume_adapter_file=unmarked, **moved).evaluate().loss == adapter[1]


def test_other_weights_under_the_same_name_are_another_base(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "m")
    trained(tmp_path / "a", tmp_path / "m")
    shutil.rmtree(tmp_path / "m")
    other_base(tiny_folder, tmp_path / "m")
    message = refusal(run_of(tmp_path / "b", tmp_path / "m", resume_adapter_file=str(tmp_path / "a")).step)
    assert "have changed since" in message


def test_a_base_that_was_quantized_on_load_is_another_one(adapter, tiny_folder, tmp_path):
    message = refusal(run_of(tmp_path / "own", tiny_folder, resume_adapter_file=str(adapter[0]), load_in_bits=4).step)
    assert "`load_in_bits: null` in the adapter, `load_in_bits: 4` here" in message


@pytest.mark.parametrize("model", ["mlx-community/Another-4bit", "./elsewhere"])
def test_an_adapter_of_mlx_lm_made_on_another_model_is_named(model, copied, tiny_folder, tmp_path):
    folder = copied(remove=["mlx_nb"], model=model)
    run = run_of(tmp_path / "b", tiny_folder, resume_adapter_file=str(folder))
    assert f"`model: {model}` in the adapter" in refusal(run.step)
    run_of(tmp_path / "b", tiny_folder, resume_adapter_file=str(folder), allow_changed=["model"]).step()


def test_a_cell_and_the_command_line_can_allow_it(adapter, tiny_folder, tmp_path, shell, capsys):
    from mlx_nb.cli import main

    other = other_base(tiny_folder, tmp_path / "other")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(12)))
    text = f"model: {other}\ndata: train.jsonl\niters: 1\nresume_adapter_file: {adapter[0]}\n"
    shell.run_cell_magic("finetune", "--name a --wait --allow-changed model", text)
    assert (tmp_path / "adapters" / "a" / "adapters.safetensors").is_file()
    (tmp_path / "run.yaml").write_text(text)
    assert main(["train", "run.yaml", "--name", "b"]) == 1
    assert "--allow-changed model" in capsys.readouterr().err
    assert main(["train", "run.yaml", "--name", "b", "--allow-changed", "model"]) == 0
    assert Run.from_yaml(text, name="c", allow_changed=["model"]).step().step == 1


# The reference


@pytest.mark.long
def test_the_adapter_of_the_reference_counts_in_its_own_shape_and_base(adapter, tiny_folder, tmp_path):
    settings = {"method": "dpo", "reference_adapter": str(adapter[0])}
    ours = run_of(tmp_path / "a", tiny_folder, resume_adapter_file=str(adapter[0]), **settings)
    assert ours.evaluate().loss == pytest.approx(math.log(2), abs=1e-5)
    plain = run_of(tmp_path / "b", tiny_folder, lora_parameters={"rank": 2, "scale": 1.0}, **settings)
    assert abs(plain.evaluate().loss - math.log(2)) > 1e-3
    other = str(other_base(tiny_folder, tmp_path / "other"))
    message = refusal(run_of(tmp_path / "c", tiny_folder, model=other, **settings).step)
    assert message.startswith("reference_adapter: ")
    assert "--allow-changed model" in message
    run_of(tmp_path / "c", tiny_folder, model=other, allow_changed=["model"], **settings).step()
    run_of(tmp_path / "d", tiny_folder, model=other, reference_model=str(tiny_folder), **settings).step()


@pytest.mark.long
def test_a_full_adapter_can_be_the_reference(tiny_folder, tmp_path):
    trained(tmp_path / "a", tiny_folder, fine_tune_type="full")
    settings = {"method": "dpo", "resume_adapter_file": str(tmp_path / "a")}
    for given in ({}, {"reference_adapter": str(tmp_path / "a")}):
        run = run_of(tmp_path / "b", tiny_folder, **settings, **given)
        assert run.evaluate().loss == pytest.approx(math.log(2), abs=1e-5)
        assert run.step(2).loss != pytest.approx(math.log(2), abs=1e-4)


def test_weights_of_a_reference_model_that_are_no_numbers_are_named(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "other")
    weights = dict(mx.load(str(tmp_path / "other" / "model.safetensors")))
    weights["model.norm.weight"] = mx.full((32,), mx.nan)
    mx.save_safetensors(str(tmp_path / "other" / "model.safetensors"), weights)
    message = refusal(run_of(tmp_path / "own", tiny_folder, method="dpo", reference_model=str(tmp_path / "other")).step)
    assert "model.norm.weight (32 of 32 values" in message
    assert str(tmp_path / "other") in message


@pytest.mark.parametrize(
    "settings", [SETTINGS, {"fine_tune_type": "full"}, {"fine_tune_type": "full", "num_layers": 1}]
)
def test_mlx_lm_loads_what_a_run_saves(settings, tiny_folder, tmp_path):
    run = trained(tmp_path / "a", tiny_folder, **settings)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["mlx_nb"]["base"]["weights"]
    theirs, _ = mlx_lm.load(str(tiny_folder), adapter_path=str(tmp_path / "a"))
    tokens = mx.array([[5, 80, 17, 60]])
    np.testing.assert_allclose(np.array(theirs(tokens)), np.array(run.model(tokens)), atol=1e-5)


def test_the_name_of_a_run_in_place_of_its_folder_is_understood(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained("adapters/sft", tiny_folder)
    message = refusal(lambda: run_of("adapters/b", tiny_folder, resume_adapter_file="sft"))
    assert "Did you mean 'adapters/sft'?" in message


def test_an_adapter_is_an_error_of_the_model_kind(tiny_folder, tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        run_of(tmp_path / "own", tiny_folder, resume_adapter_file="nowhere").step()


# How many more


@pytest.mark.parametrize(
    ("left_out", "words"), [(1, "lacks {0}. It belongs"), (2, "lacks {0} and 1 more."), (3, "lacks {0} and 2 more.")]
)
def test_the_number_of_further_tensors_that_are_missing_is_right(left_out, words, adapter, tiny_folder, tmp_path):
    folder = tmp_path / "less"
    shutil.copytree(adapter[0], folder)
    weights = mx.load(str(folder / "adapters.safetensors"))
    missing = sorted(name for name in weights if not name.endswith("lora_a"))[:left_out]
    mx.save_safetensors(
        str(folder / "adapters.safetensors"), {name: weights[name] for name in weights if name not in missing}
    )
    run = run_of(tmp_path / "own", tiny_folder, resume_adapter_file=str(folder))
    assert words.format(missing[0]) in refusal(run.step)
