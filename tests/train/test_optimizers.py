"""Each optimizer against its paper, written out in NumPy at float64; above all what weight decay does."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_nb.config.run_config import RunConfig
from mlx_nb.train.optimizer import build_optimizer

DECAY = 0.1
RATES = (0.02, 0.05, 0.03)  # as a schedule would set them
SHAPES = {"wide": (4, 6), "tall": (9, 5), "idle": (6, 4), "vector": (7,)}


def adam(w, g, state, rate, step, decay=0.0):
    """Kingma and Ba, with bias correction."""
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    state["v"] = 0.999 * state.get("v", 0) + 0.001 * g**2
    mean, square = state["m"] / (1 - 0.9**step), state["v"] / (1 - 0.999**step)
    return w - rate * (mean / (np.sqrt(square) + 1e-8) + decay * w)


def adamw(w, g, state, rate, step):
    """Loshchilov and Hutter: decay beside the adaptive step."""
    return adam(w, g, state, rate, step, DECAY)


def sgd(w, g, state, rate, step):
    """The gradient of loss + decay / 2 * |w|^2."""
    return w - rate * (g + DECAY * w)


def lion(w, g, state, rate, step):
    """Chen et al., algorithm 2."""
    m = state.get("m", 0)
    state["m"] = 0.99 * m + 0.01 * g
    return w - rate * (np.sign(0.9 * m + 0.1 * g) + DECAY * w)


def adafactor(w, g, state, rate, step):
    """Shazeer and Stern, algorithms 4 and 5, with the given rate and decoupled decay."""
    beta = 1 - step**-0.8
    square = g**2 + 1e-30
    if g.ndim == 2:
        state["rows"] = beta * state.get("rows", 0) + (1 - beta) * square.mean(1)
        state["columns"] = beta * state.get("columns", 0) + (1 - beta) * square.mean(0)
        second = np.outer(state["rows"], state["columns"]) / state["rows"].mean()
    else:
        state["second"] = second = beta * state.get("second", 0) + (1 - beta) * square
    update = g / np.sqrt(second)
    update = update / max(1.0, np.sqrt((update**2).mean()))
    return w - rate * (update + DECAY * w)


def muon(w, g, state, rate, step):
    """Jordan et al.: Nesterov momentum, orthogonalized; decay beside it, as in Liu et al. (2502.16982)."""
    state["v"] = 0.95 * state.get("v", 0) + 0.05 * g
    update = 0.05 * g + 0.95 * state["v"]
    if update.ndim == 2:
        tall = update.shape[0] > update.shape[1]
        x = update.T if tall else update
        x = x / (np.linalg.norm(x) + 1e-7)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        update = (x.T if tall else x) * max(1.0, w.shape[0] / w.shape[1]) ** 0.5
    return w - rate * (update + DECAY * w)


REFERENCES = {"adam": adam, "adamw": adamw, "sgd": sgd, "adafactor": adafactor, "muon": muon, "lion": lion}


def optimizer_for(name, **settings):
    decay = {} if name == "adam" else {"weight_decay": DECAY}
    return build_optimizer(RunConfig.from_dict({"optimizer": name, **decay, **settings}))


def start_and_gradients():
    """Weights, and three updates' gradients; `idle` has none, as lora_a has none at the first update."""
    random = np.random.default_rng(0)
    weights = {name: random.normal(size=shape) for name, shape in SHAPES.items()}
    gradients = [
        {name: 0.3 * random.normal(size=shape) * (name != "idle") for name, shape in SHAPES.items()} for _ in RATES
    ]
    return weights, gradients


def as_mlx(arrays):
    return {name: mx.array(array.astype(np.float32)) for name, array in arrays.items()}


def updated(optimizer, apply):
    weights, gradients = start_and_gradients()
    parameters = as_mlx(weights)
    optimizer.init(parameters)
    for rate, gradient in zip(RATES, gradients):
        optimizer.learning_rate = rate
        parameters = apply(as_mlx(gradient), parameters)
        mx.eval(parameters, optimizer.state)
    return {name: np.array(array) for name, array in parameters.items()}


@pytest.mark.parametrize("name", REFERENCES)
def test_three_updates_with_weight_decay_are_those_of_the_paper(name):
    expected, gradients = start_and_gradients()
    states = {name: {} for name in SHAPES}
    for step, (rate, gradient) in enumerate(zip(RATES, gradients), start=1):
        for one in SHAPES:
            expected[one] = REFERENCES[name](expected[one], gradient[one], states[one], rate, step)
    optimizer = optimizer_for(name)
    for one, array in updated(optimizer, optimizer.apply_gradients).items():
        np.testing.assert_allclose(array, expected[one], atol=3e-5, err_msg=one)


@pytest.mark.parametrize("name", REFERENCES)
def test_weight_decay_alone_takes_its_share_of_a_matrix_without_gradient(name):
    optimizer = optimizer_for(name)
    kept = 1.0 if name == "adam" else np.prod([1 - rate * DECAY for rate in RATES])
    start, _ = start_and_gradients()
    np.testing.assert_allclose(
        updated(optimizer, optimizer.apply_gradients)["idle"], kept * start["idle"], atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("name", REFERENCES)
def test_a_compiled_update_is_the_same(name):
    plain = optimizer_for(name)
    expected = updated(plain, plain.apply_gradients)
    optimizer = optimizer_for(name)
    optimizer.init(as_mlx(start_and_gradients()[0]))
    compiled = mx.compile(optimizer.apply_gradients, inputs=optimizer.state, outputs=optimizer.state)
    for one, array in updated(optimizer, compiled).items():
        np.testing.assert_allclose(array, expected[one], atol=1e-5, err_msg=one)


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_the_first_matrix_of_an_adapter_stays_at_the_first_update_of_muon_but_for_its_decay(decay, tmp_path):
    from trainers import make_trainer, weights

    settings = {"optimizer": "muon", "weight_decay": decay, "learning_rate": 0.05, "lr_schedule": "constant"}
    trainer = make_trainer(tmp_path, warmup=0, steps_per_eval=-1, **settings)
    before = weights(trainer)
    list(trainer.events(1))
    for name, array in weights(trainer).items():
        if name.endswith("lora_a"):
            np.testing.assert_allclose(array, (1 - 0.05 * decay) * before[name], rtol=1e-5, atol=1e-7)
        else:
            assert np.abs(array - before[name]).max() > 1e-3, name
