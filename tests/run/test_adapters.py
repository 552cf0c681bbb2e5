"""Several adapters on one base: loaded, compared, merged and dropped, while the base stays what it is, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_nb
from fixed_llama import TOKENS, write_fixed_llama
from mlx_nb.errors import CommandError, ModelError
from mlx_nb.model import adapters, shared_base
from mlx_nb.model.adapter_files import START, open_adapter, shape_of
from mlx_nb.model.loading import load_model, load_skeleton
from mlx_nb.model.merging import Part, merged
from mlx_nb.model.randomness import random_stream
from mlx_nb.model.trees import named_arrays
from runs import rows_run
from tiny import save_tiny_model

GOLDENS = Path(__file__).parent.parent / "export" / "goldens"
PROMPTS = [[5, 17, 40, 3], [9, 200, 31]]


def saved(folder, tiny_folder, name, **settings):
    run = rows_run(folder, tiny_folder, adapter_path=str(folder / name), iters=4, learning_rate=2e-2, **settings)
    run.run()
    run.save()
    return run


@pytest.fixture
def runs(tmp_path, tiny_folder):
    """A run, and the folders of two other adapters, one in PEFT's format, with other ranks and modules."""
    one = saved(tmp_path, tiny_folder, "bees", lora_parameters={"rank": 2, "scale": 3.0, "keys": ["q_proj"]}, seed=1)
    two = saved(tmp_path, tiny_folder, "pirate", lora_parameters={"rank": 4, "scale": 2.0}, num_layers=1, seed=2)
    two.save(tmp_path / "peft", format="peft")
    del one, two
    run = saved(tmp_path, tiny_folder, "own", lora_parameters={"rank": 4, "scale": 2.0}, seed=3)
    return run, tmp_path / "bees", tmp_path / "peft"


def logits(model):
    return [np.array(model(mx.array([tokens]))[0]) for tokens in PROMPTS]


@pytest.mark.long
def test_adapters_share_the_base_that_is_loaded_once_and_off_is_the_base_to_the_bit(runs, tiny_folder, monkeypatch):
    run, bees, peft = runs
    alone = [mlx_nb.load(folder).generate("say red", max_tokens=8) for folder in (bees, peft)]
    fresh = logits(load_model(str(tiny_folder)).model)
    monkeypatch.setattr(shared_base, "load_in_pieces", None)
    run.adapters.load(bees)
    run.adapters.load(peft, name="pirate")
    run.adapters.merge("both", {"bees": 0.5, "pirate": 0.5, "run": 1.0})
    assert list(run.adapters) == ["run", "bees", "pirate", "both"]
    base = {id(array) for _, array in named_arrays(run.inputs.base_model.parameters())}
    for name in run.adapters:
        inside = [array for path, array in named_arrays(run.adapters[name].model.parameters()) if ".lora_" not in path]
        assert {id(array) for array in inside} == base
    assert [run.adapters[name].generate("say red", max_tokens=8) for name in ("bees", "pirate")] == alone
    answers = run.adapters.compare("say red", max_tokens=8)
    assert list(answers) == ["base", "run", "bees", "pirate", "both"]
    assert answers["bees"] == alone[0]
    assert answers["run"] == run.generate("say red", max_tokens=8)
    for name in run.adapters:
        assert run.adapters[name].generate("say red", base=True, max_tokens=8) == answers["base"]
    assert all(np.array_equal(one, other) for one, other in zip(logits(run.inputs.base_model), fresh))
    before = run.adapter_bytes()
    run.adapters.drop("bees")
    assert "bees" not in run.adapters
    assert run.adapter_bytes() == before


def delta(model, path):
    found = [module for name, module in adapters.adapter_modules(model) if name == path]
    if not found:
        return 0.0
    return found[0].scale * np.array(found[0]["lora_a"], np.float64) @ np.array(found[0]["lora_b"], np.float64)


@pytest.mark.long
def test_cat_is_exactly_the_weighted_sum_of_the_changes(runs, tmp_path):
    run, bees, peft = runs
    run.adapters.load(bees)
    run.adapters.load(peft, name="pirate")
    weights = {"bees": 0.7, "pirate": -0.25, "run": 1.5}
    both = run.adapters.merge("both", weights)
    assert both.config.lora_parameters.rank == 2 + 4 + 4
    parts = {name: run.adapters[name].model for name in weights}
    for path, _ in adapters.adapter_modules(both.model):
        expected = sum(weight * delta(parts[name], path) for name, weight in weights.items())
        assert np.abs(delta(both.model, path) - expected).max() < 1e-6
    folder = both.save(tmp_path / "merged")
    assert mlx_nb.load(folder).generate("say red", max_tokens=8) == both.generate("say red", max_tokens=8)


@pytest.mark.long
def test_one_adapter_is_converted_between_formats_to_the_bit(runs, tmp_path):
    _, bees, _ = runs
    there = mlx_nb.load(bees).save(tmp_path / "there", format="peft")
    back = mlx_nb.load(there).save(tmp_path / "back")
    one, other = (mx.load(str(folder / "adapters.safetensors")) for folder in (bees, back))
    assert one.keys() == other.keys()
    assert all(np.array_equal(np.array(one[name]), np.array(other[name])) for name in one)
    described = [json.loads((folder / "adapter_config.json").read_text()) for folder in (bees, back)]
    assert described[0]["lora_parameters"] == described[1]["lora_parameters"]


@pytest.mark.parametrize("how", ["cat", "linear"])
def test_a_merge_has_the_logits_of_the_merge_that_peft_makes(how, tmp_path):
    base = write_fixed_llama(tmp_path / "base", tied=True)
    parts = []
    for name, weight in (("lora", 0.7), ("lora-2", 0.5)):
        model, adapter = load_skeleton(base)[0], open_adapter(str(GOLDENS / name), START)
        config = shape_of(adapter, model)
        with random_stream(0):
            adapters.attach_adapter(model, config)
        adapters.load_adapter_weights(model, adapter)
        parts.append(Part(name, adapters.adapter_weights(model), config.lora_parameters.scale, -1, weight))
    result, model = merged(parts, how), load_skeleton(base)[0]
    adapters.attach_adapter(model, mlx_nb.RunConfig.from_dict(result.settings))
    model.load_weights(list(result.weights.items()), strict=False)
    model.eval()
    expected = np.array(json.loads((GOLDENS / "logits.json").read_text())[f"merged-{how}"])
    assert np.abs(np.array(model(mx.array([TOKENS]))[0]) - expected).max() < 1e-5


@pytest.mark.long
def test_what_cannot_be_loaded_or_merged_is_a_one_line_error(runs, tmp_path):
    run, bees, _ = runs
    run.adapters.load(bees)
    with pytest.raises(CommandError, match="an adapter is called bees already"):
        run.adapters.load(bees)
    with pytest.raises(CommandError, match=r"no adapter is called 'bee'. Did you mean 'bees'\?"):
        run.adapters["bee"]
    with pytest.raises(CommandError, match="run is the adapter that the others were loaded beside"):
        run.adapters.drop("run")
    with pytest.raises(CommandError, match=r"`linear` adds up matrices of one rank.*bees 2, run 4"):
        run.adapters.merge("both", {"bees": 1, "run": 1}, how="linear")
    with pytest.raises(CommandError, match="merged by cat or linear, not 'svd'"):
        run.adapters.merge("both", {"bees": 1}, how="svd")
    with pytest.raises(CommandError, match="a number other than 0, not 0"):
        run.adapters.merge("both", {"bees": 0})
    other = save_tiny_model(tmp_path / "model")
    weights = mx.load(str(other / "model.safetensors"))
    mx.save_safetensors(str(other / "model.safetensors"), {name: array + 0.1 for name, array in weights.items()})
    foreign = saved(tmp_path, other, "foreign", fine_tune_type="dora")
    with pytest.raises(ModelError, match="was trained on another base"):
        run.adapters.load(foreign.folder)
    with pytest.raises(CommandError, match="is a dora fine-tune; only LoRA adapters can be added up"):
        foreign.adapters.merge("more", {"run": 1.0})
    assert list(run.adapters) == ["run", "bees"]


@pytest.mark.long
def test_the_command_loads_compares_merges_saves_and_drops(shell, tiny_folder, tmp_path):
    rows = json.dumps({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]})
    (tmp_path / "rows.jsonl").write_text("\n".join([rows] * 8))
    cell = f"model: {tiny_folder}\ndata: {tmp_path / 'rows.jsonl'}\niters: 2\nval_set_size: 0\nlearning_rate: 2e-2\n"
    for name in ("bees", "own"):
        shell.run_cell_magic("finetune", f"--name {name} -o {name}", cell)

    def answer(line):
        return str(shell.run_line_magic("finetune", f"adapters {line}"))

    assert [line.split()[:2] for line in answer("").splitlines()] == [["adapter", "kind"], ["→", "own"]]
    assert "bees" in answer("load bees")
    assert "both" in answer("merge bees=0.5 own=0.5 --as both")
    own = shell.user_ns["own"]
    compared = answer('compare --max-tokens 4 "say red"')
    assert [line for line in compared.splitlines() if line in ("base:", "own:", "bees:", "both:")]
    assert own.adapters["both"].generate("say red", max_tokens=4) in compared
    answer("save both merged --format peft")
    assert sorted(file.name for file in Path("merged").glob("adapter*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert "both" not in answer("drop both")
    for line, words in {
        "load": "give the folder of one adapter",
        "merge bees=x --as y": "bees=x is not a name and a weight",
        "merge bees=1": "give the weights and a name",
        "save bees": "give the name of an adapter and a folder",
        "compare": "give a prompt",
        "list x": "takes nothing more",
    }.items():
        with pytest.raises(CommandError, match=words):
            answer(line)
