"""What is drawn follows the model's distribution, and its log-probabilities are those that training computes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import generate
from mlx_lm.models import llama, mamba
from mlx_lm.models.cache import ChunkedKVCache

from mlx_nb.config.run_config import RunConfig
from mlx_nb.errors import DataError, ModelError
from mlx_nb.model import adapters
from mlx_nb.model.loading import load_model
from mlx_nb.rollouts import sampling
from mlx_nb.rollouts.generation import prompt_tokens
from mlx_nb.rollouts.sampling import SamplingSettings, sample_groups
from mlx_nb.rollouts.token_sampling import draw_tokens
from samples import assert_training_agrees, sampled, training_logprobs
from tiny import tiny_model

PROMPTS = ["say red 0", "say green 1 and then blue", "say", "say amber 5 twice, then black"]


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    """The tiny model and tokenizer, and the tokens of prompts of different length."""
    loaded = load_model(str(tiny_folder))
    return loaded.model, loaded.tokenizer, [prompt_tokens(loaded.tokenizer, prompt) for prompt in PROMPTS]


@pytest.fixture(params=["drawn on the CPU", "drawn on the GPU"])
def device(request, monkeypatch):
    """Both ways through a step; the one for a GPU computes on a CPU as well."""
    monkeypatch.setattr(sampling, "is_cpu", lambda: request.param == "drawn on the CPU")


def assert_same_bits(ones, others):
    for one, other in zip(ones, others, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.logprobs.tobytes() == other.logprobs.tobytes()
        assert (one.text, one.finished, one.prompt_index) == (other.text, other.finished, other.prompt_index)


def uniforms(count, seed=0):
    random = np.random.default_rng(seed)
    return random.integers(0, 1 << 23, (count, 2)).astype(np.float32) / (1 << 23)


def drawn(logits, count, as_mlx=False, **settings):
    """`count` draws from one row of logits."""
    array = mx.array if as_mlx else np.array
    logits_BV = array(np.tile(np.float32(logits), (count, 1)))
    tokens_B, logprobs_B = draw_tokens(logits_BV, array(uniforms(count)), **{"temperature": 1.0, **settings})
    return np.array(tokens_B), np.array(logprobs_B)


def probabilities(logits, temperature=1.0):
    scaled = np.float64(logits) / temperature
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


def chi_square(tokens, expected):
    """Per degree of freedom: near 1 when the tokens were drawn with the expected probabilities."""
    counts = np.bincount(tokens, minlength=len(expected))
    return float((((counts - len(tokens) * expected) ** 2) / (len(tokens) * expected)).sum() / (len(expected) - 1))


@pytest.mark.parametrize("as_mlx", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("vocabulary", [5, 256, 700])
@pytest.mark.matrix(every=18)
def test_tokens_come_as_often_as_the_softmax_says(vocabulary, temperature, as_mlx):
    logits = np.random.default_rng(vocabulary).normal(size=vocabulary)
    tokens, logprobs = drawn(logits, 20_000, as_mlx, temperature=temperature)
    expected = probabilities(logits, temperature)
    # Six standard deviations of a chi-square variable over its degrees of freedom.
    assert abs(chi_square(tokens, expected) - 1) < 6 * np.sqrt(2 / (vocabulary - 1))
    np.testing.assert_allclose(logprobs, np.log(expected)[tokens], atol=1e-5)


@pytest.mark.parametrize("as_mlx", [False, True])
def test_top_k_draws_only_the_likeliest_and_keeps_their_odds(as_mlx):
    logits = np.random.default_rng(1).normal(size=300)
    tokens, logprobs = drawn(logits, 4000, as_mlx, top_k=2)
    first, second = np.argsort(-logits)[:2]
    assert set(tokens.tolist()) == {first, second}
    odds = probabilities(logits[[first, second]])[0]
    assert abs((tokens == first).mean() - odds) < 6 * np.sqrt(odds * (1 - odds) / 4000)
    np.testing.assert_allclose(logprobs, np.log(probabilities(logits))[tokens], atol=1e-5)


@pytest.mark.parametrize("as_mlx", [False, True])
@pytest.mark.parametrize(("vocabulary", "spread"), [(40, 1.0), (5000, 4.0), (5000, 0.3)])
@pytest.mark.matrix(every=6)
def test_top_p_draws_only_from_the_nucleus(vocabulary, spread, as_mlx):
    logits = spread * np.random.default_rng(2).normal(size=vocabulary)
    falling = np.argsort(-logits)
    mass = np.cumsum(probabilities(logits)[falling])
    size = int((mass < 0.6).sum()) + 1
    tokens, _ = drawn(logits, 3000, as_mlx, top_p=0.6)
    assert set(tokens.tolist()) <= set(falling[:size].tolist())
    assert (spread < 1) == (size > 1024)
    if size < 20:
        assert set(tokens.tolist()) == set(falling[:size].tolist())


def test_the_nucleus_is_that_of_what_top_k_left():
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    tokens, _ = drawn(logits, 2000, top_k=2, top_p=0.6)
    assert set(tokens.tolist()) == {0, 1}  # 0.4 of 0.7 is less than 0.6, so the second is needed as well
    tokens, _ = drawn(logits, 2000, top_k=2, top_p=0.55)
    assert set(tokens.tolist()) == {0}


def test_a_token_that_cannot_be_is_never_drawn():
    logits = np.array([-np.inf, 0.0, -np.inf, 1.0, -np.inf])
    tokens, logprobs = drawn(logits, 2000)
    assert set(tokens.tolist()) == {1, 3}
    assert np.isfinite(logprobs).all()


def test_numpy_and_mlx_draw_the_same_tokens():
    random = np.random.default_rng(3)
    logits_BV = (4 * random.normal(size=(64, 3000))).astype(np.float32)
    for settings in ({}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 50, "top_p": 0.5}, {"temperature": 0.0}):
        settings = {"temperature": 1.0, **settings}
        tokens_B, logprobs_B = draw_tokens(logits_BV, uniforms(64), **settings)
        mlx_tokens_B, mlx_logprobs_B = draw_tokens(mx.array(logits_BV), mx.array(uniforms(64)), **settings)
        assert tokens_B.tolist() == mlx_tokens_B.tolist()
        np.testing.assert_allclose(logprobs_B, np.array(mlx_logprobs_B), atol=1e-5)


def test_completions_come_in_order_group_by_group(tiny, device):
    completions = sampled(*tiny, group_size=3)
    assert [completion.prompt_index for completion in completions] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert len({tuple(completion.tokens.tolist()) for completion in completions}) == 12
    for completion in completions:
        assert completion.tokens.dtype == np.int32
        assert completion.logprobs.dtype == np.float32
        assert completion.tokens.shape == completion.logprobs.shape


@pytest.mark.matrix(every=2)
def test_behavior_logprobs_are_those_that_training_computes(tiny, device):
    model, tokenizer, prompts = tiny
    assert_training_agrees(model, prompts, sampled(model, tokenizer, prompts))


def test_behavior_logprobs_are_those_of_the_whole_distribution_at_its_temperature(tiny):
    model, tokenizer, prompts = tiny
    for completion in sampled(model, tokenizer, prompts, temperature=0.6, top_k=7, top_p=0.9):
        prompt = prompts[completion.prompt_index]
        tokens = [*prompt, *completion.tokens.tolist()]
        logits_TV = np.array(model(mx.array([tokens[:-1]]))[0])[len(prompt) - 1 :]
        for logits, token, logprob in zip(logits_TV, completion.tokens, completion.logprobs, strict=True):
            assert logprob == pytest.approx(np.log(probabilities(logits, 0.6))[token], abs=1e-4)
            assert token in np.argsort(-logits)[:7]


@pytest.mark.matrix(every=2)
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tiny, device):
    once, again, other = (sampled(*tiny, seed=seed) for seed in (5, 5, 6))
    assert_same_bits(once, again)
    assert [c.tokens.tolist() for c in once] != [c.tokens.tolist() for c in other]


@pytest.mark.parametrize("rows_at_once", [1, 3, 5])
@pytest.mark.matrix(every=6)
def test_how_many_rows_run_side_by_side_does_not_change_what_they_say(tiny, device, rows_at_once):
    settings = {"stop": ("a", "re"), "max_tokens": 30}
    together, apart = sampled(*tiny, **settings), sampled(*tiny, rows_at_once=rows_at_once, **settings)
    assert len({len(completion.tokens) for completion in together}) > 3
    for one, other in zip(together, apart, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_no_more_rows_than_allowed_are_computed_at_once(tiny):
    model, tokenizer, prompts = tiny
    rows = []

    class Watched(llama.Model):
        def __call__(self, inputs, cache=None):
            rows.append(inputs.shape[0])
            return super().__call__(inputs, cache=cache)

    watched = Watched(model.args)
    watched.update(model.parameters())
    sampled(watched, tokenizer, prompts, rows_at_once=6)
    assert max(rows) == 6


class Watched(llama.Model):
    """The same model; `read` has the tokens of each pass over several positions."""

    def __init__(self, model):
        super().__init__(model.args)
        self.update(model.parameters())
        self.__dict__["read"] = []

    def __call__(self, inputs, cache=None):
        if inputs.shape[1] > 1:
            self.__dict__["read"].append(inputs[0].tolist())
        return super().__call__(inputs, cache=cache)


class ForgetsPositions(Watched):
    """A model that reads several tokens after a cache as if they were the first ones."""

    def __call__(self, inputs, cache=None):
        if inputs.shape[1] > 1 and cache is not None:
            for one in cache:
                one.offset = 0
        return super().__call__(inputs, cache=cache)


def tiny_mamba():
    mx.random.seed(0)
    return mamba.Model(
        mamba.ModelArgs(
            model_type="mamba",
            vocab_size=61,
            hidden_size=32,
            intermediate_size=64,
            state_size=8,
            num_hidden_layers=2,
            conv_kernel=4,
            use_bias=False,
            use_conv_bias=True,
            time_step_rank=4,
        )
    )


@pytest.mark.parametrize("rows_at_once", [32, 5])
@pytest.mark.matrix(every=2)
def test_a_prompt_is_read_once_for_its_whole_group(tiny, rows_at_once):
    model, tokenizer, prompts = tiny
    watched = Watched(model)
    sampled(watched, tokenizer, prompts, group_size=8, rows_at_once=rows_at_once)
    assert watched.read == [prompt[:-1] for prompt in prompts]


PREFIX = [7, 3, 50, 11, 24] * 9
BRANCHES = [[1], [2, 3], [4, 5, 6, 7], [4, 5, 8], [4, 5, 8]]


def without_sharing(monkeypatch, model, tokenizer, prompts, **settings):
    with monkeypatch.context() as patched:
        patched.setattr(sampling, "_FEWEST_SHARED", 10**9)
        return sampled(model, tokenizer, prompts, **settings)


@pytest.mark.parametrize("rows_at_once", [32, 6])
@pytest.mark.parametrize("family", ["llama", "mamba"])
@pytest.mark.matrix
def test_a_shared_prefix_changes_no_token(tiny, device, monkeypatch, family, rows_at_once):
    model, tokenizer, _ = tiny
    model = model if family == "llama" else tiny_mamba()
    prompts, settings = [PREFIX + branch for branch in BRANCHES], {"rows_at_once": rows_at_once, "stop": ("a", "e")}
    shared = sampled(model, tokenizer, prompts, **settings)
    apart = without_sharing(monkeypatch, model, tokenizer, prompts, **settings)
    for one, other in zip(shared, apart, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    assert_training_agrees(model, prompts, shared)
    assert_same_bits(shared, sampled(model, tokenizer, prompts, **settings))


def test_a_shared_prefix_is_read_once_where_that_saves_more_than_its_proof(tiny):
    model, tokenizer, _ = tiny
    prompts = [PREFIX + branch for branch in BRANCHES]
    for some, expected in (
        (prompts, [PREFIX, [4, 5, 6], [4, 5], [4, 5]]),  # a pass over one token is not recorded
        (prompts[2:] * 2, [[*PREFIX, 4, 5]]),
        (prompts[:2], [PREFIX, [*PREFIX, 2]]),  # 45 tokens are not worth a proof
        ([*prompts[:3], [9, *PREFIX]], [PREFIX, [*PREFIX, 2], [*PREFIX, 4, 5, 6], [9, *PREFIX[:-1]]]),
        ([prompts[0]] * 4, [PREFIX]),
    ):
        watched = Watched(model)
        assert sampling.can_share_prefix(watched, 60)
        watched.read.clear()
        sampled(watched, tokenizer, some, max_tokens=2)
        assert watched.read == expected


def test_a_model_that_cannot_continue_from_a_prefix_reads_each_prompt_whole(tiny):
    model, tokenizer, _ = tiny
    prompts = [PREFIX + branch for branch in BRANCHES]
    wrong = ForgetsPositions(model)
    assert not sampling.can_share_prefix(wrong, 60)
    wrong.read.clear()
    completions = sampled(wrong, tokenizer, prompts, max_tokens=2)
    assert wrong.read == [prompt[:-1] for prompt in prompts]
    assert_training_agrees(model, prompts, completions)


def test_a_prefix_is_shared_within_the_sliding_window_only(tiny):
    arguments = tiny_model().args
    arguments.layer_types = ["sliding_attention", "full_attention"]
    arguments.sliding_window = 50
    model = llama.Model(arguments)
    assert sampling.can_share_prefix(model, 50)
    assert not sampling.can_share_prefix(model, 51)


@pytest.mark.matrix(every=2)
def test_greedy_says_what_mlx_lm_says(tiny, device):
    model, tokenizer, prompts = tiny
    for completion in sampled(model, tokenizer, prompts, group_size=2, temperature=0.0):
        expected = generate(model, tokenizer, prompts[completion.prompt_index], max_tokens=24)
        assert completion.text == expected
    assert_training_agrees(model, prompts, [completion])


@pytest.mark.matrix(every=2)
def test_the_end_token_is_kept_among_the_tokens_and_not_in_the_text(tiny, device):
    model, tokenizer, prompts = tiny
    completions = sampled(model, tokenizer, prompts, group_size=40, max_tokens=12)
    ended = [c for c in completions if c.tokens[-1] in tokenizer.eos_token_ids]
    assert ended
    for completion in ended:
        assert completion.finished
        assert completion.text == tokenizer.decode(completion.tokens[:-1].tolist())
    for completion in completions:
        assert not set(completion.tokens[:-1].tolist()) & tokenizer.eos_token_ids
        if completion not in ended:
            assert not completion.finished
            assert len(completion.tokens) == 12
            assert completion.text == tokenizer.decode(completion.tokens.tolist())


@pytest.mark.parametrize("stop", [("e",), ("u", "sa", "zzz"), ("é", "3")])
@pytest.mark.matrix(every=6)
def test_a_stop_string_ends_the_completion_at_the_token_that_completes_it(tiny, device, stop):
    model, tokenizer, prompts = tiny
    free = sampled(model, tokenizer, prompts, group_size=30)
    stop = (*stop, free[5].text[4:8])  # one that runs over several tokens, and is met at least once
    stopped = sampled(model, tokenizer, prompts, group_size=30, stop=stop)
    hits = 0
    for one, other in zip(stopped, free, strict=True):
        said = [token for token in other.tokens.tolist() if token not in tokenizer.eos_token_ids]
        texts = [tokenizer.decode(said[:end]) for end in range(1, len(said) + 1)]
        first = next((end for end, text in enumerate(texts, 1) if any(word in text for word in stop)), None)
        if first is None:
            assert (one.tokens.tolist(), one.text) == (other.tokens.tolist(), other.text)
            continue
        hits += 1
        text = texts[first - 1]
        assert one.finished
        assert one.tokens.tolist() == said[:first]
        assert one.text == text[: min(text.find(word) for word in stop if word in text)]
    assert hits > 0


def test_a_prompt_of_one_token_and_a_long_one_go_together(tiny, device, monkeypatch):
    model, tokenizer, _ = tiny
    monkeypatch.setattr(sampling, "_PROMPT_TOKENS_AT_ONCE", 16)
    prompts = [[7], np.random.default_rng(0).integers(5, 200, 50).tolist()]
    completions = sampled(model, tokenizer, prompts)
    assert_training_agrees(model, prompts, completions)
    assert_training_agrees(model, [[7]], sampled(model, tokenizer, [[7]]))


def test_a_prompt_without_tokens_is_refused_by_its_number(tiny):
    model, tokenizer, prompts = tiny
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        next(sample_groups(model, tokenizer, [prompts[0], []], 2, SamplingSettings(), 0))


def test_the_adapter_is_sampled_without_its_dropout_and_each_mode_is_given_back(tiny):
    _, tokenizer, prompts = tiny
    model = tiny_model(dims=32)
    prompts = [[token % 61 for token in prompt] for prompt in prompts]
    lora = {"rank": 4, "scale": 8.0, "dropout": 0.5}
    adapters.attach_adapter(model, RunConfig.from_dict({"lora_parameters": lora}))
    key = mx.random.key(0)
    weights = adapters.adapter_weights(model)
    model.load_weights(
        [(name, 0.2 * mx.random.normal(array.shape, key=key)) for name, array in weights.items()], strict=False
    )
    model.train()
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    completions = sampled(model, tokenizer, prompts)
    assert [module.training for module in model.modules()] == modes
    model.eval()
    assert_training_agrees(model, prompts, completions)
    adapters.detach_adapter(model)
    base = training_logprobs(model, prompts[0], completions[0])
    assert np.abs(base - completions[0].logprobs).max() > 0.1


@pytest.mark.parametrize("yields", [0, 1, 4, 5, 12])
def test_dropping_it_leaves_model_mode_and_random_stream(tiny, device, yields):
    model, tokenizer, prompts = tiny
    model.train()
    before = {name: np.array(array) for name, array in tree_flatten(model.parameters())}
    mx.random.seed(11)
    expected = [mx.random.uniform().item() for _ in range(yields + 1)]
    mx.random.seed(11)
    steps = sample_groups(model, tokenizer, prompts, 4, SamplingSettings(), 0)
    for step in range(yields):
        next(steps)
        assert model.training
        assert mx.random.uniform().item() == expected[step]
    steps.close()
    assert mx.random.uniform().item() == expected[yields]
    assert all(module.training for module in model.modules())
    after = dict(tree_flatten(model.parameters()))
    assert all(np.array_equal(before[name], np.array(after[name])) for name in before)
    model.eval()


def test_an_error_inside_a_step_gives_the_mode_back(tiny):
    model, tokenizer, prompts = tiny
    model.train()
    steps = sample_groups(model, tokenizer, [*prompts, ["not a token"]], 1, SamplingSettings(), 0)
    with pytest.raises(ValueError, match=r".*"):
        list(steps)
    assert all(module.training for module in model.modules())
    model.eval()


@pytest.mark.matrix(every=2)
def test_a_model_with_sliding_attention_is_sampled_exactly(tiny, device):
    _, tokenizer, prompts = tiny
    arguments = tiny_model().args
    arguments.layer_types = ["sliding_attention", "full_attention"]
    arguments.sliding_window = 8
    mx.random.seed(0)
    model = llama.Model(arguments)
    prompts = [[token % 61 for token in prompt] for prompt in prompts]
    completions = sampled(model, tokenizer, prompts, max_tokens=30, rows_at_once=6, stop=("a", "e"))
    assert max(len(completion.tokens) for completion in completions) > 8
    assert_training_agrees(model, prompts, completions)


@pytest.mark.matrix(every=2)
def test_a_recurrent_model_is_sampled_exactly(tiny, device):
    _, tokenizer, prompts = tiny
    model = tiny_mamba()
    prompts = [[token % 61 for token in prompt] for prompt in prompts]
    completions = sampled(model, tokenizer, prompts, rows_at_once=6, stop=("a", "e"))
    assert_training_agrees(model, prompts, completions)


def test_a_model_whose_cache_has_no_batch_form_is_refused_in_one_line(tiny):
    model, tokenizer, prompts = tiny

    class Chunked(llama.Model):
        def make_cache(self):
            return [ChunkedKVCache(8) for _ in self.layers]

    with pytest.raises(ModelError, match="ChunkedKVCache has no batch form") as refused:
        list(sample_groups(Chunked(model.args), tokenizer, prompts, 2, SamplingSettings(), 0))
    assert "\n" not in str(refused.value)


@pytest.mark.real_model
def test_the_real_model_is_sampled_as_it_is_trained(smollm2):
    loaded = smollm2()
    questions = ["What is the capital of France?", "Count to five.", "Say hello to a friend, in one short sentence."]
    prompts = [prompt_tokens(loaded.tokenizer, question) for question in questions]
    completions = sampled(loaded.model, loaded.tokenizer, prompts, max_tokens=48, rows_at_once=8, stop=("three",))
    for completion in completions:
        prompt = prompts[completion.prompt_index]
        inputs = mx.array([[*prompt, *completion.tokens.tolist()]])[:, :-1]
        logits_TV = np.array(loaded.model(inputs)[0])[len(prompt) - 1 :]
        expected = [
            np.log(probabilities(logits)[token]) for logits, token in zip(logits_TV, completion.tokens, strict=True)
        ]
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4, rtol=0)
    assert_training_agrees(loaded.model, prompts, completions)
    for completion in sampled(loaded.model, loaded.tokenizer, prompts, group_size=1, temperature=0.0):
        expected = generate(loaded.model, loaded.tokenizer, prompts[completion.prompt_index], max_tokens=24)
        assert completion.text == expected
