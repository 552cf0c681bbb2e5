"""Peak memory and time of one LoRA update of SmolLM2-135M on one long row, technique by technique, and of mlx_lm.

    python benchmarks/memory.py [--lengths 2048 4096 8192] [--ways WAY ...] [--json FILE]

Float32, one row of random tokens of which the second half is trained, rank 8 on every linear layer, AdamW. Each cell is
a process of its own, with the BLAS variables that choose a slow kernel taken away. The ways:

    plain              targets, attention and layers as mlx computes them, head at scored positions alone
    chunks             and targets a few hundred at a time
    blocks             and attention in blocks: what mlx_nb does by itself
    grad_checkpoint    and each layer computed again
    segments           and kept is what goes into every fifth layer (segment_size: 5, grad_checkpoint: true)
    long_context       grad_checkpoint, and MLPs 512 tokens at a time (efficient_long_context: true)
    smallest           all of it
    segments_alone     segment_size: 5 without grad_checkpoint
    chunks_of_mlps     efficient_long_context alone
    mlx_lm             mlx_lm's loss with its grad_checkpoint, on the same base with the same BLAS

Printed are the peak of mlx's arrays (base included), the peak of the process (resident), and the seconds of the second
of two updates, or of the first with --once. JSON comes last.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

BEFORE_LAYERS = ("plain", "chunks", "blocks")
SETTINGS = {
    "grad_checkpoint": {"grad_checkpoint": True},
    "segments": {"grad_checkpoint": True, "segment_size": 5},
    "long_context": {"grad_checkpoint": True, "efficient_long_context": True},
    "smallest": {"grad_checkpoint": True, "segment_size": 5, "efficient_long_context": True},
    "segments_alone": {"segment_size": 5},
    "chunks_of_mlps": {"efficient_long_context": True},
}
WAYS = (*BEFORE_LAYERS, *SETTINGS, "mlx_lm")
ADAPTER = {"rank": 8, "scale": 20.0, "dropout": 0.0}
SLOW_BLAS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--once", action="store_true", help="one update in each cell")
    parser.add_argument("--json", help="a file for the figures; cells that are there are not measured again")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        print(json.dumps(measured(chosen)))
        return
    print(json.dumps(report(chosen)))


def report(chosen: argparse.Namespace) -> dict:
    """Measure each cell in a process of its own and print the table. Returns the figures."""
    file = Path(chosen.json) if chosen.json else None
    known = json.loads(file.read_text()) if file and file.exists() else {}
    environment = {name: value for name, value in os.environ.items() if name not in SLOW_BLAS}
    for length in chosen.lengths:
        for way in chosen.ways:
            cell = f"{way} {length}"
            if cell not in known:
                command = [sys.executable, __file__, "--child", way, "--lengths", str(length), "--model", chosen.model]
                command += ["--once"] if chosen.once else []
                found = subprocess.run(command, capture_output=True, text=True, env=environment)
                lines = found.stdout.splitlines()
                ended = {"ended": (found.stderr.splitlines() or [f"exit status {found.returncode}"])[-1]}
                known[cell] = json.loads(lines[-1]) if found.returncode == 0 else ended
                if file:
                    file.write_text(json.dumps(known))
            print(f"{length:6} tokens  {way:16} {words(known[cell])}", flush=True)
    return {"versions": {name: version(name) for name in ("mlx", "mlx-lm")}, "cells": known}


def words(cell: dict) -> str:
    if "ended" in cell:
        return f"ended: {cell['ended']}"
    return f"{cell['peak_gb']:6.2f} GB   resident {cell['resident_gb']:6.2f} GB   {cell['seconds']:7.1f} s"


def measured(chosen: argparse.Namespace) -> dict:
    [length] = chosen.lengths
    with tempfile.TemporaryDirectory() as folder:
        update = mlx_lm_update(chosen, length) if chosen.child == "mlx_lm" else our_update(chosen, length, folder)
        import mlx.core as mx

        for _ in range(1 if chosen.once else 2):
            mx.clear_cache()
            mx.reset_peak_memory()
            started = time.perf_counter()
            loss = update()
            seconds = time.perf_counter() - started
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {
            "seconds": seconds,
            "peak_gb": mx.get_peak_memory() / 1e9,
            "resident_gb": resident / 1e9,
            "loss": loss,
        }


def random_tokens(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, 40000, (1, length)).astype(np.int32)


def our_update(chosen: argparse.Namespace, length: int, folder: str):
    """One update of a run's own stepper, without the techniques that come after `chosen.child`."""
    from mlx_nb import Run, RunConfig
    from mlx_nb.model import vocabulary_chunks

    way = chosen.child
    settings = {"model": chosen.model, "data": [{"text": "A row."}] * 2, "val_set_size": 0, "iters": 1}
    own = {"lora_parameters": ADAPTER, "adapter_path": folder, **SETTINGS.get(way, {})}
    run = Run(RunConfig.from_dict({**settings, **own}))
    stepper = run.trainer.stepper
    if way in ("plain", "chunks"):
        stepper.scorer._has_kernels = False
    if way == "plain":
        vocabulary_chunks._CHUNK_BYTES = 1 << 40
    loss_mask_BT = np.ones((1, length), np.float32)
    loss_mask_BT[:, : length // 2] = 0
    batch = run.trainer.next_batches()[0]._replace(
        tokens_BT=random_tokens(length), loss_mask_BT=loss_mask_BT, rows=(0,), lengths=(length,)
    )

    def update() -> float:
        found = stepper.update(
            [batch], learning_rate=1e-4, grad_clip=1.0, seed=0, rows=(0,), judge=lambda loss, norm: None
        )
        return found.loss

    return update


def mlx_lm_update(chosen: argparse.Namespace, length: int):
    from mlx_nb.model.backend import prepare_backend

    prepare_backend()
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optimizers
    from mlx_lm.tuner.trainer import default_loss, grad_checkpoint
    from mlx_lm.tuner.utils import linear_to_lora_layers

    from mlx_nb.model.loading import load_model
    from mlx_nb.model.model_source import model_folder

    model = load_model(model_folder(chosen.model)).model
    model.freeze()
    linear_to_lora_layers(model, -1, ADAPTER)
    mx.eval(model.parameters())
    grad_checkpoint(model.layers[0])
    optimizer = optimizers.AdamW(learning_rate=1e-4)
    batch, lengths = mx.array(random_tokens(length)), mx.array([[length // 2, length]])
    gradient = nn.value_and_grad(model, default_loss)

    def update() -> float:
        (loss, _), slopes = gradient(model, batch, lengths)
        optimizer.update(model, slopes)
        mx.eval(model.parameters(), optimizer.state, loss)
        return loss.item()

    return update


if __name__ == "__main__":
    main()
