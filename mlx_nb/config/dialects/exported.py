"""Writes our settings as YAML that mlx-lm or mlx-lm-lora runs, with a line about what those programs cannot do.

Both count forward passes where we count updates, and both begin their warm-up at `warmup_init`, one update before ours
begins; the numbers are converted so that each update has the same learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_nb.config.checks import tracker_names
from mlx_nb.config.dialects.records import Line, Meaning, as_yaml, report
from mlx_nb.config.optimizers import OPTIMIZERS
from mlx_nb.config.run_config import RunConfig
from mlx_nb.errors import ConfigError, did_you_mean

EXPORTED = ("mlx-lm", "mlx-lm-lora")
_METHODS = {"mlx-lm": ("sft",), "mlx-lm-lora": ("sft", "dpo", "cpo", "orpo", "grpo")}
_OPTIMIZERS = {"mlx-lm": ("adam", "adamw", "muon", "sgd", "adafactor"), "mlx-lm-lora": ("adam", "adamw", "muon")}
_FEATURES = ("chat_feature", "prompt_feature", "completion_feature", "text_feature")
_PAIR_FEATURES = ("chosen_feature", "rejected_feature", "preference_score_feature", "system_feature", "answer_feature")
# What the other programs cannot do, and what differs then.
_LOST = {
    "grad_clip": "gradients are not clipped there",
    "loraplus_lr_ratio": "all matrices learn at one rate there",
    "special_tokens_in_text": "control tokens in texts stay control tokens there",
    "truncate": "long rows are cut at their end there",
    "leave_out": "all rows are trained there",
    "down_weight": "all rows count the same there",
    "roles": "roles are user, assistant and system there",
    "chat_template": "the template is that of the model there",
    "prompt_format": "prompts and completions get the chat template there",
    "segment_size": "there is none there; `grad_checkpoint` saves memory",
    "efficient_long_context": "left out, because there keys and values of earlier chunks get no gradient",
    "label_smoothing": "there is none there",
    "z_loss": "there is none there",
    "loss": "its loss differs there",
    "cpo_alpha": "the likelihood term is left out there",
    "early_stopping_patience": "nothing stops early there",
    "metrics": "answers are not judged there",
    "stop": "only the end token ends a completion there",
    "top_p": "completions are sampled from all tokens there",
    "top_k": "completions are sampled from all tokens there",
    "scale_rewards": "advantages are divided by the deviation in the group there",
    "updates_per_rollout": "each set of completions gives one update there",
    "mask_truncated_completions": "cut completions are trained there",
    "report_to": "nothing is reported to it there",
    "reference_adapter": "the reference is a model there",
}


@dataclass(frozen=True)
class Exported:
    """YAML for another program, and a line for each of our settings that it has not, or has otherwise."""

    dialect: str
    settings: Mapping[str, Any]
    lines: tuple[Line, ...]

    @property
    def yaml(self) -> str:
        """The text of the file."""
        return as_yaml(self.settings)

    @property
    def command(self) -> str:
        """The command that runs the file `FILE`."""
        return "mlx_lm.lora --config" if self.dialect == "mlx-lm" else "mlx_lm_lora.train --config"

    def save(self, path: str | Path) -> Path:
        """Write a new file with the settings. Raises ConfigError if there is one, or if it cannot be written."""
        path = Path(path).expanduser()
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(self.yaml)
        except FileExistsError:
            raise ConfigError(f"{path} exists. Give the name of a new file.") from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}.") from None
        return path

    def __str__(self) -> str:
        return report(f"Written for {self.dialect}.", self.lines) if self.lines else f"Written for {self.dialect}."


def export_settings(config: RunConfig, dialect: str, *, iters: int | None = None) -> Exported:
    """The settings as YAML for `mlx-lm` or `mlx-lm-lora`.

    `iters` are the updates of a run whose length is given in epochs; without it mlx-lm-lora gets the epochs. Raises
    ConfigError for an unknown program, and for a method, an optimizer or rows that it does not have.
    """
    if dialect not in EXPORTED:
        raise ConfigError(
            f"settings are not written for {dialect!r}.{did_you_mean(dialect, EXPORTED)} They are written for "
            f"{' and '.join(EXPORTED)}."
        )
    _refuse(config, dialect, iters)
    is_lm, parts = dialect == "mlx-lm", config.grad_accumulation_steps
    updates = config.iters or iters
    settings: dict[str, Any] = {"model": config.model, "train": True, "data": config.data, "seed": config.seed}
    settings["fine_tune_type" if is_lm else "train_type"] = config.fine_tune_type
    if not is_lm:
        settings |= {"train_mode": config.method, **_method_settings(config)}
        if config.load_in_bits is not None:
            settings[f"load_in_{config.load_in_bits}bits"] = True
    settings |= {
        "num_layers": config.num_layers,
        "lora_parameters": _lora_parameters(config),
        "optimizer": config.optimizer,
        "optimizer_config": {config.optimizer: _optimizer_arguments(config)},
        "learning_rate": config.learning_rate,
        "batch_size": config.batch_size,
        "grad_accumulation_steps" if is_lm else "gradient_accumulation_steps": parts,
    }
    if updates is not None:
        settings["iters"] = updates * parts
        settings |= _schedule(config, updates)
    else:
        settings["epochs"] = config.epochs or 1
    every = config.steps_per_eval if config.steps_per_eval is not None else max(1, (updates or 1000) // 5)
    settings |= {
        "steps_per_eval": _passes(every, parts),
        "save_every": _passes(config.save_every, parts),
        "val_batches": config.val_batches,
        "test": config.test,
        "test_batches": config.test_batches,
        "max_seq_length": config.max_seq_length,
        "grad_checkpoint": config.grad_checkpoint,
        "mask_prompt": config.loss_on != "all",
        "adapter_path": config.adapter_path or "adapters",
    }
    trackers = [name for name in tracker_names(config.report_to) if is_lm and name in ("wandb", "swanlab")]
    if trackers:
        settings |= {"report_to": ",".join(trackers), "project_name": config.project_name or "mlx_nb"}
    if config.resume_adapter_file is not None:
        settings["resume_adapter_file"] = _adapter_file(config.resume_adapter_file)
    features = _FEATURES if is_lm else (*_FEATURES, *_PAIR_FEATURES)
    settings |= {name: getattr(config, name) for name in features if getattr(config, name) is not None}
    return Exported(dialect, settings, tuple(_differences(config, dialect, set(settings))))


def _refuse(config: RunConfig, dialect: str, iters: int | None) -> None:
    """Raise ConfigError for what the program cannot run at all."""
    if config.method not in _METHODS[dialect]:
        raise ConfigError(f"{dialect} has no `method: {config.method}`. It has: {', '.join(_METHODS[dialect])}.")
    if config.optimizer not in _OPTIMIZERS[dialect]:
        known = ", ".join(_OPTIMIZERS[dialect])
        raise ConfigError(f"{dialect} has no `optimizer: {config.optimizer}`. It has: {known}.")
    if not isinstance(config.data, str):
        raise ConfigError(
            f"{dialect} reads rows from a folder with train.jsonl or from the hub, not from memory or a mixture. "
            "Write them to a folder, and name it in `data`."
        )
    if dialect == "mlx-lm" and config.load_in_bits is not None:
        raise ConfigError(
            f"mlx-lm does not quantize when it loads. `mlx_lm.convert --hf-path {config.model} -q --q-bits "
            f"{config.load_in_bits}` does it once; name its folder in `model`."
        )
    if dialect == "mlx-lm-lora" and config.load_in_bits in (2, 3):
        raise ConfigError("mlx-lm-lora quantizes to 4, 6 or 8 bits. Set `load_in_bits` to one of them.")
    if dialect == "mlx-lm" and config.iters is None and iters is None:
        raise ConfigError(
            "mlx-lm counts iterations, not epochs, and their number depends on the rows. Set `iters`, or export from a "
            "run that has its rows."
        )


def _lora_parameters(config: RunConfig) -> dict[str, Any]:
    lora = config.lora_parameters
    keys = {} if lora.keys is None else {"keys": list(lora.keys)}
    return {"rank": lora.rank, "scale": lora.scale, "dropout": lora.dropout, **keys}


def _optimizer_arguments(config: RunConfig) -> dict[str, Any]:
    facts = OPTIMIZERS[config.optimizer]
    decay = {"weight_decay": config.weight_decay} if facts.decays else {}
    return {**facts.standard, **config.optimizer_config, **decay}


def _schedule(config: RunConfig, updates: int) -> dict[str, Any]:
    """mlx-lm's `lr_schedule`, which gives every update the learning rate that it has here."""
    schedule, peak = config.lr_schedule, config.learning_rate
    warmup = min(math.ceil(0.05 * updates), 100) if schedule.warmup is None else min(schedule.warmup, updates)
    if schedule.name == "constant" and not warmup:
        return {}
    length = max(1, (config.schedule_iters or updates) - warmup)
    arguments = {
        "constant": [peak, peak, 1],
        "cosine_decay": [peak, length],
        "linear_schedule": [peak, 0.0, length],
    }.get(schedule.name, [])
    if schedule.arguments is not None:
        arguments = list(schedule.arguments)
    elif not arguments:
        return {}
    name = "linear_schedule" if schedule.name == "constant" else schedule.name
    written: dict[str, Any] = {"name": name, "arguments": arguments}
    if warmup > 1:
        first = schedule.warmup_init + (peak - schedule.warmup_init) / warmup
        written |= {"warmup": warmup - 1, "warmup_init": first}
    return {"lr_schedule": written}


def _passes(every: int, parts: int) -> int:
    """An interval in forward passes; never is an interval that no run reaches."""
    return 10**9 if every == -1 else every * parts


def _adapter_file(given: str) -> str:
    return given if given.endswith(".safetensors") else f"{given.rstrip('/')}/adapters.safetensors"


def _method_settings(config: RunConfig) -> dict[str, Any]:
    if config.method == "sft":
        return {"sft_loss_type": config.loss} if config.loss else {}
    settings: dict[str, Any] = {}
    if config.beta is not None:
        settings["beta"] = config.beta
    if config.method in ("dpo", "cpo"):
        settings |= {"dpo_cpo_loss_type": config.loss or "sigmoid", "delta": config.delta or 50.0}
    if config.reference_model is not None:
        settings["reference_model_path"] = config.reference_model
    if config.method == "grpo":
        settings |= {
            "group_size": config.group_size,
            "max_completion_length": config.max_completion_length,
            "temperature": config.temperature,
            "grpo_loss_type": config.loss or "grpo",
            "importance_sampling_level": config.importance_sampling_level or "token",
            "reward_functions": ",".join(map(str, config.to_dict()["rewards"] or [])),
        }
        if config.reward_weights is not None:
            settings["reward_weights"] = ",".join(map(str, config.reward_weights))
    return settings


def _differences(config: RunConfig, dialect: str, written: set[str]) -> Iterator[Line]:
    """A line for each setting that the program does not have, and for what it does in another way."""
    changed = config.changed()
    for name, why in _LOST.items():
        value = config.to_dict()[name]
        clips = name == "grad_clip" and config.grad_clip is not None
        if (clips or name in changed) and name not in written:
            if name == "loss" and dialect == "mlx-lm-lora":
                continue
            yield Line(name, value, Meaning("not here", {}, why))
    if config.loss_on == "assistant":
        note = "of a conversation only the last message is trained there"
        yield Line("loss_on", config.loss_on, Meaning("converted", {"mask_prompt": True}, note))
    if config.grad_accumulation_steps > 1:
        note = "iterations are forward passes there, and each pass counts the same, here each token"
        yield Line("grad_accumulation_steps", config.grad_accumulation_steps, Meaning("converted", {}, note))
    if dialect == "mlx-lm-lora" and config.method == "dpo" and config.loss not in (None, "sigmoid"):
        yield Line("loss", config.loss, Meaning("not here", {}, "every dpo loss trains as sigmoid there"))
