"""The low-level client: tinker's words over the trainer, with the numbers of a run bit for bit."""

from __future__ import annotations

import asyncio
import inspect

import numpy as np
import pytest

from mlx_nb import Run, RunConfig
from mlx_nb.errors import CheckpointError, CommandError
from mlx_nb.experiments import client as tinker
from mlx_nb.experiments.client import types
from mlx_nb.model.trees import held_arrays
from tiny import tiny_rows


def client_of(folder, **options):
    service = tinker.ServiceClient(base_url="http://localhost:10610", api_key="none")
    return service.create_lora_training_client(base_model=str(folder), **{"rank": 4, "seed": 3, **options})


def datum_of(tokens, mask, **more):
    inputs = {"target_tokens": [int(one) for one in tokens[1:]], "weights": list(mask[1:]), **more}
    return types.Datum(model_input=types.ModelInput.from_ints([int(one) for one in tokens[:-1]]), loss_fn_inputs=inputs)


ANSWER = "red green"  # 8 target tokens with its end, so that the mean over four rows is exact
ROWS = [
    {"messages": [{"role": "user", "content": f"say {row}"}, {"role": "assistant", "content": ANSWER}]}
    for row in range(8)
]


@pytest.fixture
def run(tmp_path, tiny_folder):
    """A run with the settings of the client."""
    client = client_of(tiny_folder)
    return Run(
        RunConfig.from_dict(
            {
                "model": str(tiny_folder),
                "data": ROWS,
                "batch_size": 4,
                "iters": 4,
                "val_set_size": 0,
                "learning_rate": 1e-2,
                "optimizer": "adamw",
                "optimizer_config": {"betas": [0.9, 0.95], "eps": 1e-12},
                "weight_decay": 0.0,
                "grad_clip": None,
                "lr_schedule": {"name": "constant", "warmup": 0},
                "seed": 3,
                "lora_parameters": client.config.to_dict()["lora_parameters"],
                "adapter_path": str(tmp_path / "run"),
            }
        )
    )


def test_a_loop_of_ones_own_does_the_updates_of_a_run_bit_for_bit(tiny_folder, run):
    client = client_of(tiny_folder)
    assert client.result() is client
    examples = {example.row: example for example in run.trainer.examples.train}
    while not run.over:
        rows = run.trainer.next_rows()
        units = sum(float(examples[row].loss_mask.sum()) for row in rows)
        assert units == 32.0
        data = [datum_of(examples[row].tokens, examples[row].loss_mask / np.float32(units)) for row in rows]
        losses = {row: run.token_losses(run.rows("train")[row]) for row in rows}
        output = client.forward_backward(data, loss_fn="cross_entropy").result()
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        step = run.step()
        assert output.metrics["loss:sum"] == step.loss
        ours = client.weights()
        theirs = run.trainer.stepper.arrays()["parameters"]
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(np.array(ours[name]), np.array(theirs[name])) for name in ours)
        for row, one in zip(rows, output.loss_fn_outputs):
            scored = examples[row].loss_mask[1:] > 0
            logprobs = one["logprobs"].to_numpy()
            assert np.allclose(logprobs[scored], -losses[row][1:][scored], atol=1e-5)
            assert not logprobs[~scored].any()


def some_data(client, count=3):
    tokenizer = client.get_tokenizer()
    found = []
    for row in tiny_rows(count):
        tokens = tokenizer.encode(row["messages"][1]["content"] * 2, add_special_tokens=False)
        found.append(datum_of(tokens, [1.0] * len(tokens)))
    return found


def test_gradients_add_up_until_the_step_and_forward_changes_nothing(tiny_folder):
    one, other = client_of(tiny_folder), client_of(tiny_folder)
    data = some_data(one)
    before = one.forward(data, "cross_entropy").result()
    both = one.forward_backward(data, "cross_entropy").result()
    assert [out["logprobs"].data for out in before.loss_fn_outputs] == [
        out["logprobs"].data for out in both.loss_fn_outputs
    ]
    for datum in data:
        other.forward_backward([datum], "cross_entropy")
    norms = [
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result().metrics["grad_norm"] for client in (one, other)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    with pytest.raises(CommandError, match="Call forward_backward before optim_step"):
        one.optim_step()
    after = one.forward(data, "cross_entropy").result()
    assert after.metrics["loss:sum"] < before.metrics["loss:sum"]


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("importance_sampling", None, lambda ratio, lp, old, a: -ratio * a),
        ("ppo", None, lambda ratio, lp, old, a: -np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a)),
        (
            "ppo",
            {"clip_high_threshold": 1.5},
            lambda ratio, lp, old, a: -np.minimum(ratio * a, np.clip(ratio, 0.8, 1.5) * a),
        ),
        ("cispo", None, lambda ratio, lp, old, a: -np.clip(ratio, 0.8, 1.2) * a * lp),
        ("dro", {"beta": 0.1}, lambda ratio, lp, old, a: -(lp * a - 0.05 * (lp - old) ** 2)),
    ],
)
def test_policy_losses_are_as_they_are_written(tiny_folder, name, config, expected):
    client = client_of(tiny_folder)
    data = some_data(client)
    there = [one["logprobs"].to_numpy() for one in client.forward(data, "cross_entropy").result().loss_fn_outputs]
    random = np.random.default_rng(0)
    olds = [one + random.normal(0, 0.4, len(one)).astype(np.float32) for one in there]
    advantages = [random.normal(0, 1, len(one)).astype(np.float32) for one in there]
    data = [
        types.Datum(
            one.model_input, {"target_tokens": one.loss_fn_inputs["target_tokens"], "logprobs": old, "advantages": a}
        )
        for one, old, a in zip(data, olds, advantages)
    ]
    output = client.forward_backward(data, name, config).result()
    total = sum(expected(np.exp(lp - old), lp, old, a).sum() for lp, old, a in zip(there, olds, advantages))
    assert output.metrics["loss:sum"] == pytest.approx(total, rel=1e-4)
    client.optim_step(types.AdamParams(learning_rate=1e-4))
    if name != "cispo":  # whose ratio is a constant for the gradient, but not for its value
        assert client.forward(data, name, config).result().metrics["loss:sum"] < total


def test_a_function_of_the_logprobs_has_the_gradient_of_the_same_loss(tiny_folder):
    one, other = client_of(tiny_folder), client_of(tiny_folder)
    data = some_data(one)

    def nll(data, logprobs):
        return -sum(one.sum() for one in logprobs), {"rows": len(data)}

    output = one.forward_backward_custom(data, nll).result()
    expected = other.forward_backward(data, "cross_entropy").result()
    assert output.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], rel=1e-6)
    assert output.metrics["rows"] == 3.0
    norms = [client.optim_step().result().metrics["grad_norm"] for client in (one, other)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_a_saved_state_continues_bit_for_bit_and_clients_share_the_base(tiny_folder, tmp_path):
    client = client_of(tiny_folder)
    data = some_data(client)

    def update(client):
        client.forward_backward(data, "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-2, grad_clip_norm=1.0))

    update(client)
    path = client.save_state("half").result().path
    assert path == str(tmp_path / "adapters" / "half")
    with pytest.raises(CheckpointError, match="has a state already"):
        client.save_state("half")
    update(client)
    service = tinker.ServiceClient()
    other = service.create_training_client_from_state_with_optimizer(path)
    update(other)
    ours, theirs = client.weights(), other.weights()
    assert all(np.array_equal(np.array(ours[name]), np.array(theirs[name])) for name in ours)
    fresh = service.create_training_client_from_state(path)
    update(fresh)
    assert any(not np.array_equal(np.array(ours[name]), np.array(array)) for name, array in fresh.weights().items())
    frozen = [
        {id(array) for array in held_arrays(one.model)} - {id(a) for a in one.weights().values()}
        for one in (client, other)
    ]
    assert frozen[0] == frozen[1]
    with pytest.raises(CheckpointError, match="has no saved state"):
        client.load_state("nothing")


def test_it_samples_from_the_weights_as_they_were(tiny_folder, tmp_path):
    client = client_of(tiny_folder)
    data = some_data(client)
    prompt = types.ModelInput.from_ints(data[0].model_input.to_ints())
    params = types.SamplingParams(max_tokens=5, seed=1)
    sampler = client.save_weights_and_get_sampling_client()
    before = sampler.sample(prompt, 2, params).result()
    assert len(before.sequences) == 2
    assert [len(one.tokens) for one in before.sequences] == [len(one.logprobs) for one in before.sequences]
    path = client.save_weights_for_sampler("sampled").result().path
    for _ in range(3):
        client.forward_backward(data, "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-1))
    assert [one.tokens for one in sampler.sample(prompt, 2, params).result().sequences] == [
        one.tokens for one in before.sequences
    ]
    saved = tinker.ServiceClient().create_sampling_client(model_path=path)
    assert [one.tokens for one in saved.sample(prompt, 2, params).result().sequences] == [
        one.tokens for one in before.sequences
    ]
    logprobs = saved.compute_logprobs(prompt).result()
    assert logprobs[0] is None
    assert len(logprobs) == prompt.length
    with pytest.raises(CommandError, match="stop takes texts"):
        sampler.sample(prompt, 1, types.SamplingParams(stop=[]))

    async def awaited():
        return await sampler.sample(prompt, 1, params)

    assert len(asyncio.run(awaited()).sequences) == 1


def test_what_cannot_be_computed_is_refused_by_the_number_of_the_datum(tiny_folder):
    client = client_of(tiny_folder)
    good = some_data(client)[0]
    tokens = good.model_input.to_ints()
    for data, loss, words in (
        ([], "cross_entropy", "there are no data"),
        ([good], "cross_entropi", "Did you mean 'cross_entropy'"),
        ([good, types.Datum(good.model_input)], "cross_entropy", "datum 1: this loss needs 'target_tokens'"),
        ([good], "ppo", "datum 0: this loss needs 'logprobs'"),
        ([types.Datum(good.model_input, {"target_tokens": tokens[:-1]})], "cross_entropy", "target_tokens has"),
        ([types.Datum(good.model_input, {"target_tokens": tokens})], "cross_entropy", "must be the tokens that follow"),
        ([datum_of(tokens, [0.0] * len(tokens))], "cross_entropy", "nothing to learn"),
    ):
        with pytest.raises(CommandError, match=words):
            client.forward_backward(data, loss)
    with pytest.raises(CommandError, match="dro has no option 'betta'"):
        client.forward([good], "dro", {"betta": 1})
    with pytest.raises(CommandError, match="nothing would be trained"):
        client_of(tiny_folder, train_mlp=False, train_attn=False, train_unembed=False)
    only = client_of(tiny_folder, train_mlp=False, train_unembed=False)
    assert all(".self_attn." in name for name in only.weights())


def test_names_and_defaults_are_those_of_tinker():
    theirs = pytest.importorskip("tinker")
    for ours, other in (
        (types.AdamParams(), theirs.types.AdamParams()),
        (types.SamplingParams(), theirs.types.SamplingParams()),
    ):
        assert vars(ours) == other.model_dump()
    for kind in ("ServiceClient", "TrainingClient", "SamplingClient"):
        methods = {name: one for name, one in vars(getattr(tinker, kind)).items() if not name.startswith("_")}
        for name, method in methods.items():
            if (kind, name) in (
                ("TrainingClient", "weights"),
                *((one, "result") for one in ("TrainingClient", "SamplingClient")),
            ):
                continue
            there = inspect.signature(getattr(getattr(theirs, kind), name)).parameters
            for parameter in inspect.signature(method).parameters.values():
                assert parameter.name in there, (kind, name, parameter)
                assert parameter.default == there[parameter.name].default, (kind, name, parameter)
                assert parameter.kind == there[parameter.name].kind, (kind, name, parameter)
