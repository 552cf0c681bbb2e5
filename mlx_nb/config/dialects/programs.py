"""The programs whose settings are read: how each is recognized, its units, and its defaults in our words.

A new program is an entry in DIALECTS. The defaults are those of the programs' own code where we have read it
(mlx-lm 0.32.2, mlx-lm-lora 5.10.2) and of their documents otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_nb.config.yaml_text import Document
from mlx_nb.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Dialect:
    """One program's settings.

    marks      words that only it has, or has in a form of its own: one of them tells the program
    defaults   its defaults in our words, where they differ from ours
    micro      whether it counts forward passes (`iters`, evaluations, saves) where we count updates
    keys       all of its options, if they are known; others have no effect there
    fixed      options that its command line overrides with this default when they come from a file
    note       what its users should know before the list
    """

    name: str
    marks: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    micro: bool = False
    keys: frozenset[str] = frozenset()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


class ByMethod(dict[str, Any]):
    """A default that depends on the method; `""` is for all others."""

    def of(self, method: str) -> Any:
        """The default for a method."""
        return self.get(method, self.get(""))


_ADAM = {"optimizer": "adam", "optimizer_config": {"bias_correction": False}}
_STILL = {"name": "constant", "warmup": 0}
_CONSTANT = {"lr_schedule": _STILL, "grad_clip": None}
_HUGGING_FACE = {
    "batch_size": 8,
    "epochs": 3,
    "lr_schedule": {"name": "linear_schedule", "warmup": 0},
    "weight_decay": 0.0,
    "seed": 42,
    "steps_per_eval": -1,
}
_MLX_LM = """
    model train fine_tune_type optimizer optimizer_config data seed num_layers batch_size iters val_batches
    learning_rate steps_per_report steps_per_eval resume_adapter_file adapter_path save_every test test_batches
    max_seq_length config grad_checkpoint grad_accumulation_steps clear_cache_threshold lr_schedule lora_parameters
    mask_prompt report_to project_name trust_remote_code hf_dataset prompt_feature completion_feature text_feature
    chat_feature
"""
DIALECTS = {
    one.name: one
    for one in (
        Dialect(
            "lora-studio",
            ("optim.", "adapter.", "train.", "output."),
            note="mlx-lm-lora itself ignores nested keys and trains with its defaults; here they are read.",
        ),
        Dialect(
            "mlx-bun",
            ("model_dir", "data_dir", "save_checkpoints", "dpo_warmup_iters", "dpo_lr_schedule"),
            {
                "lora_parameters": {"rank": 8, "scale": 1.0},
                "iters": 100,
                "learning_rate": ByMethod({"sft": 2e-4, "dpo": 5e-5}),
                "max_seq_length": 512,
                "batch_size": 1,
                "steps_per_eval": 50,
                "loss_on": "final",
                **_CONSTANT,
                "lr_schedule": ByMethod({"sft": _STILL, "dpo": {"name": "cosine_decay", "warmup": 0}}),
            },
        ),
        Dialect(
            "axolotl",
            ("base_model", "micro_batch_size", "sequence_len", "datasets", "lora_target_linear"),
            note="Defaults of axolotl are not added: give what the file leaves out.",
        ),
        Dialect(
            "llama-factory",
            ("finetuning_type", "cutoff_len", "stage", "dataset_dir", "pref_beta", "pref_loss", "lora_target"),
            {**_HUGGING_FACE, "learning_rate": 5e-5, "lora_parameters": {"rank": 8, "scale": 2.0}},
        ),
        Dialect(
            "mlx-lm-lora",
            (
                *("train_type", "train_mode", "gradient_accumulation_steps+iters", "load_in_4bits", "load_in_6bits"),
                *("load_in_8bits", "load_in_mxfp4", "dpo_cpo_loss_type", "qat_enable"),
                *("lm_studio_name", "grpo_loss_type", "sft_loss_type"),
            ),
            {
                **_ADAM,
                **_CONSTANT,
                "batch_size": 1,
                "iters": 1000,
                "learning_rate": 1e-5,
                "lora_parameters": {"scale": 10.0},
                "steps_per_eval": 200,
                "test_batches": 500,
                "loss_on": "all",
                "max_completion_length": 512,
                "beta": 0.1,
            },
            micro=True,
            fixed={
                "gradient_accumulation_steps": 1,
                "sft_loss_type": "nll",
                "dpo_cpo_loss_type": "sigmoid",
                "delta": 50.0,
                "reward_scaling": 1.0,
                "group_size": 4,
                "max_completion_length": 512,
                "epsilon": 1e-4,
                "temperature": 1.0,
                "grpo_loss_type": "grpo",
                "importance_sampling_level": "token",
            },
        ),
        Dialect(
            "trl",
            (
                *("per_device_train_batch_size", "num_train_epochs", "model_name_or_path", "lr_scheduler_type"),
                *("max_steps", "lora_alpha", "output_dir", "full_finetuning", "random_state", "gradient_checkpointing"),
            ),
            {**_HUGGING_FACE, "max_seq_length": 1024, "learning_rate": ByMethod({"sft": 2e-5, "": 1e-6})},
            note="Without settings of LoRA, TRL trains all weights; here that is `fine_tune_type: full`.",
        ),
        Dialect(
            "mlx-lm",
            ("train", "mask_prompt", "steps_per_report", "hf_dataset", "clear_cache_threshold", "lora_layers"),
            {
                **_ADAM,
                **_CONSTANT,
                "num_layers": 16,
                "iters": 1000,
                "learning_rate": 1e-5,
                "steps_per_eval": 200,
                "test_batches": 500,
                "loss_on": "all",
                "val_set_size": 0.0,
            },
            micro=True,
            keys=frozenset(_MLX_LM.split()),
        ),
    )
}


def dialect_named(name: str) -> Dialect:
    """The dialect. Raises ConfigError for an unknown name."""
    if name not in DIALECTS:
        raise ConfigError(
            f"`dialect` cannot be {name!r}.{did_you_mean(name, DIALECTS)} It is one of: {', '.join(sorted(DIALECTS))}."
        )
    return DIALECTS[name]


def dialect_of(document: Document, program: str = "") -> Dialect | None:
    """The program that a text belongs to: named by `program`, or by words that only it has; None if it may be ours."""
    if program:
        return DIALECTS["mlx-lm-lora" if program.startswith("mlx_lm_lora") or _is_lora(document) else "mlx-lm"]
    values = document.values
    for dialect in DIALECTS.values():
        if any(_has(values, mark) for mark in dialect.marks):
            return dialect
    return None


def _is_lora(document: Document) -> bool:
    """Whether the options of a command are mlx-lm-lora's, whose documents also write `mlx_lm.lora`."""
    return "train_mode" in document.values or "group_size" in document.values


def _has(values: Mapping[str, Any], mark: str) -> bool:
    if mark.endswith("."):
        return isinstance(values.get(mark[:-1]), Mapping)
    return all(word in values for word in mark.split("+"))
