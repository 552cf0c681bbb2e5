"""What safety costs: the transactional update and the exact checkpoint, on LoRA of SmolLM2-135M, in one run.

    python benchmarks/step_cost.py [--rounds 12] [--batch-size 4] [--model smollm2-135m]

Four runs of the same model take turns on the same batches:

    plain                    forward, backward, clip and optimizer change model and optimizer in place, as in mlx_lm
    plain, compiled          the same as one function under `mx.compile`
    transactional            mlx_nb's update: computed and evaluated first, judged, then exchanged
    transactional, compiled  with its gradients under `mx.compile`, as mlx_nb does on a GPU

What is compiled is first called once untimed for each batch, because compiling for a new shape takes longer than that.
The checkpoint's cost is that of `Run.checkpoint`, spread over ten updates. Medians of the rounds; JSON comes last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

EXAMPLE_ROWS = Path(__file__).parent.parent / "example_notebooks" / "home_requests"
UPDATES_PER_CHECKPOINT = 10
WARM_UP_ROUNDS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--model", default="smollm2-135m")
    print(json.dumps(report(parser.parse_args())))


def report(chosen: argparse.Namespace) -> dict:
    """Take turns, and return the medians and their ratios."""
    makers = {
        "plain": partial(plain_step, compiled=False),
        "plain, compiled": partial(plain_step, compiled=True),
        "transactional": partial(transactional_step, compiled=False),
        "transactional, compiled": partial(transactional_step, compiled=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*makers, "checkpoint")}
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: new_run(chosen, f"{folder}/{number}") for number, name in enumerate(makers)}
        turns = {name: make(runs[name]) for name, make in makers.items()}
        first = runs["transactional"]
        for round_number in range(chosen.rounds + WARM_UP_ROUNDS):
            batch = first.trainer.next_batches()[0]
            order = list(turns)[round_number % len(turns) :] + list(turns)[: round_number % len(turns)]
            for name in order:
                if name.endswith("compiled"):
                    turns[name](batch)
                seconds[name].append(timed(partial(turns[name], batch)))
            first.trainer.state.batches += 1
            seconds["checkpoint"].append(timed(first.checkpoint))
    seconds = {name: values[WARM_UP_ROUNDS:] for name, values in seconds.items()}
    for name, values in seconds.items():
        print(f"{name:26} {statistics.median(values):.4f} s")
    pairs = {"": ("transactional", "plain"), "_compiled": ("transactional, compiled", "plain, compiled")}
    figures = {
        f"transactional_over_plain{form}": statistics.median(
            a / b for a, b in zip(seconds[ours], seconds[plain], strict=True)
        )
        for form, (ours, plain) in pairs.items()
    }
    update = statistics.median(seconds["transactional"])
    figures["checkpoint_share"] = statistics.median(seconds["checkpoint"]) / (UPDATES_PER_CHECKPOINT * update)
    return {name: round(value, 4) for name, value in figures.items()}


def timed(act) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def new_run(chosen: argparse.Namespace, folder: str):
    from mlx_nb import Run, RunConfig

    settings = {"model": chosen.model, "data": str(EXAMPLE_ROWS), "batch_size": chosen.batch_size}
    return Run(RunConfig.from_dict({**settings, "iters": 1000, "steps_per_eval": -1, "adapter_path": folder}))


def transactional_step(run, *, compiled: bool):
    """`Stepper.update` on the batch that it is given, in one lane."""
    from mlx_nb.objectives.build import objective_for
    from mlx_nb.train.optimizer import build_optimizer
    from mlx_nb.train.step import Stepper

    trainer = run.trainer
    objective = objective_for(run.config)
    stepper = Stepper(trainer.model, build_optimizer(run.config), objective, trainer.scorer, compiled=compiled)
    return lambda batch: stepper.update(
        [batch], learning_rate=1e-4, grad_clip=1.0, seed=0, rows=(), judge=lambda loss, norm: None
    )


def plain_step(run, *, compiled: bool):
    """The same update in place."""
    import mlx.core as mx

    from mlx_nb.model.logprobs import target_inputs
    from mlx_nb.objectives.build import objective_for
    from mlx_nb.train.optimizer import build_optimizer, clip, gradient_norm

    model, scorer, optimizer = run.model, run.trainer.scorer, build_optimizer(run.config)
    objective = objective_for(run.config)
    optimizer.init(model.trainable_parameters())
    optimizer.learning_rate = 1e-4
    state = [model.state, optimizer.state, mx.random.state]

    def loss(parameters, inputs):
        model.update(parameters)
        sums = objective(scorer, inputs)
        return sums.total / sums.units

    def step(inputs):
        value, gradients = mx.value_and_grad(loss)(model.trainable_parameters(), inputs)
        optimizer.update(model, clip(gradients, gradient_norm(gradients), 1.0))
        return value

    act = mx.compile(step, inputs=state, outputs=state) if compiled else step

    multiples = (64, 32) if compiled else (1, 1)

    def turn(batch):
        model.train()
        value = act(target_inputs(batch, *multiples))
        mx.eval(state, value)
        model.eval()
        return value.item()

    return turn


if __name__ == "__main__":
    main()
