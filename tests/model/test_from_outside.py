"""Promises about loading, kept as a person sees them: through `Run` and its events alone."""

from __future__ import annotations

import gc
import time

import numpy as np
import pytest

from mlx_nb import Run, RunConfig
from mlx_nb.events import Progress, StepCompleted
from tiny import tiny_rows


def run_of(folder, model, rows, **settings):
    values = {"model": str(model), "data": rows, "iters": 1, "val_set_size": 0, "adapter_path": str(folder / "a")}
    return Run(RunConfig.from_dict({**values, **settings}))


def weights_of(run):
    from mlx.utils import tree_flatten

    return {name: np.array(array) for name, array in tree_flatten(run.model.parameters())}


@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
@pytest.mark.matrix(every=3)
def test_a_converted_model_that_is_damaged_in_the_cache_is_made_again(tmp_path, gguf_file, monkeypatch, damage):
    monkeypatch.setenv("MLX_NB_CACHE", str(tmp_path / "cache"))
    whole = weights_of(run_of(tmp_path, gguf_file, tiny_rows()))
    gc.collect()  # or the next run would have the base of the first one
    (weights,) = (tmp_path / "cache").rglob("*.safetensors")
    content = weights.read_bytes()
    if damage == "gone":
        weights.unlink()
    else:
        weights.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    again = weights_of(run_of(tmp_path, gguf_file, tiny_rows()))
    assert again.keys() == whole.keys()
    assert all(np.array_equal(again[name], whole[name]) for name in whole)
    assert weights.read_bytes() == content


@pytest.mark.long
def test_tokenizing_many_rows_gives_way_and_says_how_far_it_is(tmp_path, tiny_folder):
    rows = [{**row, "number": number} for number, row in enumerate(tiny_rows(4000))]
    reported = []
    for event in run_of(tmp_path, tiny_folder, rows).events():
        if isinstance(event, StepCompleted):
            break
        if isinstance(event, Progress):
            reported.append((event.what, event.done, event.total))
    done = [done for what, done, total in reported if what == "tokenizing train" and total == 4000]
    assert len(done) >= 3
    assert done == sorted(done)


@pytest.mark.long
def test_a_conversation_costs_as_much_as_it_is_long(tmp_path, tiny_folder):
    def seconds(messages):
        turns = [{"role": ("user", "assistant")[turn % 2], "content": f"say {turn}"} for turn in range(messages)]
        run = run_of(tmp_path, tiny_folder, [{"messages": turns}] * 2, max_seq_length=10**6)
        rows, _ = run.rows("train"), run.tokenizer
        begun = time.process_time()
        assert len(rows[0].conversation.tokens) > 5 * messages
        return time.process_time() - begun

    seconds(40)
    assert min(seconds(1600) for _ in range(2)) < 8 * min(seconds(400) for _ in range(2))
