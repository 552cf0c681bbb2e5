"""Tokens per second and peak memory of LoRA on 4-bit SmolLM2-135M: stock mlx_lm against mlx_nb, in one run.

    python benchmarks/throughput.py [--data FOLDER | --mixed] [--steps 6] [--batch-size 4]

Four processes train on the same rows, one after the other, each for one pass:

    stock, as installed   mlx_lm's own trainer on the 4-bit model with the BLAS that the wheel brings, one row an
                          update; the scales of its 4-bit groups are cast to float32, because with the float16 that
                          they are stored in MLX's CPU kernels need over four minutes for one row
    stock, same base      mlx_lm's own trainer with OpenBLAS and a float32 base, as mlx_nb computes on a CPU
    mlx_nb, unpacked      with packing: false
    mlx_nb

`--mixed` makes rows of 20 to 400 tokens, all of which are trained but the first few. OPENBLAS_CORETYPE and
OPENBLAS_L2_SIZE are unset for all.

Counted are real tokens (no padding) of the rows, over the time of all updates but the first; of one update, all.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXAMPLE_ROWS = Path(__file__).parent.parent / "example_notebooks" / "home_requests"
ADAPTER = {"rank": 8, "scale": 20.0, "dropout": 0.0}
VARIANTS = ("stock, as installed", "stock, same base", "mlx_nb, unpacked", "mlx_nb")
CHOOSE_THE_KERNEL = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
WORDS = ("the", "a", "of", "to", "and", "in", "is", "it", "that", "for", "on", "with", "as", "was", "he", "she")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(EXAMPLE_ROWS), help="folder with train.jsonl of messages")
    parser.add_argument("--mixed", action="store_true", help="rows of 20 to 400 tokens in place of --data")
    parser.add_argument("--skip", nargs="*", choices=VARIANTS, default=[], help="variants that are left out")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--stock-steps", type=int, default=3, help="steps of the slow stock variant")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        measure = measure_mlx_nb if chosen.child.startswith("mlx_nb") else measure_stock
        print(json.dumps(measure(chosen)))
        return
    print(json.dumps(report(chosen)))


def report(chosen: argparse.Namespace) -> dict:
    """Run the three variants in processes of their own and print the table. Returns the figures."""
    from mlx_nb.model.backend import ORDER_VARIABLE, prepare_backend

    prepare_backend()
    from mlx_nb.model.model_source import model_folder

    folder = str(model_folder("smollm2-135m"))
    figures = {}
    for variant in VARIANTS:
        if variant in chosen.skip:
            continue
        slow = variant == VARIANTS[0]
        steps, batch_size = (chosen.stock_steps, 1) if slow else (chosen.steps, chosen.batch_size)
        command = [sys.executable, __file__, "--child", variant, "--folder", folder, "--data", chosen.data]
        command += ["--steps", str(steps), "--batch-size", str(batch_size), *["--mixed"][: chosen.mixed]]
        # What mlx_nb tells mlx about its order of work, and the number that mlx has by itself.
        order = {} if variant.startswith("mlx_nb") else {ORDER_VARIABLE: "20"}
        left_out = (ORDER_VARIABLE, *CHOOSE_THE_KERNEL)
        environment = {name: value for name, value in os.environ.items() if name not in left_out} | order
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        figures[variant] = json.loads(output.splitlines()[-1])
        result = figures[variant]
        print(
            f"{variant:22} {result['tokens_per_second']:8.1f} tokens/s   peak {result['peak_gb']:.2f} GB   "
            f"({result['tokens']} tokens in {result['seconds']:.1f} s)",
            flush=True,
        )
    ours = figures["mlx_nb"]["tokens_per_second"]
    ratios = {name: ours / figures[name]["tokens_per_second"] for name in VARIANTS[:-1] if name in figures}
    for name, ratio in ratios.items():
        print(f"mlx_nb is {ratio:.2f} times {name}")
    return {"figures": figures, "ratios": ratios}


def measure_stock(chosen: argparse.Namespace) -> dict:
    """mlx_lm's `train`, timed from batch to batch."""
    same_base = chosen.child == "stock, same base"
    if same_base:
        from mlx_nb.model.backend import prepare_backend

        prepare_backend()
    import mlx.core as mx
    import mlx.optimizers as optimizers
    from mlx_lm import load
    from mlx_lm.tuner.datasets import CacheDataset, ChatDataset
    from mlx_lm.tuner.trainer import TrainingArgs, iterate_batches, train
    from mlx_lm.tuner.utils import linear_to_lora_layers

    if same_base:
        from mlx_nb.model.loading import load_model

        loaded = load_model(chosen.folder)
        model, tokenizer = loaded.model, loaded.tokenizer
    else:
        model, tokenizer = load(chosen.folder)
        model.set_dtype(mx.float32)  # scales and norms; the 4-bit groups stay
    model.freeze()
    linear_to_lora_layers(model, -1, ADAPTER)
    dataset = CacheDataset(ChatDataset(first_rows(chosen), tokenizer, mask_prompt=True))
    arrivals: list[tuple[float, int]] = []

    def timed_batches(**arguments):
        for batch, lengths in iterate_batches(**arguments):
            arrivals.append((time.perf_counter(), int(lengths[:, 1].sum().item())))
            yield batch, lengths

    arguments = TrainingArgs(
        batch_size=chosen.batch_size,
        iters=chosen.steps,
        steps_per_report=10_000,
        steps_per_save=10_000,
        adapter_file=str(Path(tempfile.mkdtemp()) / "adapters.safetensors"),
    )
    mx.reset_peak_memory()
    train(model, optimizers.AdamW(learning_rate=1e-4), dataset, None, arguments, iterate_batches=timed_batches)
    finished = time.perf_counter()
    starts = [at for at, _ in arrivals[: chosen.steps]]
    seconds = [end - start for start, end in zip(starts, [*starts[1:], finished])]
    return summary([tokens for _, tokens in arrivals[: chosen.steps]], seconds, mx.get_peak_memory())


def measure_mlx_nb(chosen: argparse.Namespace) -> dict:
    """mlx_nb's Run, timed by its own events."""
    from mlx_nb import Run, RunConfig
    from mlx_nb.events import StepCompleted

    config = RunConfig(
        model=chosen.folder,
        data=first_rows(chosen),
        val_set_size=0,
        loss_on="final",
        iters=chosen.steps,
        batch_size=chosen.batch_size,
        learning_rate=1e-4,
        packing=False if chosen.child == "mlx_nb, unpacked" else "auto",
    )
    run = Run(config)
    steps = [event for event in run.events(chosen.steps) if isinstance(event, StepCompleted)]
    return summary([step.tokens for step in steps], [step.seconds for step in steps], steps[-1].peak_memory)


def mixed_rows(count: int) -> list[dict]:
    """Rows of about 20 to 400 tokens, as many of each length, in mixed order."""
    draw = random.Random(0)
    lengths = [20 + 380 * (place + 0.5) / count for place in range(count)]
    draw.shuffle(lengths)
    asked = {"role": "user", "content": "Write."}
    return [
        {
            "messages": [
                asked,
                {"role": "assistant", "content": " ".join(draw.choices(WORDS, k=max(2, int(length) - 18)))},
            ]
        }
        for length in lengths
    ]


def first_rows(chosen: argparse.Namespace) -> list[dict]:
    if chosen.mixed:
        return mixed_rows(chosen.steps * chosen.batch_size)
    lines = (Path(chosen.data) / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[: chosen.steps * chosen.batch_size]]
    if len(rows) < chosen.steps * chosen.batch_size:
        raise SystemExit(f"{chosen.data} has only {len(rows)} rows: fewer steps or a smaller batch, please")
    return rows


def summary(tokens: list[int], seconds: list[float], peak_memory: int) -> dict:
    if len(tokens) > 1:
        tokens, seconds = tokens[1:], seconds[1:]
    return {
        "tokens": sum(tokens),
        "seconds": sum(seconds),
        "tokens_per_second": sum(tokens) / sum(seconds),
        "peak_gb": peak_memory / 1e9,
    }


if __name__ == "__main__":
    main()
