"""What a family's passes bear is proved, and answers, rollouts and training keep to the proof."""

from __future__ import annotations

import gc
import warnings

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.models.cache import ChunkedKVCache

from families import FAMILIES, family_model, save_family
from mlx_nb import Run
from mlx_nb.config.run_config import RunConfig
from mlx_nb.errors import CommandError, DataError, ModelError
from mlx_nb.model import passes
from mlx_nb.model.loading import load_model
from mlx_nb.model.logprobs import TargetScorer
from mlx_nb.model.passes import SideBySide, cache_mismatch, side_by_side
from mlx_nb.model.reference_model import reference_scorer
from mlx_nb.rollouts.generation import generate_texts, stream_text
from mlx_nb.rollouts.sampling import SamplingSettings, sample_each, sample_groups
from samples import assert_training_agrees, sampled
from tiny import tiny_model, tiny_pairs, tiny_prompts, tiny_rows

EQUAL = ("afm7", "recurrent_gemma")
TRAINABLE = [family for family in FAMILIES if family not in ("gemma3n", "plamo3")]
# As strings of a tokenizer without much to merge: of one token, short, repeated, and longer than any window here.
PROMPTS = ["say red", "say green and then blue, and white after that", "say red", "a", "say amber twice"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_folder):
    """The folder of a family's model, made once."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def folder_of(family):
        if family not in made:
            made[family] = save_family(family, root / family, tiny_folder)
        return str(made[family])

    return folder_of


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return load_model(str(tiny_folder)).tokenizer


def random_prompts(*lengths):
    random = np.random.default_rng(sum(lengths))
    return [random.integers(1, 61, length).tolist() for length in lengths]


@pytest.fixture
def quiet():
    """A family that is named for generation is asked here all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def run_of(folder, **settings):
    return Run(RunConfig.from_dict({"model": folder, "data": tiny_rows(8), "iters": 2, "batch_size": 2, **settings}))


# Answers


@pytest.mark.usefixtures("quiet")
@pytest.mark.matrix(every=8)
def test_a_list_of_prompts_gets_what_each_gets_alone(family, folders):
    run = run_of(folders(family))
    together = run.generate(PROMPTS, max_tokens=12)
    assert together == [run.generate(prompt, max_tokens=12) for prompt in PROMPTS]
    assert together == [[*stream_text(run.model, run.tokenizer, prompt, 12)][-1] for prompt in PROMPTS]


@pytest.mark.parametrize("lengths", [(4, 14, 7, 1, 3, 2), (5, 5, 5), (1, 1), (20, 3)], ids=str)
@pytest.mark.matrix(every=32)
def test_rows_side_by_side_have_the_logprobs_of_each_alone(family, tokenizer, lengths):
    model = family_model(family)
    settings = SamplingSettings(max_tokens=14, temperature=0.0)
    prompts = random_prompts(*lengths)
    together = sample_each(model, tokenizer, prompts, settings, 0)
    for prompt, completion in zip(prompts, together, strict=True):
        [alone] = sample_each(model, tokenizer, [prompt], settings, 0)
        assert completion.tokens.tolist() == alone.tokens.tolist()
        np.testing.assert_allclose(completion.logprobs, alone.logprobs, atol=2e-5, rtol=0)


@pytest.mark.long
def test_the_adapter_is_on_or_off_for_a_list_as_for_one(folders):
    run = run_of(folders("lfm2"), learning_rate=0.05)
    base = run.generate(PROMPTS, max_tokens=10)
    run.run()
    trained = run.generate(PROMPTS, max_tokens=10)
    assert trained == [run.generate(prompt, max_tokens=10) for prompt in PROMPTS] != base
    assert run.generate(PROMPTS, max_tokens=10, base=True) == base
    assert [run.generate(prompt, max_tokens=10, base=True) for prompt in PROMPTS] == base
    run.trainer.close()


def test_an_answer_ends_before_the_end_token_alone_and_in_a_list(folders):
    run = run_of(folders("mamba"))
    free = run.generate(PROMPTS, max_tokens=12)
    said = [token for prompt in PROMPTS for token in run.tokenizer.encode(free[PROMPTS.index(prompt)])]
    run.tokenizer.eos_token_ids = {*run.tokenizer.eos_token_ids, max(set(said), key=said.count)}
    together = run.generate(PROMPTS, max_tokens=12)
    assert together != free
    assert together == [run.generate(prompt, max_tokens=12) for prompt in PROMPTS]
    assert together == [[*stream_text(run.model, run.tokenizer, prompt, 12)][-1] for prompt in PROMPTS]


def test_the_first_of_a_list_is_drawn_as_its_prompt_alone_and_repetitions_differ(folders):
    run = run_of(folders("llama"))
    answers = run.generate(["say red"] * 4, max_tokens=8, temperature=1.0, seed=3)
    assert len(set(answers)) == 4
    assert answers[0] == run.generate("say red", max_tokens=8, temperature=1.0, seed=3)
    assert answers == run.generate(["say red"] * 4, max_tokens=8, temperature=1.0, seed=3)


def test_no_prompts_give_no_answers_and_no_tokens_are_refused(folders):
    run = run_of(folders("llama"))
    assert run.generate([]) == []
    for prompts in ("say red", ["say red", "say blue"]):
        with pytest.raises(CommandError, match="cannot answer in 0 tokens"):
            run.generate(prompts, max_tokens=0)
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        sample_each(run.model, run.tokenizer, [[5], []], SamplingSettings(), 0)


class Chunked(llama.Model):
    """A model whose cache mlx-lm cannot merge."""

    def make_cache(self):
        return [ChunkedKVCache(64) for _ in self.layers]


def test_a_model_whose_cache_has_no_batch_form_answers_one_prompt_after_the_other(tokenizer):
    model = Chunked(tiny_model().args)
    assert side_by_side(model) is SideBySide.ONE_BY_ONE
    prompts, settings = random_prompts(4, 9, 1), SamplingSettings(max_tokens=8, temperature=0.0)
    answers = sample_each(model, tokenizer, prompts, settings, 0)
    for prompt, answer in zip(prompts, answers, strict=True):
        [alone] = sample_each(model, tokenizer, [prompt], settings, 0)
        assert answer.tokens.tolist() == alone.tokens.tolist()
        assert answer.logprobs.tobytes() == alone.logprobs.tobytes()


# Rollouts


@pytest.mark.parametrize("family", TRAINABLE)
@pytest.mark.parametrize("rows_at_once", [32, 4])
@pytest.mark.matrix(every=12)
def test_completions_are_recorded_with_the_logprobs_that_training_computes(family, tokenizer, rows_at_once):
    model = family_model(family)
    prompts = random_prompts(4, 11, 1, 11, 7)
    completions = sampled(model, tokenizer, prompts, group_size=3, rows_at_once=rows_at_once, max_tokens=10)
    assert [completion.prompt_index for completion in completions] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    assert_training_agrees(model, prompts, completions)


@pytest.mark.parametrize("family", ["mamba", "afm7"])
@pytest.mark.matrix(every=2)
def test_the_first_ratio_of_grpo_is_one(family, folders, tmp_path):
    run = run_of(
        folders(family),
        method="grpo",
        data=tiny_prompts(6),
        rewards=[lambda completions, **_: [float(len(one)) for one in completions]],
        group_size=3,
        max_completion_length=8,
        learning_rate=1e-12,
        adapter_path=str(tmp_path / "adapter"),
    )
    run.step()
    for _, _, ratios in run.log_ratios():
        np.testing.assert_allclose(ratios, 0.0, atol=1e-4)
    run.trainer.close()


def test_rows_of_other_length_never_grow_beside_each_other_where_that_is_not_proved(tokenizer, monkeypatch):
    model = family_model("afm7")
    assert side_by_side(model) is SideBySide.EQUAL_LENGTHS
    seen = []
    step = type(model).__call__

    def watched(self, inputs, cache=None):
        seen.append((inputs.shape, getattr(cache[0], "left_padding", None)))
        return step(self, inputs, cache)

    monkeypatch.setattr(type(model), "__call__", watched)
    sampled(model, tokenizer, random_prompts(3, 6, 3), group_size=2, max_tokens=6)
    widths = [shape[0] for shape, padding in seen if padding is not None]
    assert max(widths) == 4  # both groups of three tokens together
    assert all(not any(padding.tolist()) for _, padding in seen if padding is not None)


# The proof


@pytest.mark.matrix(every=3)
def test_what_a_family_supports_is_tested(family):
    model = family_model(family)
    assert side_by_side(model) is (SideBySide.EQUAL_LENGTHS if family in EQUAL else SideBySide.ANY_LENGTHS)
    assert (cache_mismatch(model) is None) == (family != "gemma3n")


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "lfm2", "afm7", "gemma3n"])  # experts are of single precision on a CPU)
@pytest.mark.matrix(every=3)
def test_half_precision_is_no_fault_and_hides_none(family, dtype):
    model = family_model(family)
    model.set_dtype(dtype)
    assert side_by_side(model) is (SideBySide.EQUAL_LENGTHS if family in EQUAL else SideBySide.ANY_LENGTHS)
    assert (cache_mismatch(model) is None) == (family != "gemma3n")


@pytest.mark.matrix(every=3)
def test_the_proof_leaves_the_model_its_modes_and_the_random_stream(family):
    model = family_model(family)
    model.train()
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = {name: np.array(array) for name, array in tree_flatten(model.parameters())}
    mx.random.seed(11)
    expected = mx.random.uniform().item()
    mx.random.seed(11)
    side_by_side(model), cache_mismatch(model)
    assert mx.random.uniform().item() == expected
    assert [module.training for module in model.modules()] == modes
    after = dict(tree_flatten(model.parameters()))
    assert all(np.array_equal(before[name], np.array(after[name])) for name in before)


def test_a_model_is_tried_once_and_let_go(monkeypatch):
    tried = []
    difference = passes._difference
    monkeypatch.setattr(passes, "_difference", lambda *both: tried.append(1) or difference(*both))
    model = family_model("llama")
    for _ in range(2):
        side_by_side(model), cache_mismatch(model)
        assert len(tried) == 4
    number = id(model)
    del model
    gc.collect()
    answers = side_by_side.__closure__
    assert all(number not in cell.cell_contents for cell in answers if isinstance(cell.cell_contents, dict))


def test_a_tie_that_rounding_turns_once_is_no_fault(monkeypatch):
    difference, first = passes._difference, iter([1.0, 1.0])
    monkeypatch.setattr(passes, "_difference", lambda *both: next(first, None) or difference(*both))
    model = family_model("llama")
    assert side_by_side(model) is SideBySide.ANY_LENGTHS
    first = iter([1.0])
    assert cache_mismatch(model) is None


# Training


@pytest.mark.long
def test_a_family_that_computes_differently_without_a_cache_is_refused_before_anything_is_moved(folders, tmp_path):
    folder = tmp_path / "adapter"
    earlier = run_of(folders("llama"), data=tiny_rows(8), adapter_path=str(folder))
    earlier.step()
    earlier.save()
    del earlier
    gc.collect()
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    assert "adapters.safetensors" in before
    for method, data in (("sft", tiny_rows(8)), ("dpo", tiny_pairs(8)), ("orpo", tiny_pairs(8))):
        run = run_of(folders("gemma3n"), method=method, data=data, adapter_path=str(folder))
        with pytest.raises(ModelError, match="gemma3n cannot be trained") as refused:
            run.step()
        assert "\n" not in str(refused.value)
        assert "lora_a" not in dict(tree_flatten(run.model.parameters()))
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.long
def test_a_family_that_computes_differently_beyond_its_window_is_refused_for_rows_that_long(folders, tmp_path):
    assert cache_mismatch(family_model("plamo3")) is None
    assert cache_mismatch(family_model("plamo3"), 6) is None
    assert cache_mismatch(family_model("llama"), 100) is None
    assert cache_mismatch(family_model("plamo3"), 7).startswith("past 6 tokens, its sliding window, its logits")
    settings = {"adapter_path": str(tmp_path / "adapter"), "batch_size": 1, "prompt_format": "raw"}
    short = [{"prompt": "ab", "completion": "c"}] * 4
    for method, rows in (("sft", tiny_rows(4)), ("dpo", tiny_pairs(4)), ("grpo", [{"prompt": "ab"}] * 4)):
        own = {"rewards": [lambda completions, **_: [0.0 for _ in completions]]} if method == "grpo" else {}
        with pytest.raises(ModelError, match=r"plamo3 cannot .* past 6 tokens.*max_seq_length"):
            run_of(folders("plamo3"), method=method, data=rows, **own, **settings).step()
        assert not (tmp_path / "adapter").exists()
    run = run_of(folders("plamo3"), data=short, **settings)
    run.step()
    run.trainer.close()


def test_it_is_named_in_the_notes_and_still_generates(folders):
    loaded = load_model(folders("gemma3n"))
    [note] = [note for note in loaded.notes if "gemma3n" in note]
    assert "without a cache" in note
    asked = {"max_tokens": 2, "temperature": 0.0, "seed": 0}
    with pytest.warns(UserWarning, match="gemma3n answers, but cannot be trained"):
        assert generate_texts(loaded.model, loaded.tokenizer, ["say red"], **asked)
    assert not any("llama" in note for note in load_model(folders("llama")).notes)


def test_it_is_refused_as_a_reference_too(folders):
    loaded = load_model(folders("llama"))
    config = RunConfig.from_dict({"model": folders("llama"), "method": "dpo", "reference_model": folders("gemma3n")})
    with pytest.raises(ModelError, match="gemma3n cannot be trained"):
        reference_scorer(config, loaded)


def test_a_model_without_a_cache_is_not_refused():
    class Plain(llama.Model):
        def __call__(self, inputs):
            return super().__call__(inputs)

    model = Plain(tiny_model().args)
    assert cache_mismatch(model) is None
    assert TargetScorer(model).model is model


def test_a_family_without_a_pass_here_is_refused_with_its_reason():
    class MetalOnly(llama.Model):
        def __call__(self, inputs, cache=None):
            raise RuntimeError("[metal_kernel] No Metal\nback-end.")

    with pytest.raises(ModelError, match=r"llama cannot be trained .*fails \(\[metal_kernel\] No Metal back-end"):
        TargetScorer(MetalOnly(tiny_model().args))


def test_a_group_is_still_refused_where_no_batch_can_be(tokenizer):
    with pytest.raises(ModelError, match="ChunkedKVCache has no batch form"):
        next(sample_groups(Chunked(tiny_model().args), tokenizer, [[5]], 2, SamplingSettings(), 0))
