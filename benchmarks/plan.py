"""The planned peak memory of an update, from config.json alone, beside the measured one.

    python benchmarks/plan.py [--only CASE ...] [--json FILE]

Each case is a process of its own: it plans from a model without weights, then trains the same model with random weights
for two updates of one batch, and reads mlx's peak. Printed are the two peaks in MB and their ratio.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "intermediate_size": 704,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 8000,
    "tie_word_embeddings": True,
}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 32, "rope_theta": 1e4, "max_position_embeddings": 4096}
OLMO2 = {**LLAMA, "model_type": "olmo2", "max_position_embeddings": 4096}
GEMMA3 = {
    "model_type": "gemma3_text",
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 1,
    "vocab_size": 32000,
    "sliding_window": 128,
    "sliding_window_pattern": 3,
}
SMOLLM2 = {
    **LLAMA,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}
LONG_CONTEXT = {"efficient_long_context": True, "seq_step_size": 128}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True}
QWEN3_MOE = {**QWEN3, **EXPERTS, "model_type": "qwen3_moe", "decoder_sparse_step": 1, "mlp_only_layers": []}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "rope_theta": 1e4}
WIDE = {**LLAMA, "hidden_size": 512, "intermediate_size": 1408}

# name: (config.json, (sequences, tokens, trained tokens), settings)
CASES: dict[str, tuple[dict[str, Any], tuple[int, int, int], dict[str, Any]]] = {
    "lora": (LLAMA, (2, 256, 256), {}),
    "prompt": (LLAMA, (2, 512, 100), {}),
    "long": (LLAMA, (1, 1500, 1500), {}),
    "one layer": (WIDE, (4, 256, 256), {"num_layers": 1}),
    "dora": (LLAMA, (2, 512, 512), {"fine_tune_type": "dora"}),
    "full": (LLAMA, (2, 128, 128), {"fine_tune_type": "full"}),
    "full, large": (WIDE, (4, 512, 256), {"fine_tune_type": "full"}),
    "full, adafactor": (LLAMA, (1, 128, 128), {"fine_tune_type": "full", "optimizer": "adafactor"}),
    "dpo": (LLAMA, (4, 256, 100), {"method": "dpo", "batch_size": 2}),
    "orpo": (LLAMA, (4, 256, 256), {"method": "orpo", "batch_size": 2}),
    "kto": (LLAMA, (4, 256, 100), {"method": "kto"}),
    "packing": (LLAMA, (4, 256, 256), {"packing": True}),
    "grad_checkpoint": (LLAMA, (2, 512, 512), {"grad_checkpoint": True}),
    "grad_checkpoint, dora": (LLAMA, (2, 512, 200), {"grad_checkpoint": True, "fine_tune_type": "dora"}),
    "grad_checkpoint, full": (LLAMA, (2, 512, 512), {"grad_checkpoint": True, "fine_tune_type": "full"}),
    "segments": (LLAMA, (2, 512, 512), {"segment_size": 3}),
    "segments, grad_checkpoint": (LLAMA, (2, 512, 512), {"segment_size": 3, "grad_checkpoint": True}),
    "long context": (LLAMA, (2, 512, 512), {"efficient_long_context": True, "seq_step_size": 128}),
    "long context, grad_checkpoint": (LLAMA, (1, 1000, 512), {**LONG_CONTEXT, "grad_checkpoint": True}),
    "muon": (LLAMA, (1, 128, 128), {"optimizer": "muon"}),
    "full, muon": (LLAMA, (1, 128, 128), {"fine_tune_type": "full", "optimizer": "muon"}),
    "full, muon, wide": (WIDE, (1, 64, 64), {"fine_tune_type": "full", "optimizer": "muon"}),
    "experts": (QWEN3_MOE, (2, 256, 256), {}),
    "experts, full": (QWEN3_MOE, (1, 128, 128), {"fine_tune_type": "full"}),
    "experts, mixtral": (MIXTRAL, (2, 256, 256), {"lora_parameters": {"rank": 8, "keys": ["self_attn.q_proj"]}}),
    "qwen3": (QWEN3, (2, 256, 256), {}),
    "olmo2": (OLMO2, (2, 512, 512), {}),
    "gemma3": (GEMMA3, (1, 512, 512), {}),
    "smollm2": (SMOLLM2, (1, 256, 256), {}),
    "smollm2, grad_checkpoint": (SMOLLM2, (1, 512, 256), {"grad_checkpoint": True}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--json", help="a file for the figures")
    parser.add_argument("--child", choices=list(CASES), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        print(json.dumps(measured(*CASES[chosen.child])))
        return
    found = {}
    for case in chosen.only:
        done = subprocess.run([sys.executable, __file__, "--child", case], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{case}: {done.stderr}")
        found[case] = cell = json.loads(done.stdout.splitlines()[-1])
        planned, peak = cell["planned"] / 1e6, cell["measured"] / 1e6
        print(f"{case:26} planned {planned:8.1f} MB   measured {peak:8.1f} MB   {planned / peak:.3f}")
        sys.stdout.flush()
    if chosen.json:
        text = {"versions": {name: version(name) for name in ("mlx", "mlx-lm")}, "cases": found}
        Path(chosen.json).write_text(json.dumps(text))


def measured(description: dict[str, Any], sizes: tuple[int, int, int], settings: dict[str, Any]) -> dict[str, float]:
    """The planned and the measured peak of one case, in bytes."""
    from mlx_nb import RunConfig
    from mlx_nb.model.backend import prepare_backend

    prepare_backend()
    import mlx.core as mx

    from mlx_nb.model.adapters import attach_adapter
    from mlx_nb.model.lanes import lane_count
    from mlx_nb.model.logprobs import TargetScorer
    from mlx_nb.model.recomputing import recomputed_by
    from mlx_nb.model.trees import held_arrays
    from mlx_nb.model.unloaded import unloaded_model
    from mlx_nb.objectives.build import objective_for
    from mlx_nb.train.memory_plan import MemoryPlanner
    from mlx_nb.train.optimizer import build_optimizer
    from mlx_nb.train.packing import packed_as_set
    from mlx_nb.train.step import Stepper
    from mlx_nb.train.update_memory import BatchShape, planned_batch

    given = {"model": "any", "data": [{"text": "any"}], "snapshot_memory": 0, **settings}
    config, shape = RunConfig.from_dict(given), BatchShape(*sizes)
    planned = sum(MemoryPlanner(description, config).peak(shape).values())
    model = unloaded_model(description)
    mx.eval(held_arrays(model))
    attach_adapter(model, config)
    mx.eval(held_arrays(model))
    model.eval()
    scorer = TargetScorer(model, recomputed_by(config))
    objective, optimizer = objective_for(config), build_optimizer(config)
    stepper = Stepper(model, optimizer, objective, scorer, compiled=False, lanes=lane_count())
    batch = packed_as_set(planned_batch(config, scorer.sizes.vocabulary, shape), config.packing, scorer)
    mx.reset_peak_memory()
    for _ in range(2):
        stepper.update([batch], learning_rate=1e-5, grad_clip=None, seed=0, rows=(0,), judge=lambda loss, norm: None)
    return {"planned": planned, "measured": mx.get_peak_memory()}


if __name__ == "__main__":
    main()
