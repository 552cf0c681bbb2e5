"""What safety costs: the transactional update and the exact checkpoint, on LoRA of SmolLM2-135M, in one run.

    python benchmarks/step_cost.py [--rounds 12] [--batch-size 4] [--model smollm2-135m]

Two trainers of the same model take turns on the same batches:

    plain            forward, backward, clip and optimizer in one `mx.compile`d function that changes model and
                     optimizer in place, as mlx_lm's trainer does (on a CPU compiling calls a C++ compiler)
    transactional    mlx_nb: everything is computed and evaluated first, judged, then exchanged

The checkpoint's cost is that of `Run.checkpoint`, spread over ten updates. Medians of the rounds; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

EXAMPLE_ROWS = Path(__file__).parent.parent / "example_notebooks" / "home_requests"
UPDATES_PER_CHECKPOINT = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--model", default="smollm2-135m")
    print(json.dumps(report(parser.parse_args())))


def report(chosen: argparse.Namespace) -> dict:
    """Take turns, and return the medians and their ratios."""
    from mlx_nb import Run, RunConfig

    with tempfile.TemporaryDirectory() as folder:
        run, plain_run = (
            Run(
                RunConfig.from_dict(
                    {
                        "model": chosen.model,
                        "data": str(EXAMPLE_ROWS),
                        "batch_size": chosen.batch_size,
                        "iters": chosen.rounds + 2,
                        "learning_rate": 1e-4,
                        "lr_schedule": {"name": "constant", "warmup": 0},
                        "steps_per_eval": -1,
                        "adapter_path": f"{folder}/{name}",
                    }
                ),
                name=name,
            )
            for name in ("transactional", "plain")
        )
        plain = plain_step(plain_run)
        seconds: dict[str, list[float]] = {"plain": [], "transactional": [], "checkpoint": []}
        for round_number in range(chosen.rounds + 2):
            batches = run.trainer.next_batches()
            turns = [("plain", lambda: plain(batches)), ("transactional", run.step)]
            for name, turn in turns if round_number % 2 else reversed(turns):
                started = time.perf_counter()
                turn()
                seconds[name].append(time.perf_counter() - started)
            started = time.perf_counter()
            run.checkpoint()
            seconds["checkpoint"].append(time.perf_counter() - started)
        middle = {name: statistics.median(values[2:]) for name, values in seconds.items()}
        ratios = [ours / theirs for ours, theirs in zip(seconds["transactional"][2:], seconds["plain"][2:])]
    figures = {
        "plain_seconds": round(middle["plain"], 4),
        "transactional_seconds": round(middle["transactional"], 4),
        "checkpoint_seconds": round(middle["checkpoint"], 4),
        "transactional_over_plain": round(statistics.median(ratios), 4),
        "checkpoint_share": round(middle["checkpoint"] / (UPDATES_PER_CHECKPOINT * middle["transactional"]), 4),
    }
    for name, value in figures.items():
        print(f"{name:26} {value}")
    return figures


def plain_step(run):
    """The same update in place, in one compiled function."""
    import mlx.core as mx

    from mlx_nb.model.logprobs import target_inputs
    from mlx_nb.objectives.sft import sft_loss
    from mlx_nb.train.optimizer import clip, gradient_norm

    trainer = run.trainer
    model, optimizer, scorer = trainer.model, trainer.stepper.optimizer, trainer.scorer
    optimizer.learning_rate = 1e-4
    state = [model.state, optimizer.state, mx.random.state]

    def loss(parameters, inputs):
        model.update(parameters)
        sums = sft_loss(scorer, inputs)
        return sums.total / sums.units

    def step(inputs):
        value, gradients = mx.value_and_grad(loss)(model.trainable_parameters(), inputs)
        optimizer.update(model, clip(gradients, gradient_norm(gradients), 1.0))
        return value

    compiled = mx.compile(step, inputs=state, outputs=state)

    def turn(batches):
        model.train()
        value = compiled(target_inputs(batches[0]))
        mx.eval(state, value)
        model.eval()
        return value.item()

    return turn


if __name__ == "__main__":
    main()
