"""With packing a run takes the same rows and learns the same, by the setting, the rule and the model's own proof."""

from __future__ import annotations

import numpy as np
import pytest

from every_family import configuration, save_model, small_model
from method_runs import ROWS, e_share, run_of
from mlx_nb import Run
from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.examples.batches import pad, pad_pairs
from mlx_nb.data.examples.imitation import TokenizedExample
from mlx_nb.data.examples.preference import PreferenceExample
from mlx_nb.errors import ModelError
from mlx_nb.model.logprobs import TargetScorer
from mlx_nb.train.packing import packed_as_set, pays
from mlx_nb.train.reference_logprobs import ReferenceLogprobs
from mlx_nb.view.rows.batch import BatchDisplay
from tiny import VOCABULARY, tiny_model, tiny_pairs, tiny_rows

PLAIN = {"lora_parameters": {"rank": 4, "scale": 4.0}}


def example(length, seed=0, trained=1.0):
    mask = np.full(length, trained, np.float32)
    mask[0] = 0
    return TokenizedExample(np.random.default_rng(seed).integers(1, VOCABULARY, length).astype(np.int32), mask, seed)


def pair(prompt, *answers, row=0):
    chosen, rejected = (
        TokenizedExample(
            np.concatenate([prompt, answer]).astype(np.int32),
            np.repeat(np.array([0, 1], np.float32), (len(prompt), len(answer))),
            row,
        )
        for answer in answers
    )
    return PreferenceExample(chosen, rejected, len(prompt), row)


def drawn_pairs(count):
    random = np.random.default_rng(5)
    draw = lambda length: random.integers(1, VOCABULARY, length)  # noqa: E731
    return [pair(draw(20 + row), draw(3 + row), draw(5), row=row) for row in range(count)]


@pytest.mark.parametrize("method", ROWS)
@pytest.mark.matrix(every=6)
def test_a_packed_run_takes_the_same_rows_and_learns_the_same(method, tmp_path, tiny_folder):
    apart, packed = (
        run_of(method, tmp_path / str(packing), tiny_folder, packing=packing, **PLAIN) for packing in (False, True)
    )
    for _ in range(3):
        one, other = apart.step(), packed.step()
        assert any(batch.packed for batch in packed.trainer.next_batches()) or method == "grpo"
        assert (one.rows, one.tokens, one.target_tokens) == (other.rows, other.tokens, other.target_tokens)
        assert other.loss == pytest.approx(one.loss, rel=1e-4, abs=1e-5)
        assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-3)
        for (row, loss), (same_row, same_loss) in zip(one.row_losses, other.row_losses, strict=True):
            assert row == same_row
            assert same_loss == pytest.approx(loss, rel=1e-4, abs=1e-5)
    assert packed.evaluate().loss == pytest.approx(apart.evaluate().loss, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("method", ROWS)
@pytest.mark.matrix(every=6)
def test_a_packed_run_resumes_bit_for_bit(method, tmp_path, tiny_folder):
    def losses(run, count):
        return [(step.loss, step.gradient_norm, step.row_losses) for step in (run.step() for _ in range(count))]

    straight = run_of(method, tmp_path / "straight", tiny_folder, packing=True)
    expected = losses(straight, 6)
    first = run_of(method, tmp_path / "first", tiny_folder, packing=True)
    assert losses(first, 3) == expected[:3]
    first.checkpoint()
    del first
    resumed = Run.resume(tmp_path / "first", data=ROWS[method](24), namespace={"e_share": e_share})
    assert losses(resumed, 3) == expected[3:]


def test_auto_packs_what_saves_a_twentieth_of_the_positions():
    scorer = TargetScorer(tiny_model())
    uneven = pad([example(length, length) for length in (10, 40)])
    even = pad([example(length, length) for length in (40, 39)])
    prompt = np.arange(1, 31)
    asked = pad_pairs([pair(prompt, np.array([3, 4]), np.array([5, 6]))])
    assert [pays(batch, "auto") for batch in (uneven, even, asked)] == [True, False, True]
    assert [pays(batch, True) for batch in (uneven, even, asked)] == [True] * 3
    assert [pays(batch, False) for batch in (uneven, even, asked)] == [False] * 3
    assert packed_as_set(uneven, "auto", scorer).packed
    assert not packed_as_set(even, "auto", scorer).packed
    assert not packed_as_set(uneven, True, TargetScorer(small_model("gpt2"))).packed


def test_on_a_gpu_auto_packs_nothing(monkeypatch):
    monkeypatch.setattr("mlx_nb.train.packing.is_cpu", lambda: False)
    assert not pays(pad([example(10), example(40)]), "auto")
    assert pays(pad([example(40), example(40)]), True)


@pytest.fixture
def learned_positions(tmp_path, tiny_folder):
    return str(save_model(configuration("gpt2", 300), tmp_path / "model", tiny_folder))


def test_a_family_that_cannot_be_packed_is_trained_unpacked_and_reported(learned_positions, tmp_path):
    settings = {"model": learned_positions, "data": tiny_rows(6), "iters": 1, "adapter_path": str(tmp_path / "a")}
    run = Run(RunConfig.from_dict(settings))
    run.step()
    assert any(note.startswith("gpt2: rows are not packed") for note in run.trainer.notes)
    assert not any(batch.packed for batch in run.trainer.next_batches())


def test_packing_true_is_refused_by_name_where_it_is_not_the_same(learned_positions, tmp_path):
    settings = {"model": learned_positions, "data": tiny_rows(6), "packing": True, "adapter_path": str(tmp_path / "a")}
    with pytest.raises(ModelError, match=r"packing cannot be used with gpt2: .* Set packing: auto"):
        Run(RunConfig.from_dict(settings)).step()
    assert not (tmp_path / "a").exists()


def test_the_reference_computes_the_prompt_of_a_pair_once_and_gives_each_answer_its_own_numbers():
    scorer, seen = TargetScorer(tiny_model()), []
    assert scorer.can_pack
    own = scorer.at_targets
    scorer.at_targets = lambda inputs, *rest: seen.append(inputs.tokens_BT.size) or own(inputs, *rest)
    pairs = drawn_pairs(3)
    batch = pad_pairs(pairs)
    together = ReferenceLogprobs(lambda: scorer, "").fill(batch).token_values["reference"]
    assert sorted(seen) == sorted(one.prompt_length + (one.length - 2 * one.prompt_length) - 2 for one in pairs)
    apart = ReferenceLogprobs(lambda: scorer, "", False).fill(batch).token_values["reference"]
    assert np.allclose(together, apart, atol=1e-5)
    for index, one in enumerate(pairs):
        alone = ReferenceLogprobs(lambda: scorer, "").fill(pad_pairs([one])).token_values["reference"]
        width = alone.shape[1]
        assert np.array_equal(alone, together[[index, index + 3], :width])


def test_the_numbers_of_packed_pairs_are_read_again_from_disk(tmp_path):
    scorer, batch = TargetScorer(tiny_model()), pad_pairs(drawn_pairs(2))
    first = ReferenceLogprobs(lambda: scorer, "that")
    expected = first.fill(batch).token_values["reference"]
    first.save(tmp_path)

    def never():
        raise AssertionError("the reference is asked for again")

    second = ReferenceLogprobs(never, "that")
    second.load(tmp_path)
    assert np.array_equal(second.fill(batch).token_values["reference"], expected)


def test_the_batch_on_screen_says_where_each_segment_is(tmp_path, tiny_folder):
    pairs = [{**row, "prompt": "a long prompt that both answers have: " + row["prompt"]} for row in tiny_pairs(8)]
    run = run_of("dpo", tmp_path, tiny_folder, data=pairs, packing=True, grad_accumulation_steps=1, batch_size=1)
    (batch,) = run.trainer.next_batches()
    shared = next(at for at, (a, b) in enumerate(zip(*batch.tokens_BT)) if a != b)
    first, second = batch.lengths
    shown = BatchDisplay([batch], run.tokenizer)
    assert f"2 segments in one row of {first + second - shared} positions" in repr(shown)
    assert f"segment 0 at 0 to {first - 1}" in repr(shown)
    there = (
        f"segment 1 at {first} to {first + second - shared - 1}, its first {shared} tokens shared with an earlier one"
    )
    assert there in repr(shown)
    assert there in shown._repr_html_()
    assert "0% padding" in shown._repr_html_()
    assert "counts across a boundary" not in shown._repr_html_()
