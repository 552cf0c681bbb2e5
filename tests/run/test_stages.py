"""The next stage of training starts from a run's adapter, on the same base in memory, and nothing moves its start."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from mlx_nb import Run
from mlx_nb.errors import CommandError, ConfigError
from mlx_nb.model import shared_base
from mlx_nb.model.trees import named_arrays
from runs import rows_run
from tiny import tiny_pairs, tiny_prompts, tiny_rows

LORA = {"lora_parameters": {"rank": 3, "scale": 4.0, "keys": ["q_proj", "up_proj"]}, "learning_rate": 2e-2}


@pytest.fixture
def sft(tmp_path, tiny_folder):
    run = rows_run(tmp_path, tiny_folder, **LORA, prompt_format="chat", save_every=-1)
    run.step(4)
    return run


def base_arrays(run):
    return {
        name.replace(".linear.", "."): array
        for name, array in named_arrays(run.model.parameters())
        if ".lora_" not in name
    }


def reward(prompts, completions, **_):
    return [float(len(completion) % 3) for completion in completions]


@pytest.mark.long
def test_sft_then_dpo_then_grpo_on_one_base_that_is_loaded_once(sft, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the base is loaded again")

    monkeypatch.setattr(shared_base, "load_in_pieces", refuse)
    before = {name: np.array(array) for name, array in base_arrays(sft).items()}
    dpo = sft.next_stage("dpo", method="dpo", data=tiny_pairs(20), iters=3, learning_rate=2e-2, val_set_size=0)
    first = dpo.step()
    assert first.loss == pytest.approx(math.log(2), abs=1e-5)  # the reference is the SFT adapter
    dpo.run()
    grpo = dpo.next_stage(
        "grpo",
        method="grpo",
        data=tiny_prompts(8),
        iters=2,
        val_set_size=0,
        rewards=[reward],
        max_completion_length=6,
        learning_rate=2e-2,
    )
    grpo.run()
    for stage in (dpo, grpo):
        assert (stage.config.model, stage.config.prompt_format) == (sft.config.model, "chat")
        assert stage.config.lora_parameters.rank == 3
        ours, theirs = base_arrays(stage), base_arrays(sft)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(np.array(ours[name]), before[name]) for name in before)
    adapters = [run.adapter_bytes() for run in (sft, dpo, grpo)]
    assert adapters[0] != adapters[1] != adapters[2]
    assert sft.generate("say red", base=True, max_tokens=8) == grpo.generate("say red", base=True, max_tokens=8)


def test_a_stage_takes_no_memory_for_the_base(sft):
    stage = sft.next_stage("more", data=tiny_rows(20), iters=2, val_set_size=0)
    ours, theirs = dict(named_arrays(stage.model.parameters())), base_arrays(sft)
    shared = [name for name, array in ours.items() if array is theirs.get(name)]
    assert len(shared) == len(theirs)


@pytest.mark.long
def test_the_start_stays_what_it_was_when_the_source_trains_on(sft):
    stage = sft.next_stage("dpo", method="dpo", data=tiny_pairs(20), iters=4, learning_rate=2e-2, val_set_size=0)
    sft.step(2)
    sft.save()
    assert stage.step().loss == pytest.approx(math.log(2), abs=1e-5)
    folder = stage.config.resume_adapter_file
    assert folder.endswith("a.update-4")
    stage.checkpoint("pause")
    assert Run.resume(stage.folder, data=tiny_pairs(20)).step().step == 2
    again = sft.next_stage("again", data=tiny_rows(20), iters=2)
    assert again.config.resume_adapter_file.endswith("a.update-6")
    sft.rewind(to=4)
    assert sft.next_stage("third", data=tiny_rows(20), iters=2).config.resume_adapter_file == folder
    sft.set(learning_rate=1e-3)
    sft.step(2)
    assert sft.next_stage("fourth", data=tiny_rows(20), iters=2).config.resume_adapter_file.endswith("a.update-6-2")


def test_what_cannot_be_a_next_stage_is_a_one_line_error(sft, tmp_path, tiny_folder):
    with pytest.raises(CommandError, match="the next stage after run needs another name"):
        sft.next_stage("run", data=tiny_rows(20))
    with pytest.raises(ConfigError, match="both `resume_adapter_file` and a run to start from are given"):
        sft.next_stage("dpo", resume_adapter_file="x")
    other = rows_run(tmp_path, tiny_folder, adapter_path=str(tmp_path / "other"))
    with pytest.raises(CommandError, match="has no update yet"):
        other.next_stage("dpo", data=tiny_rows(20))


@pytest.mark.long
def test_a_cell_starts_from_a_run_or_from_its_folder(shell, tiny_folder, tmp_path):
    rows, pairs = tmp_path / "rows.jsonl", tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(20)))
    pairs.write_text("".join(json.dumps(row) + "\n" for row in tiny_pairs(20)))
    settings = "iters: 3\nlearning_rate: 2e-2\nval_set_size: 0\n"
    shell.run_cell_magic("finetune", "--name pirate", f"model: {tiny_folder}\ndata: {rows}\n{settings}")
    cell = f"method: dpo\ndata: {pairs}\n{settings}"
    shell.run_cell_magic("finetune", "--name second -o second --from pirate", cell)
    second = shell.user_ns["second"]
    assert second.config.resume_adapter_file.endswith("adapters/pirate.update-3")
    assert second.history.last_step.step == 3
    shell.run_line_magic("unload_ext", "mlx_nb")
    shell.run_line_magic("load_ext", "mlx_nb")
    shell.run_cell_magic("finetune", "--name third -o third --from pirate --paused", cell)
    assert shell.user_ns["third"].config.resume_adapter_file == second.config.resume_adapter_file
    with pytest.raises(CommandError, match=r"--from pirat: no run of this notebook is called that"):
        shell.run_cell_magic("finetune", "--name fourth --from pirat", cell)
