"""What to say to a setting that does not exist: what other programs call so, or the nearest that there is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from mlx_nb.errors import did_you_mean
from mlx_nb.methods import METHODS

# Words of mlx-lm, mlx-lm-lora, TRL and PEFT.
_OTHER_WORDS = {
    "lr": "`learning_rate`",
    "gradient_accumulation_steps": "`grad_accumulation_steps`",
    "train_type": "`fine_tune_type`",
    "max_steps": "`iters`",
    "steps": "`iters`",
    "num_epochs": "`epochs`",
    "dataset": "`data`",
    "hf_dataset": "`data`",
    "mask_prompt": "`loss_on: assistant` (the default) or `loss_on: all`",
    "lora_alpha": "`lora_parameters: {scale: ...}` (alpha / rank)",
    "patience": "`early_stopping_patience`",
    "max_seq_len": "`max_seq_length`",
    "warmup_steps": "`warmup`",
    "train_mode": "`method`",
    "dpo_cpo_loss_type": "`loss`",
    "dpo_loss_type": "`loss`",
    "grpo_loss_type": "`loss`",
    "loss_type": "`loss`",
    "reference_model_path": "`reference_model`",
    "reward_functions": "`rewards`",
    "reward_funcs": "`rewards`",
    "num_generations": "`group_size`",
    "num_iterations": "`updates_per_rollout`",
    "load_in_4bits": "`load_in_bits: 4`",
    "load_in_8bits": "`load_in_bits: 8`",
}


def unknown_setting_hint(key: str, values: Mapping[str, Any], known: Iterable[str], of_lora: Iterable[str]) -> str:
    """The rest of the error about `key`, with a space in front. `of_lora` are the settings inside lora_parameters."""
    method = METHODS.get(str(values.get("method")))
    if method is not None and any(key in loss.options for loss in method.losses.values()):
        value = json.dumps(values[key], default=str)
        return f" It is an option of `method: {method.name}`: write `method_options: {{{key}: {value}}}`."
    if key in _OTHER_WORDS:
        return f" Here it is {_OTHER_WORDS[key]}."
    if key in of_lora:
        return f" It belongs inside: `lora_parameters: {{{key}: ...}}`."
    return did_you_mean(key, known) or " `%%finetune?` lists all settings."
