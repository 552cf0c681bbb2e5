"""What a model cannot read is refused by number before it touches the model: ids without an embedding, positions."""

from __future__ import annotations

import importlib
import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from method_runs import ROWS, e_share, settings_for
from mlx_nb import Run, RunConfig
from mlx_nb.data.examples.limits import BeyondPositions, ModelLimits, OutsideVocabulary
from mlx_nb.errors import DataError
from mlx_nb.events import Question, RequestRefused, SampleGenerated, StepCompleted
from mlx_nb.model.limits import context_of, limits_by_name, limits_of
from tiny import save_tiny_model, tiny_rows

EXTRA = "<|tool|>"
LLAMA = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
}
GPT2 = {"n_ctx": 40, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 40, "layer_norm_epsilon": 1e-5}
GEMMA3N = {
    "model_type": "gemma3n_text",
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "intermediate_size": [64] * 4,
    "num_attention_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": 80,
    "num_key_value_heads": 1,
    "num_kv_shared_layers": 1,
    "vocab_size_per_layer_input": 64,
    "sliding_window": 16,
    "max_position_embeddings": 128,
    "rope_local_base_freq": 1e4,
    "rope_theta": 1e4,
    "final_logit_softcapping": 30.0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.0] * 4,
    "hidden_size_per_layer_input": 8,
    "altup_num_inputs": 2,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
    "laurel_rank": 4,
}


def family(name, **arguments):
    module = importlib.import_module(f"mlx_lm.models.{name}")
    return module.Model(module.ModelArgs.from_dict({"model_type": name, **arguments}))


# What a model can read


def test_limits_are_found_from_what_reaches_the_embeddings_and_nothing_is_left_behind():
    gpt2 = family("gpt2", vocab_size=77, **GPT2)
    before = [(path, id(module)) for path, module in gpt2.named_modules()]
    assert limits_of(gpt2) == ModelLimits(ids=77, targets=77, positions=40)
    assert [(path, id(module)) for path, module in gpt2.named_modules()] == before
    assert limits_of(family("llama", **LLAMA)) == ModelLimits(ids=64, targets=64)


def test_an_embedding_that_gets_only_some_ids_sets_no_limit():
    limits = limits_of(family("gemma3n", text_config=GEMMA3N), {"text_config": GEMMA3N})
    assert limits == ModelLimits(ids=80, targets=80, context=128)


@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_embedding_has_as_many_ids_as_rows(tied):
    model = family("llama", tie_word_embeddings=tied, **LLAMA)
    nn.quantize(model, group_size=32, bits=4)
    assert limits_of(model) == ModelLimits(ids=64, targets=64)


def test_an_output_with_fewer_rows_than_the_embedding_limits_what_is_trained_only():
    model = family("llama", tie_word_embeddings=False, **LLAMA)
    model.lm_head = nn.Linear(64, 60, bias=False)
    limits = limits_of(model)
    assert limits == ModelLimits(ids=64, targets=60)
    tokens = np.array([1, 62, 3])
    limits.require(tokens, np.array([0, 0, 1]))
    with pytest.raises(OutsideVocabulary, match=r"token 1 is 62 .* output has ids 0 to 59"):
        limits.require(tokens, np.array([0, 1, 1]))


@pytest.mark.parametrize("outside", [-1, 64, 2_000_000])
def test_ids_outside_are_refused_at_both_ends(outside):
    with pytest.raises(OutsideVocabulary, match=rf"token 2 is {outside} "):
        ModelLimits(ids=64).require(np.array([0, 63, outside]))


@pytest.mark.parametrize(
    ("description", "context"),
    [
        ({}, None),
        ({"max_position_embeddings": 2048}, 2048),
        ({"max_position_embeddings": 2048, "rope_scaling": None}, 2048),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 4.0}}, 8192),
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"factor": 8.0, "original_max_position_embeddings": 8192},
            },
            131072,
        ),
        ({"max_position_embeddings": 131072, "rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, 131072),
        ({"text_config": {"max_position_embeddings": 512}}, 512),
    ],
)
def test_the_context_is_what_the_model_was_made_for_after_scaling(description, context):
    assert context_of(description) == context


# Rows


@pytest.fixture(scope="module")
def foreign_folder(tmp_path_factory):
    """A tiny model whose tokenizer was given two tokens more than it has embeddings, the second far outside."""
    from transformers import AutoTokenizer

    folder = save_tiny_model(tmp_path_factory.mktemp("foreign"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [EXTRA]})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def short_folder(tmp_path_factory):
    """A gpt2 of 40 learned positions with the tiny tokenizer."""
    folder = save_tiny_model(tmp_path_factory.mktemp("short"))
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    mx.random.seed(0)
    model = family("gpt2", vocab_size=vocabulary, **GPT2)
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata={"format": "mlx"}
    )
    (folder / "config.json").write_text(
        json.dumps({**GPT2, "model_type": "gpt2", "vocab_size": vocabulary, "eos_token_id": 0})
    )
    return folder


def with_extra(row):
    """The row with the token in what the person says."""
    if "messages" in row:
        asked, *rest = row["messages"]
        return {**row, "messages": [{**asked, "content": f"{asked['content']} {EXTRA}"}, *rest]}
    return {**row, "prompt": f"{row['prompt']} {EXTRA}"}


def with_length(row, words):
    if "messages" in row:
        asked, *rest = row["messages"]
        return {**row, "messages": [{**asked, "content": " zq" * words}, *rest]}
    return {**row, "prompt": " zq" * words}


def run_of(method, folder, model, rows, **changes):
    settings = {"data": rows, "val_set_size": 0, "steps_per_eval": -1, "iters": 3, **changes}
    return Run(RunConfig.from_dict(settings_for(method, folder, model, **settings)))


@pytest.mark.parametrize("method", ["sft", "dpo", "orpo", "kto", "grpo"])
@pytest.mark.matrix(every=3)
def test_rows_with_a_token_that_the_model_does_not_have_are_left_out_by_number(method, tmp_path, foreign_folder):
    rows = ROWS[method](12)
    data = {"train": [with_extra(row) if n in (3, 7) else row for n, row in enumerate(rows)], "valid": rows[:4]}
    data["valid"][2] = with_extra(data["valid"][2])
    run = run_of(method, tmp_path, foreign_folder, data, batch_size=4, steps_per_eval=2)
    run.run()
    assert {split: [one.row for one in left] for split, left in run.left_out.items()} == {"train": [3, 7], "valid": [2]}
    assert all(f"row {one.row}: " in one.reason and "has ids 0 to 299" in one.reason for one in run.left_out["train"])
    seen = {row for event in run.history.events if isinstance(event, StepCompleted) for row in event.rows}
    assert seen.isdisjoint({3, 7})
    assert any("Left out of train: 2 rows. row 3: " in note for note in run.trainer.notes)
    finding = next(one for one in run.check().findings if one.kind == "outside_vocabulary")
    assert (finding.severity, finding.rows) == ("error", (3, 7))


def test_the_token_losses_of_such_a_row_are_refused_and_its_error_is_shown(tmp_path, foreign_folder):
    rows = tiny_rows(8)
    rows[5] = with_extra(rows[5])
    run = run_of("sft", tmp_path, foreign_folder, rows)
    view = run.rows()[5]
    assert "row 5: token " in view.error
    with pytest.raises(DataError, match=r"row 5: token .* has ids 0 to 299"):
        run.token_losses(view)
    assert np.isfinite(run.token_losses(run.rows()[4])[1:]).all()


def test_nothing_but_such_rows_is_one_line(tmp_path, foreign_folder):
    run = run_of("sft", tmp_path, foreign_folder, [with_extra(row) for row in tiny_rows(8)])
    with pytest.raises(DataError, match=r"no row of train can be trained\. The first: row 0: token "):
        run.run()
    assert {one.kind for one in run.check().findings} >= {"outside_vocabulary", "nothing_to_train"}


@pytest.mark.long
def test_a_smaller_reference_model_limits_the_rows(tmp_path, tiny_folder, foreign_folder):
    """The policy has an embedding for the token, the reference with the same tokenizer has none."""
    larger = tmp_path / "larger"
    shutil.copytree(foreign_folder, larger)
    weights = mx.load(str(larger / "model.safetensors"))
    table = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = mx.concatenate([table, table[:4]])
    mx.save_safetensors(str(larger / "model.safetensors"), weights, metadata={"format": "mlx"})
    description = json.loads((larger / "config.json").read_text())
    (larger / "config.json").write_text(json.dumps({**description, "vocab_size": 304}))
    assert limits_by_name(str(larger)).ids == 304
    rows = [with_extra(row) if n == 4 else row for n, row in enumerate(ROWS["dpo"](10))]
    assert not run_of("dpo", tmp_path / "a", larger, rows).trainer.notes[-1].startswith("Left out")
    run = run_of("dpo", tmp_path / "b", larger, rows, reference_model=str(foreign_folder))
    run.run()
    assert [one.row for one in run.left_out["train"]] == [4]


@pytest.mark.parametrize("method", ["sft", "dpo", "kto", "grpo"])
@pytest.mark.matrix(every=2)
def test_rows_beyond_learned_positions_are_left_out_by_number(method, tmp_path, short_folder):
    rows = [with_length(row, 30) if n in (2, 6) else row for n, row in enumerate(ROWS[method](10))]
    shape = {"max_completion_length": 6} if method == "grpo" else {}
    run = run_of(method, tmp_path, short_folder, rows, batch_size=4, **shape)
    run.run()
    assert [one.row for one in run.left_out["train"]] == [2, 6]
    assert all("learned 40 positions" in one.reason for one in run.left_out["train"])
    finding = next(one for one in run.check().findings if one.kind == "beyond_positions")
    assert finding.rows == (2, 6)


def test_rows_cut_to_the_learned_positions_are_trained(tmp_path, short_folder):
    rows = [{"text": "red green blue " * 12} for _ in range(8)]
    run = run_of("sft", tmp_path, short_folder, rows, max_seq_length=40)
    run.run()
    assert not run.left_out["train"]
    assert {len(example.tokens) for example in run.trainer.examples.train} == {40}


def test_a_completion_that_could_outgrow_the_positions_is_refused_before_it_is_sampled(tmp_path, short_folder):
    rows = ROWS["grpo"](8)
    run = run_of("grpo", tmp_path, short_folder, rows, max_completion_length=39, rewards=[e_share])
    with pytest.raises(DataError, match=r"an answer of 39, and the model has learned 40 positions"):
        run.run()


def test_rows_longer_than_the_model_was_made_for_are_trained_and_pointed_out(tmp_path, tiny_folder):
    folder = tmp_path / "rotary"
    shutil.copytree(tiny_folder, folder)
    description = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**description, "max_position_embeddings": 40}))
    rows = [with_length(row, 20) if n in (1, 5) else row for n, row in enumerate(tiny_rows(8))]
    run = run_of("sft", tmp_path / "run", folder, rows)
    run.run()
    assert not run.left_out["train"]
    assert any(
        "2 training rows are longer than the model's context length of 40 tokens" in note for note in run.trainer.notes
    )
    finding = next(one for one in run.check().findings if one.kind == "beyond_context")
    assert (finding.severity, finding.rows) == ("warning", (1, 5))
    scaled = {"rope_scaling": {"type": "linear", "factor": 4.0}, "max_position_embeddings": 40}
    (folder / "config.json").write_text(json.dumps({**description, **scaled}))
    assert not [
        one for one in run_of("sft", tmp_path / "b", folder, rows).check().findings if one.kind == "beyond_context"
    ]


# Generation


@pytest.mark.long
def test_prompts_that_the_model_cannot_read_are_refused_in_one_line(tmp_path, foreign_folder):
    run = run_of("sft", tmp_path, foreign_folder, tiny_rows(8), sample_prompts=[f"say {EXTRA}", "say red"])
    with pytest.raises(DataError, match=r"the prompt: token .* has ids 0 to 299"):
        run.generate(f"say {EXTRA}")
    with pytest.raises(DataError, match=r"prompt 1: token "):
        run.generate(["say red", f"say {EXTRA}"])
    answers = []
    run.ask(Question(f"say {EXTRA}", lambda text, done: answers.append((text, done))))
    events = list(run.events())
    assert "has ids 0 to 299" in answers[-1][0]
    assert answers[-1][1]
    refused = [event for event in events if isinstance(event, RequestRefused)]
    assert any(f"sample 'say {EXTRA}': the prompt: token " in event.error for event in refused)
    assert {event.prompt for event in events if isinstance(event, SampleGenerated)} == {"say red"}
    assert run.finished


def test_an_answer_ends_where_the_learned_positions_do(tmp_path, short_folder):
    run = run_of("sft", tmp_path, short_folder, tiny_rows(8))
    length = len(run.tokenizer.encode("say red"))
    long = run.generate("say red", max_tokens=500)
    assert len(run.tokenizer.encode(long)) <= 40 - length
    assert run.generate(["say red", "say blue"], max_tokens=500)[0] == long
    with pytest.raises(BeyondPositions, match=r"the model has learned 40 positions"):
        run.generate("red " * 100)
