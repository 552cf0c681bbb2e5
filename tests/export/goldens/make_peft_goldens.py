"""Writes the folders beside it: adapters that real PEFT trained on a small fixed llama, and the logits that it gives.

    python -m venv peft && peft/bin/pip install torch transformers==5.24.0 peft==0.21.2
    PYTHONPATH=tests/support peft/bin/python tests/export/goldens/make_peft_goldens.py

Needs torch and PEFT, not mlx_nb, and is run by hand; tests/export/test_peft.py compares mlx_nb with the files.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from fixed_llama import TOKENS, write_fixed_llama

FOLDER = Path(__file__).parent
ATTENTION, EVERY = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# By name: settings of LoraConfig, and whether the head shares the embedding's weights.
CASES = {
    "lora": ({"r": 4, "lora_alpha": 6, "target_modules": ATTENTION}, True),
    "lora-2": ({"r": 4, "lora_alpha": 4, "target_modules": ATTENTION}, True),
    "dora": ({"r": 2, "lora_alpha": 3, "target_modules": EVERY, "use_dora": True}, True),
    "rslora": ({"r": 3, "lora_alpha": 5, "target_modules": EVERY, "use_rslora": True}, True),
    "last-layers": ({"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "layers_to_transform": [1, 2]}, True),
    "some-layers": ({"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "layers_to_transform": [0, 2]}, True),
    "patterns": (
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": EVERY,
            "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 6},
            "alpha_pattern": {"down_proj": 5, "up_proj": 1},
        },
        True,
    ),
    "ranks": (
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": EVERY,
            "rank_pattern": {"down_proj": 2},
            "alpha_pattern": {"down_proj": 4},
        },
        True,
    ),
    "embedding-and-head": ({"r": 3, "lora_alpha": 6, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}, False),
    "embedding": ({"r": 3, "lora_alpha": 6, "target_modules": ["embed_tokens", "q_proj"]}, False),
    "refused-tied-embedding": ({"r": 3, "target_modules": ["embed_tokens", "q_proj"]}, True),
    "refused-modules-to-save": ({"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    "refused-embedding-dora": ({"r": 2, "target_modules": ["embed_tokens"], "use_dora": True}, False),
    "refused-bias": ({"r": 2, "target_modules": ["q_proj"], "lora_bias": True}, True),
    "refused-pissa": ({"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "pissa"}, True),
}


def logits(model: torch.nn.Module) -> list[list[float]]:
    """(T, V) logits of the fixed tokens."""
    model.eval()
    with torch.no_grad():
        return [[float(f"{value:.7g}") for value in row] for row in model(torch.tensor([TOKENS])).logits[0].tolist()]


def train(model: torch.nn.Module, seed: int) -> None:
    """A few updates on random tokens, at a rate high enough that the adapter changes the logits visibly."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.05)
    for _ in range(6):
        tokens = torch.randint(0, 40, (4, 12))
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    warnings.simplefilter("ignore")
    found = {}
    with tempfile.TemporaryDirectory() as place:
        bases = {tied: write_fixed_llama(Path(place) / str(tied), tied=tied) for tied in (True, False)}

        def base(tied: bool) -> torch.nn.Module:
            return AutoModelForCausalLM.from_pretrained(bases[tied], dtype=torch.float32)

        for tied in bases:
            found[f"base-{'tied' if tied else 'untied'}"] = logits(base(tied))
        for number, (name, (settings, tied)) in enumerate(CASES.items()):
            torch.manual_seed(number)
            model = get_peft_model(base(tied), LoraConfig(task_type="CAUSAL_LM", **settings))
            train(model, number)
            shutil.rmtree(FOLDER / name, ignore_errors=True)
            model.save_pretrained(FOLDER / name)
            (FOLDER / name / "README.md").unlink()
            path = FOLDER / name / "adapter_config.json"
            described = json.loads(path.read_text())
            described["base_model_name_or_path"] = f"fixed-llama-{'tied' if tied else 'untied'}"
            path.write_text(json.dumps({**described, "target_modules": sorted(described["target_modules"])}, indent=2))
            found[name] = logits(PeftModel.from_pretrained(base(tied), FOLDER / name))
        model = PeftModel.from_pretrained(base(True), FOLDER / "lora", adapter_name="one")
        model.load_adapter(FOLDER / "lora-2", adapter_name="two")
        for how in ("linear", "cat"):
            model.add_weighted_adapter(["one", "two"], [0.7, 0.5], how, combination_type=how)
            model.set_adapter(how)
            found[f"merged-{how}"] = logits(model)
    (FOLDER / "logits.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
