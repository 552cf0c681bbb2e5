"""DPO on SmolLM2-135M: tokens per second and peak memory of mlx-lm-lora and of mlx_nb on the same pairs, in one run.

    python benchmarks/preference.py FOLDER --peer-python PYTHON [--pairs 12] [--batch-size 2] [--updates 8]
    python benchmarks/preference.py --shared-prompt 300 [--sides mlx_nb unpacked]

FOLDER has a train.jsonl with rows {prompt, chosen, rejected}; without one, pairs are made with a prompt of so many
tokens and answers of 40 to 80. PYTHON is one of an environment that has both mlx_nb and
mlx-lm-lora (pip install --no-deps mlx-lm-lora==5.10.2). Each side is a process of its own, with the same BLAS, float32
base, adapter, optimizer and chat template; each update is timed, the first is left out. The peer trains as its
documentation says, with the same model loaded a second time as the reference. mlx_nb measures the reference of a row
at its first visit, so its first epoch and the later ones are shown apart. `unpacked` is mlx_nb with packing: false,
which computes the prompt for each answer. OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE are unset for all. JSON comes last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LORA = {"rank": 8, "dropout": 0.0, "scale": 20.0}
LEARNING_RATE = 1e-5
SIDES = ("peer", "unpacked", "mlx_nb")
CHOOSE_THE_KERNEL = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
WORDS = ("the", "a", "of", "to", "and", "in", "is", "it", "that", "for", "on", "with", "as", "was", "he", "she")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--shared-prompt", type=int, default=300, help="tokens of the prompts that are made")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--updates", type=int, default=8, help="of the peer; mlx_nb makes two epochs")
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        print(json.dumps(train_peer(chosen) if chosen.child == "peer" else train_mlx_nb(chosen)))
        return
    found = {side: run_child(chosen, side) for side in SIDES if side in chosen.sides}
    for side, figures in found.items():
        for name, rate in figures["epochs"].items():
            print(f"{side}, {name}: {show(rate)}, peak {figures['peak_gb']:.2f} GB")
    for name, rate in found.get("mlx_nb", {"epochs": {}})["epochs"].items():
        for side, figures in found.items():
            if side != "mlx_nb":
                ratio = rate["pairs_per_second"] / figures["epochs"].get(name, rate)["pairs_per_second"]
                print(f"mlx_nb is {ratio:.2f} times {side} in pairs per second, {name}")
    print(json.dumps(found))


def show(figures: dict) -> str:
    return f"{figures['pairs_per_second']:.3f} pairs/s, {figures['tokens_per_second']:.1f} tokens/s"


def run_child(chosen: argparse.Namespace, side: str) -> dict:
    python = chosen.peer_python if side == "peer" else sys.executable
    command = [python, __file__, *([str(chosen.folder)] if chosen.folder else []), "--child", side]
    for name in ("model", "pairs", "batch_size", "updates", "shared_prompt"):
        command += [f"--{name.replace('_', '-')}", str(getattr(chosen, name))]
    # The peer has mlx's own order of work: mlx_nb, which loads its model, sets another one for its lanes.
    environment = {name: value for name, value in os.environ.items() if name not in CHOOSE_THE_KERNEL}
    environment |= {"MLX_BFS_MAX_WIDTH": "20"} if side == "peer" else {}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def read_pairs(chosen: argparse.Namespace) -> list[dict]:
    if chosen.folder is None:
        draw = random.Random(0)

        def text(tokens: int) -> str:
            return " ".join(draw.choices(WORDS, k=tokens))

        names = ("chosen", "rejected")
        return [
            {"prompt": text(chosen.shared_prompt - 30), **{name: text(draw.randint(40, 80)) for name in names}}
            for _ in range(chosen.pairs)
        ]
    return [json.loads(line) for line in (chosen.folder / "train.jsonl").read_text().splitlines()[: chosen.pairs]]


def rates(seconds: list[float], tokens: list[int], batch_size: int) -> dict:
    """Of updates that took `seconds` with `tokens` in both answers, prompts included."""
    return {
        "pairs_per_second": len(seconds) * batch_size / sum(seconds),
        "tokens_per_second": sum(tokens) / sum(seconds),
        "median_seconds": statistics.median(seconds),
    }


def train_mlx_nb(chosen: argparse.Namespace) -> dict:
    from mlx_nb import Run, RunConfig
    from mlx_nb.events import StepCompleted

    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "method": "dpo",
            "model": chosen.model,
            "data": read_pairs(chosen),
            "val_set_size": 0,
            "batch_size": chosen.batch_size,
            "epochs": 2,
            "optimizer": "adam",
            "lora_parameters": LORA,
            "learning_rate": LEARNING_RATE,
            "save_every": -1,
            "autosave_minutes": None,
            "loss_spike": None,
            "adapter_path": f"{folder}/adapter",
            "packing": False if chosen.child == "unpacked" else "auto",
        }
        run = Run(RunConfig.from_dict(settings))
        import mlx.core as mx

        steps = [event for event in run.events() if isinstance(event, StepCompleted)]
        seconds, tokens = [step.seconds for step in steps], [step.tokens for step in steps]
    half = len(seconds) // 2
    epochs = {
        "first epoch": rates(seconds[1:half], tokens[1:half], chosen.batch_size),
        "later epochs": rates(seconds[half:], tokens[half:], chosen.batch_size),
    }
    return {"epochs": epochs, "peak_gb": mx.get_peak_memory() / 1e9}


def train_peer(chosen: argparse.Namespace) -> dict:
    from mlx_nb.model.loading import load_model

    policy, reference = load_model(chosen.model), load_model(chosen.model)
    import mlx.core as mx
    import mlx.optimizers as optimizers
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm_lora.trainer import dpo_trainer
    from mlx_lm_lora.trainer.datasets import DPODataset

    known = mx.device_info()
    # On a CPU mlx says nothing of this, and the peer asks.
    mx.device_info = lambda *_: {**known, "max_recommended_working_set_size": known.get("memory_size", 1 << 34)}
    mx.set_wired_limit = lambda *_: 0
    policy.model.freeze()
    linear_to_lora_layers(policy.model, -1, LORA)
    mx.eval(policy.model.parameters(), reference.model.parameters())
    mx.clear_cache()
    mx.reset_peak_memory()
    drawn = dpo_trainer.iterate_dpo_batches
    tokens: list[int] = []

    def counting(*arguments, **named):
        for batch in drawn(*arguments, **named):
            tokens.append(int((batch[0] != 0).sum().item() + (batch[1] != 0).sum().item()))
            yield batch

    dpo_trainer.iterate_dpo_batches = counting
    times: list[float] = []

    class Clock(TrainingCallback):
        def on_train_loss_report(self, info: dict) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = dpo_trainer.DPOTrainingArgs(
            batch_size=chosen.batch_size,
            iters=chosen.updates,
            val_batches=0,
            steps_per_report=1,
            steps_per_eval=10**6,
            steps_per_save=10**6,
            adapter_file=f"{folder}/adapters.safetensors",
            max_seq_length=2048,
            grad_checkpoint=False,
            beta=0.1,
            seq_step_size=None,
        )
        dpo_trainer.train_dpo(
            policy.model,
            reference.model,
            optimizers.Adam(learning_rate=LEARNING_RATE),
            DPODataset(read_pairs(chosen), policy.tokenizer),
            args=arguments,
            training_callback=Clock(),
        )
    seconds = [after - before for before, after in itertools.pairwise(times)]
    epochs = dict.fromkeys(("first epoch", "later epochs"), rates(seconds, tokens[1:], chosen.batch_size))
    return {"epochs": epochs, "peak_gb": mx.get_peak_memory() / 1e9}


if __name__ == "__main__":
    main()
