"""Run: the whole way from YAML and rows to an adapter, on a tiny model in a real folder."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

import mlx_nb
from mlx_nb.errors import CommandError, ConfigError, DataError, MlxNbError, ModelError, NonFiniteLoss
from mlx_nb.events import (
    CheckpointSaved,
    EvaluationCompleted,
    Progress,
    RunFinished,
    SampleGenerated,
    StepCompleted,
    Stop,
)
from tiny import tiny_rows


def make_run(tiny_folder, tmp_path, **settings):
    yaml = f"model: {tiny_folder}\ndata: rows\niters: 4\nlearning_rate: 1e-2\nadapter_path: {tmp_path / 'adapter'}"
    return mlx_nb.Run.from_yaml(yaml, namespace={"rows": settings.pop("rows", tiny_rows())}, **settings)


def test_a_run_trains_step_by_step_to_its_end(tiny_folder, tmp_path):
    run = make_run(tiny_folder, tmp_path)
    first = run.step()
    assert isinstance(first, StepCompleted)
    assert run.step_count == 1
    assert run.step(2).step == 3
    assert isinstance(run.run(), RunFinished)
    assert run.finished
    assert run.history["step"] == [1, 2, 3, 4]
    with pytest.raises(CommandError, match="finished"):
        run.step()


def test_run_until_stops_where_asked(tiny_folder, tmp_path):
    run = make_run(tiny_folder, tmp_path)
    run.run(until=3)
    assert run.step_count == 3


def test_a_missing_validation_split_is_held_out_and_reported(tiny_folder, tmp_path):
    run = make_run(tiny_folder, tmp_path)
    run.step()
    assert any("eld out" in note for note in run.history.started.notes)
    assert run.history.started.valid_rows > 0
    assert run.history.evaluations("valid")[0]["step"] == 0


def test_the_saved_adapter_gives_the_same_logits_through_mlx_lm(tiny_folder, tmp_path):
    from mlx_lm import load

    run = make_run(tiny_folder, tmp_path)
    run.run()
    theirs, _ = load(str(tiny_folder), adapter_path=str(run.folder))
    tokens = mx.array([[5, 6, 7, 8]])
    assert mx.allclose(theirs(tokens), run.model(tokens), atol=1e-5).item()
    saved = mx.load(str(run.folder / "adapters.safetensors"))
    assert {name: np.array(array).tobytes() for name, array in saved.items()} == run.adapter_bytes()


def test_an_adapter_of_an_earlier_run_is_moved_not_overwritten(tiny_folder, tmp_path):
    first = make_run(tiny_folder, tmp_path)
    first.run()
    kept = (first.folder / "adapters.safetensors").read_bytes()
    second = make_run(tiny_folder, tmp_path, seed=1)
    second.run()
    assert (tmp_path / "adapter.previous-1" / "adapters.safetensors").read_bytes() == kept
    assert any("previous-1" in note for note in second.history.started.notes)


def test_generate_leaves_the_run_and_the_users_randomness_alone(tiny_folder, tmp_path):
    plain, talked = (
        make_run(tiny_folder, tmp_path),
        make_run(tiny_folder, tmp_path, adapter_path=str(tmp_path / "b")),
    )
    for run in (plain, talked):
        for _ in range(3):
            run.step()
            if run is talked:
                stream = mx.random.state[0].tolist()
                run.generate("say red", max_tokens=4, temperature=1.0)
                assert mx.random.state[0].tolist() == stream
    assert plain.history["loss"] == talked.history["loss"]
    assert plain.adapter_bytes() == talked.adapter_bytes()


@pytest.mark.long
def test_base_answers_are_those_of_the_untrained_model(tiny_folder, tmp_path):
    run = make_run(tiny_folder, tmp_path, iters=30, learning_rate=5e-2)
    before = run.generate("say red", max_tokens=8)
    run.run()
    assert run.generate("say red", max_tokens=8, base=True) == before
    assert run.generate("say red", max_tokens=8) != before


@pytest.mark.long
def test_many_prompts_are_answered_as_each_one_alone(tiny_folder, tmp_path):
    run = make_run(tiny_folder, tmp_path, iters=20, learning_rate=3e-2)
    run.run()
    prompts = ["say red 1", "say blue", [{"role": "user", "content": "say green 4"}]]
    assert run.generate(prompts, max_tokens=6) == [run.generate(prompt, max_tokens=6) for prompt in prompts]


def test_a_changed_learning_rate_is_used_and_recorded(tiny_folder, tmp_path):
    run = make_run(tiny_folder, tmp_path, lr_schedule="constant", warmup=0)
    run.step()
    run.set(learning_rate=1e-3)
    assert run.step().learning_rate == 1e-3
    with pytest.raises(ConfigError, match="cannot change during a run"):
        run.set(batch_size=2)
    with pytest.raises(ConfigError, match="Did you mean 'learning_rate'"):
        run.set(learnin_rate=1)
    with pytest.raises(ConfigError, match="above 0"):
        run.set(learning_rate=-1.0)


def test_a_row_shows_its_tokens_and_mask_before_anything_is_trained(tiny_folder, tmp_path):
    run = make_run(tiny_folder, tmp_path)
    view = run.rows("train")[0]
    trained = view.conversation.tokens[view.conversation.loss_mask > 0]
    answer = view.content.messages[-1]["content"]
    assert run.tokenizer.decode(trained.tolist()).strip() == f"{answer}<|end|>"
    assert run.step_count == 0


def test_rows_that_cannot_be_trained_are_left_out_by_number(tiny_folder, tmp_path):
    rows = tiny_rows()
    rows[3] = {"messages": [{"role": "user", "content": "no answer"}]}
    rows[5] = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]}
    run = make_run(tiny_folder, tmp_path, rows=rows, val_set_size=0)
    run.step()
    assert [left.row for left in run.left_out["train"]] == [3, 5]
    assert all(left.reason.startswith(f"row {left.row}: ") for left in run.left_out["train"])
    assert run.history.started.train_rows == len(rows) - 2


def test_a_malformed_row_among_good_ones_is_left_out_by_number(tiny_folder, tmp_path):
    rows = tiny_rows()
    rows[4] = {"question": "what shape is this?"}
    run = make_run(tiny_folder, tmp_path, rows=rows, val_set_size=0)
    run.step()
    assert [left.row for left in run.left_out["train"]] == [4]
    assert "row 4" in run.left_out["train"][0].reason


def test_truncation_drops_a_row_with_nothing_left_and_says_so(tiny_folder, tmp_path):
    rows = [
        *tiny_rows(),
        {"messages": [{"role": "user", "content": "x " * 100}, {"role": "assistant", "content": "y"}]},
    ]
    run = make_run(tiny_folder, tmp_path, rows=rows, val_set_size=0, max_seq_length=60)
    run.step()
    assert [left.row for left in run.left_out["train"]] == [24]
    assert "max_seq_length=60" in run.left_out["train"][0].reason
    strict = make_run(tiny_folder, tmp_path, rows=rows, val_set_size=0, max_seq_length=60, truncate="error")
    with pytest.raises(DataError, match="row 24"):
        strict.step()


def test_a_broken_listener_never_touches_training(tiny_folder, tmp_path):
    run = make_run(tiny_folder, tmp_path)
    seen = []

    def broken(event):
        seen.append(event)
        raise RuntimeError("view died")

    run.listen(broken)
    assert isinstance(run.run(), RunFinished)
    assert [event for event in seen if not isinstance(event, Progress | CheckpointSaved)] == list(run.history.events)


def test_the_test_split_is_measured_on_request(tiny_folder, tmp_path):
    rows = {"train": tiny_rows(12), "validation": tiny_rows(6), "test": tiny_rows(8)}
    run = make_run(tiny_folder, tmp_path, rows=rows, test=True)
    run.run()
    assert run.history.evaluations("test")[0]["rows"] == 8
    assert isinstance(run.evaluate("valid"), EvaluationCompleted)


def test_a_test_without_rows_for_it_is_refused_before_training(tiny_folder, tmp_path):
    run = make_run(tiny_folder, tmp_path, test=True)
    with pytest.raises(DataError, match="`test: true`, but these data have no test split"):
        run.step()


def test_a_run_that_explodes_raises_and_names_rows(tiny_folder, tmp_path):
    run = make_run(tiny_folder, tmp_path, optimizer="sgd", learning_rate=1e30, grad_clip=None, warmup=0, iters=20)
    with pytest.raises(NonFiniteLoss, match="rows"):
        run.run()
    assert all(np.isfinite(np.frombuffer(data, np.float32)).all() for data in run.adapter_bytes().values())


BAD_RUNS = {
    "no such model folder": ({"model": "./no/such/folder"}, ModelError, "no/such/folder"),
    "a model alias with a typo": ({"model": "smollm2-135"}, ModelError, "smollm2-135m"),
    "no such data file": ({"data": "rows.jsonl"}, DataError, "rows.jsonl"),
    "an unknown variable": ({"data": "rowz"}, DataError, "rows"),
    "no such adapter": ({"resume_adapter_file": "nowhere"}, ModelError, "nowhere"),
    "an unknown module": ({"target_modules": ["q_prj"]}, ConfigError, "q_proj"),
    "more layers than there are": ({"num_layers": 9}, ConfigError, "2 layers"),
    "an optimizer argument it does not take": ({"optimizer_config": {"betaz": 1}}, ConfigError, "betaz"),
    "a quantized full fine-tune": ({"load_in_bits": 4, "fine_tune_type": "full"}, MlxNbError, "quantized"),
    "empty rows": ({"rows": []}, DataError, "rows"),
    "rows of no known shape": ({"rows": [{"question": "a", "reply": "b"}] * 4}, DataError, "question"),
}


@pytest.mark.parametrize("case", BAD_RUNS)
def test_bad_input_gives_one_clear_line(case, tiny_folder, tmp_path):
    settings, kind, hint = BAD_RUNS[case]
    with pytest.raises(kind) as caught:
        make_run(tiny_folder, tmp_path, **settings).step()
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_adapter_config_says_how_it_was_made(tiny_folder, tmp_path):
    run = make_run(tiny_folder, tmp_path, lora_parameters={"rank": 3, "keys": ["q_proj"]})
    run.run()
    written = json.loads((run.folder / "adapter_config.json").read_text())
    assert written["lora_parameters"] == {
        "rank": 3,
        "scale": 20.0,
        "dropout": 0.0,
        "keys": ["self_attn.q_proj"],
    }
    assert written["mlx_nb"]["settings"]["iters"] == 4


def test_a_finished_run_can_be_given_more_updates_and_continues(tiny_folder, tmp_path):
    run = make_run(tiny_folder, tmp_path, iters=3, lr_schedule={"name": "constant", "warmup": 0})
    run.run()
    assert run.finished
    run.set(iters=5)
    ended = run.run()
    longer = make_run(tiny_folder, tmp_path / "b", iters=5, lr_schedule={"name": "constant", "warmup": 0})
    longer.run()
    assert (ended.step, run.state) == (5, "finished")
    assert run.history["loss"] == longer.history["loss"]
    assert run.adapter_bytes() == longer.adapter_bytes()
    with pytest.raises(ConfigError, match="The smallest value is 5"):
        run.set(iters=2)
    run.run()
    assert run.step_count == 5


@pytest.mark.long
def test_kept_prompts_are_answered_at_the_start_each_validation_and_the_end(tiny_folder, tmp_path):
    run = make_run(tiny_folder, tmp_path, iters=4, steps_per_eval=2, sample_prompts=["say red"], sample_tokens=3)
    run.run()
    samples = [event for event in run.history.events if isinstance(event, SampleGenerated)]
    assert [event.step for event in samples] == [0, 2, 4]
    assert {event.base_answer for event in samples} == {run.generate("say red", base=True, max_tokens=3)}
    assert samples[-1].answer == run.generate("say red", max_tokens=3)
    plain = make_run(tiny_folder, tmp_path / "plain", iters=4, steps_per_eval=2)
    plain.run()
    assert plain.adapter_bytes() == run.adapter_bytes()


def test_the_state_is_one_word_for_every_moment(tiny_folder, tmp_path):
    run = make_run(tiny_folder, tmp_path, iters=3)
    assert run.state == "built"
    run.step()
    assert run.state == "paused"
    run.run()
    assert run.state == "finished"
    other = make_run(tiny_folder, tmp_path / "b", iters=3)
    other.step()
    other.request(Stop())
    other.run()
    assert other.state == "stopped"


def test_a_report_is_one_page_with_everything(tiny_folder, tmp_path):
    run = make_run(tiny_folder, tmp_path, iters=3)
    run.run()
    page = run.report(tmp_path / "deep" / "report.html").read_text()
    assert "finished after update 3" in page
    assert "data:image/png" in page
    assert "Rows with the highest loss" in page


def test_a_setting_that_is_assigned_is_refused_with_the_call_that_changes_it(tiny_folder, tmp_path):
    run = make_run(tiny_folder, tmp_path)
    with pytest.raises(AttributeError, match=r"not an attribute: write `run\.set\(learning_rate=5e-05\)`"):
        run.learning_rate = 5e-5
    assert not hasattr(run, "learning_rate")
    run.note = "mine"  # any other name is the person's
    assert run.note == "mine"
