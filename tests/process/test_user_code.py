"""What a person's own functions raise is told as theirs, and a change of what they do is noticed."""

from __future__ import annotations

import functools

import mlx.core as mx
import pytest

import mlx_nb
from mlx_nb import Run, RunConfig
from mlx_nb.config.methods import METHODS
from mlx_nb.errors import CheckpointError, LossRaised, ModelChanged
from mlx_nb.process import exits
from mlx_nb.process.user_code import code_digest
from tiny import tiny_pairs, tiny_prompts, tiny_rows


def make_run(tiny_folder, tmp_path, name="run", **settings):
    values = {"model": str(tiny_folder), "data": tiny_rows(24), "iters": 6, "batch_size": 4, "learning_rate": 1e-2}
    values |= {"lora_parameters": {"rank": 4, "scale": 2.0}, "adapter_path": str(tmp_path / name), "val_set_size": 0}
    namespace = settings.pop("namespace", None)
    return Run(RunConfig.from_dict({**values, **settings}), name=name, namespace=namespace)


def functions(text):
    """The functions of a source text, as in a cell run anew."""
    namespace = {"__name__": "__main__"}
    exec(text, namespace)
    return namespace


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("/nowhere"),
        ConnectionError("no route"),
        MemoryError("mine"),
        RuntimeError("memory of a cache"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.matrix(every=4)
def test_what_a_user_defined_loss_raises_is_reported_as_its_own(tiny_folder, tmp_path, error):
    calls = []

    @mlx_nb.register_objective("mine", rows="tokens")
    def mine(targets):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return -targets.logprob_S

    try:
        run = make_run(tiny_folder, tmp_path, method="mine")
        with pytest.raises(LossRaised, match=rf"the loss of `method: mine` raised {type(error).__name__}: .*line 5"):
            run.run()
        assert run.state == "failed"
        assert run.step_count == 2
        assert Run.resume(tmp_path / "run", data=tiny_rows(24)).run().reason == "iters reached"
    finally:
        del METHODS["mine"]


def test_a_function_is_the_same_until_what_it_does_changes():
    text = (
        "LIMIT = 3\ndef helper(x):\n    return x > LIMIT\ndef good(completion):\n    return helper(len(completion))\n"
    )
    digest = code_digest(functions(text)["good"])
    assert code_digest(functions("# moved down\n\n" + text)["good"]) == digest
    assert code_digest(functions(text.replace("LIMIT = 3", "LIMIT = 4"))["good"]) != digest
    assert code_digest(functions(text.replace("x > LIMIT", "x >= LIMIT"))["good"]) != digest
    assert code_digest(functions(text.replace("helper(len(completion))", "-helper(len(completion))"))["good"]) != digest
    assert code_digest(functions(text.replace("(completion):", "(completion, k=1):"))["good"]) != digest


def test_wrapped_partial_and_callable_objects_are_seen_through():
    source = "def good(completion, k):\n    return k * len(completion)\n"
    good, other = functions(source)["good"], functions(source.replace("k *", "k +"))["good"]
    assert code_digest(functools.partial(good, k=1)) == code_digest(functools.partial(functions(source)["good"], k=1))
    assert code_digest(functools.partial(good, k=1)) != code_digest(functools.partial(good, k=2))
    assert code_digest(functools.partial(good, k=1)) != code_digest(functools.partial(other, k=1))

    def logged(function):
        @functools.wraps(function)
        def call(*arguments):
            return function(*arguments)

        return call

    assert code_digest(logged(good)) != code_digest(logged(other))
    judge = (
        "class Judge:\n    def __init__(self, k):\n        self.k = k\n"
        "    def __call__(self, completion):\n        return self.k\n"
    )
    one, two = functions(judge)["Judge"](1), functions(judge)["Judge"](2)
    assert code_digest(one) != code_digest(two)
    assert code_digest(one) == code_digest(functions(judge)["Judge"](1))
    assert code_digest(one) != code_digest(functions(judge.replace("return self.k", "return -self.k"))["Judge"](1))


def test_a_counter_of_a_functions_own_is_no_change():
    namespace = functions("calls = 0\ndef good(completion):\n    global calls\n    calls += 1\n    return calls\n")
    before = code_digest(namespace["good"])
    namespace["good"]("x")
    assert code_digest(namespace["good"]) == before


def test_a_reward_that_changed_since_the_checkpoint_is_named(tiny_folder, tmp_path):
    source = "def good(completion):\n    return float('red' in completion)\n"
    settings = {"method": "grpo", "rewards": ["good"], "group_size": 2, "batch_size": 2, "max_completion_length": 3}
    run = make_run(tiny_folder, tmp_path, data=tiny_prompts(8), namespace=functions(source), **settings)
    run.step(2)
    run.checkpoint("pause")
    folder, rows = tmp_path / "run", tiny_prompts(8)
    assert Run.resume(folder, data=rows, namespace=functions(source)).step_count == 2
    changed = functions(source.replace("float", "-float"))
    with pytest.raises(CheckpointError, match="changed since the checkpoint of step 2: reward functions"):
        Run.resume(folder, data=rows, namespace=changed)
    again = Run.resume(folder, data=rows, namespace=changed, allow_changed=["reward functions"])
    assert any("reward functions" in note for note in again.trainer.notes)


@pytest.mark.parametrize("do", ["unfreeze", "freeze"])
@pytest.mark.matrix(every=2)
def test_what_is_trained_is_what_the_run_made_trainable(tiny_folder, tmp_path, do):
    whole = make_run(tiny_folder, tmp_path, "whole")
    whole.run()
    run = make_run(tiny_folder, tmp_path)
    run.step(2)
    getattr(run.model, do)()
    run.checkpoint("pause")
    run.step()
    getattr(run.model.model.layers[0], do)()
    run.save(tmp_path / "saved")
    run.run()
    assert run.adapter_bytes() == whole.adapter_bytes()
    saved = mx.load(str(tmp_path / "saved" / "adapters.safetensors"))
    assert set(saved) == set(whole.adapter_bytes())


def length(completion):
    return float(len(completion))


def moved(run):
    with pytest.raises(ModelChanged):
        run.run()


WAYS_TO_END = {
    "it is moved": moved,
    "it lets go": lambda run: run.release(),
    "its folder is taken": lambda run: None,
    "a checkpoint is asked for": lambda run: run.checkpoint(),
    "the process ends": lambda run: exits.save_all(ending=False),
}


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
@pytest.mark.parametrize("way", WAYS_TO_END)
@pytest.mark.matrix(every=15)
def test_what_was_done_before_arrays_were_exchanged_is_saved_from_memory(tiny_folder, tmp_path, way, method):
    rows = {"sft": tiny_rows, "dpo": tiny_pairs, "grpo": tiny_prompts}[method](24)
    more = {"method": method, "autosave_minutes": None, "save_every": -1, "val_set_size": 0, "data": rows, "iters": 6}
    if method == "grpo":
        more |= {"rewards": [length], "group_size": 2, "max_completion_length": 3}
    whole = make_run(tiny_folder, tmp_path, "whole", **more)
    whole.run()
    run = make_run(tiny_folder, tmp_path, **more)
    run.step(3)
    run.model.model.layers[0].self_attn.q_proj.lora_a = mx.zeros((2, 2))
    WAYS_TO_END[way](run)
    again = Run.resume(tmp_path / "run", data=rows, namespace={"length": length})
    assert again.step_count == 3
    assert again.run().reason == "iters reached"
    assert again.adapter_bytes() == whole.adapter_bytes()


@pytest.mark.parametrize("call", ["evaluate", "save", "fork", "step", "rewind"])
def test_whatever_is_done_with_exchanged_arrays_says_how_to_continue(tiny_folder, tmp_path, call):
    run = make_run(tiny_folder, tmp_path)
    run.step(2)
    run.model.model.layers[0].self_attn.q_proj.lora_a = mx.zeros((2, 2))
    with pytest.raises(ModelChanged, match=r"was changed from outside: .*`%finetune resume`.* continues"):
        getattr(run, call)()


def test_arrays_exchanged_from_outside_are_one_clear_error_and_a_resume_mends_it(tiny_folder, tmp_path):
    run = make_run(tiny_folder, tmp_path)
    run.step(2)
    run.checkpoint("pause")
    run.model.set_dtype(mx.float16)
    with pytest.raises(ModelChanged, match=r"lora_a.*float32 and is now of shape .*float16"):
        run.step()
    assert run.step_count == 2
    assert Run.resume(tmp_path / "run", data=tiny_rows(24)).run().reason == "iters reached"
