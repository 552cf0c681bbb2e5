"""The keys of other programs whose meaning depends on their value or on other keys: a function for each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mlx_nb.config.dialects.given import Given, Rule, as_here, lacks_validation, renamed
from mlx_nb.config.dialects.records import Meaning
from mlx_nb.config.hints import is_off, method_lines
from mlx_nb.config.named_templates import NAMED_TEMPLATES
from mlx_nb.config.neighbor_words import OFF, TEMPLATE_OF_MODEL, UNSUPPORTED, VALUES
from mlx_nb.config.yaml_text import read_value


def _alpha(given: Given) -> Meaning:
    rank = given.first("rank", "r", "lora_r", "lora_rank")
    group = given.around.get("lora_parameters")
    if rank is None and isinstance(group, Mapping):
        rank = group.get("rank", group.get("r"))
    alpha = given.value
    if rank is None:
        rank = 16 if given.dialect.name in ("axolotl", "trl") else 8
    if not all(isinstance(one, int | float) and not isinstance(one, bool) and one > 0 for one in (alpha, rank)):
        return Meaning("not here", {}, "alpha and rank are numbers above 0")
    root = str(given.around.get("use_rslora")).lower() not in OFF
    scale = alpha / (math.sqrt(rank) if root else rank)
    note = f"alpha / {'sqrt(rank)' if root else 'rank'}, with rank {rank}"
    return Meaning("converted", {"lora_parameters": {"scale": scale}}, note)


def _rslora(given: Given) -> Meaning:
    if not given.is_on:
        return Meaning("ignored", {}, "it is off")
    return Meaning("converted", {}, "it is in the scale: alpha / sqrt(rank)")


def _counted(name: str) -> Rule:
    """A number of forward passes there, if the program counts those, and of updates here. -1 stays."""

    def rule(given: Given) -> Meaning:
        value, parts = given.value, given.accumulation
        if name == "steps_per_eval" and lacks_validation(given.dialect, given.around):
            return Meaning("ignored", {}, "there is no valid.jsonl")
        if value is None or not isinstance(value, int | float) or isinstance(value, bool):
            return renamed(given, name)
        if not given.dialect.micro or parts == 1 or value < 1:
            return renamed(given, name)
        updates = max(1, int(value) // parts)
        left = (
            "" if name != "iters" or value % parts == 0 else f"; the last {int(value) % parts} are in no update there"
        )
        note = f"there it counts forward passes, {parts} in an update{left}"
        return Meaning("converted", {name: updates}, note)

    return rule


def _epochs(given: Given) -> Meaning:
    steps = given.first("max_steps", "iters", "steps")
    if isinstance(steps, int | float) and steps > 0:
        return Meaning("ignored", {}, "the number of steps goes before it")
    return renamed(given, "epochs")


def _accumulate(given: Given) -> Meaning:
    note = ""
    if given.accumulation > 1 and given.dialect.micro:
        note = "there each pass counts the same, here each token"
    return as_here(given, {"grad_accumulation_steps": given.value}, note)


def _loss_on(on: str, off: str, note: str = "") -> Rule:
    """A switch for which tokens are trained. Only rows to imitate have that choice."""

    def rule(given: Given) -> Meaning:
        if given.value is None:
            return Meaning("ignored", {}, "the default here")
        lines = method_lines(str(given.first("method", "train_mode", "stage", "rl") or "sft"))
        if lines.get("method", "sft") != "sft":
            return Meaning("ignored", {}, "answers alone are trained with this method")
        return Meaning("converted", {"loss_on": on if given.is_on else off}, note if given.is_on else "")

    return rule


def _roles(given: Given) -> Meaning:
    roles = given.value if isinstance(given.value, list) else [given.value]
    if set(map(str, roles)) <= {"assistant", "gpt", "model"}:
        return Meaning("converted", {"loss_on": "assistant"})
    return Meaning("not here", {}, "only the assistant's turns are trained, or everything: `loss_on: all`")


def _schedule(given: Given) -> Meaning:
    value = given.value
    if isinstance(value, Mapping):
        warmup = value.get("warmup")
        known = {
            key: value[key] for key in ("name", "arguments", "warmup", "warmup_init") if value.get(key) is not None
        }
        if "warmup" not in known:
            known["warmup"] = 0
        note = "" if not warmup else "there the first update has the rate warmup_init, here the rise begins with it"
        return as_here(given, {"lr_schedule": known}, note)
    if value is None:
        return Meaning("ignored", {}, "no schedule")
    name = str(value).lower()
    if name == "constant_with_warmup":
        name = "constant"
    return as_here(given, {"lr_schedule": {"name": name}})


def _warmup(given: Given) -> Meaning:
    value = given.value
    if isinstance(value, float) and 0 < value < 1:
        return _warmup_ratio(given)
    return as_here(given, {"lr_schedule": {"warmup": value}} if value is not None else {})


def _warmup_ratio(given: Given) -> Meaning:
    if not given.is_on or given.value == 0:
        return Meaning("converted", {"lr_schedule": {"warmup": 0}})
    if given.first("warmup_steps"):
        return Meaning("ignored", {}, "warmup_steps goes before it")
    steps = given.first("max_steps", "iters")
    if not isinstance(steps, int) or steps < 1:
        return Meaning("not here", {}, "a share needs the number of updates: write `warmup: N`")
    return Meaning("converted", {"lr_schedule": {"warmup": math.ceil(steps * float(given.value))}}, "of the updates")


def _betas(given: Given) -> Meaning:
    betas = [given.around.get("adam_beta1", 0.9), given.around.get("adam_beta2", 0.999)]
    return Meaning("converted", {"optimizer_config": {"betas": betas}})


def _optimizer(given: Given) -> Meaning:
    if given.value is None:
        return Meaning("ignored", {}, "the default here")
    name = VALUES["optimizer"].get(str(given.value), given.value)
    return as_here(given, {"optimizer": name})


def _optimizer_config(given: Given) -> Meaning:
    chosen = str(given.first("optimizer", "optim") or "adam")
    inner = given.value.get(chosen, given.value) if isinstance(given.value, Mapping) else given.value
    nested = isinstance(given.value, Mapping) and chosen in given.value
    if (
        not nested
        and isinstance(given.value, Mapping)
        and any(isinstance(one, Mapping) for one in given.value.values())
    ):
        inner = {}
    if inner in ({}, None):
        return Meaning("ignored", {}, "it is empty")
    return as_here(given, {"optimizer_config": inner})


def _strategy(name: str, word: str) -> Rule:
    """When to validate or save: never, or as another key says."""

    def rule(given: Given) -> Meaning:
        if not given.is_on:
            return Meaning("converted", {name: -1})
        if str(given.value) == "steps":
            return Meaning("ignored", {}, f"`{word}` says how often")
        return Meaning("ignored", {}, f"`{name}` counts updates here, not epochs; it stays at its default")

    return rule


def _dataset(given: Given) -> Meaning:
    """`hf_dataset` or `datasets`: one mapping or a list of them; others are names."""
    sources = given.value if isinstance(given.value, list) else [given.value]
    taken = [_source(one) for one in sources]
    if any(source is None for source in taken):
        return Meaning("not here", {}, "each dataset needs a path, and splits by name without slices")
    if len(taken) == 1 and taken[0] is not None:
        one = dict(taken[0])
        return Meaning("converted", {"data": one.pop("path"), **one})
    return Meaning("converted", {"data": taken}, "mixed by number of rows" if len(taken) > 1 else "")


def _source(one: Any) -> dict[str, Any] | None:
    if isinstance(one, str):
        return {"path": one}
    if not isinstance(one, Mapping) or not isinstance(one.get("path"), str):
        return None
    config = one.get("config")
    subset = config.get("name") if isinstance(config, Mapping) else one.get("name")
    source = {"path": one["path"], "subset": subset}
    for key, name in {"split": "train_split", "field_messages": "chat_feature"}.items():
        source[name] = one.get(key)
    for key, value in one.items():
        if key.endswith(("_split", "_feature")):
            source[key] = value
    if any("[" in str(source.get(key)) for key in ("train_split", "valid_split", "test_split")):
        return None
    return {key: value for key, value in source.items() if value is not None}


def _data(given: Given) -> Meaning:
    value = given.value
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return Meaning("converted", {"data": value[0]})
    if value == "auto":
        return Meaning("not here", {}, "name the rows in `data`")
    return as_here(given, {"data": value})


def _adapter(given: Given) -> Meaning:
    if not given.is_on:
        return Meaning("converted", {"fine_tune_type": "full"})
    return Meaning("converted", {"fine_tune_type": VALUES["fine_tune_type"].get(str(given.value), given.value)})


def _fine_tune_type(given: Given) -> Meaning:
    value = str(given.value)
    if method_lines(value):
        return Meaning("converted", method_lines(value), "it is a method, not a kind of adapter")
    becomes = {"fine_tune_type": VALUES["fine_tune_type"].get(value, value)}
    note = "there embeddings, norm and head stay frozen" if value == "full" and given.dialect.micro else ""
    return as_here(given, becomes, note)


def _loss(given: Given) -> Meaning:
    """The variant of a loss; a name that is a method of its own here, such as orpo, selects that."""
    value = given.value
    if value in (None, "none"):
        return Meaning("ignored", {}, "the default here")
    if value == "klear":
        return Meaning("not here", {}, f"mlx_nb has no loss {value}")
    method = method_lines(str(given.first("method", "train_mode", "stage", "rl") or "sft")).get("method", "sft")
    owner = method_lines(str(value))
    of_pairs = given.word in ("dpo_cpo_loss_type", "dpo_loss_type", "pref_loss")
    if (of_pairs and method not in ("dpo", "cpo", "orpo")) or (given.word == "grpo_loss_type" and method != "grpo"):
        return Meaning("ignored", {}, f"it has no effect with method {method}")
    if owner and owner["method"] != method and given.word in ("pref_loss", "loss_type"):
        return as_here(given, owner)
    note = "there every loss trains as sigmoid" if of_pairs and method == "dpo" and value != "sigmoid" else ""
    note = note if given.dialect.name == "mlx-lm-lora" else ""
    return as_here(given, {"loss": value}, note)


def _rewards(given: Given) -> Meaning:
    value = given.value
    if isinstance(value, str):
        value = [one.strip() for one in value.split(",") if one.strip()]
    return as_here(given, {"rewards": value}) if value else Meaning("ignored", {}, "the default here")


def _reward_weights(given: Given) -> Meaning:
    value = given.value
    if isinstance(value, str):  # mlx-lm-lora takes one text
        value = [read_value(one) for one in value.strip("[]").split(",")]
    return as_here(given, {"reward_weights": value}) if value else Meaning("ignored", {}, "the default here")


def _template(given: Given) -> Meaning:
    value = str(given.value)
    if not given.is_on or value in TEMPLATE_OF_MODEL:
        return Meaning("ignored", {}, "the chat template is that of the model")
    if value in NAMED_TEMPLATES or "{" in value or "/" in value or value.endswith(".jinja"):
        return as_here(given, {"chat_template": value})
    return Meaning("ignored", {}, f"the chat template is that of the model; {value} is not known by name")


def _layers(given: Given) -> Meaning:
    return Meaning("not here", {}, "only the last N layers can be chosen: `num_layers: N`")


def _max_norm(given: Given) -> Meaning:
    return as_here(given, {"grad_clip": None if is_off(given.value) else given.value})


def _modules(given: Given) -> Meaning:
    return renamed(given, "target_modules")


def _format(given: Given) -> Meaning:
    if given.is_on:
        return Meaning("ignored", {}, "conversations always get the chat template")
    return Meaning("converted", {"prompt_format": "raw"}, "for prompts and completions that are strings")


def _rank_scaling(given: Given) -> Meaning:
    if str(given.value) == "constant":
        return Meaning("ignored", {}, "the default here")
    return Meaning("not here", {}, f"mlx_nb has no {UNSUPPORTED['rank_scaling']}")


def _num_layers(given: Given) -> Meaning:
    return as_here(given, {"num_layers": given.value})


def _resume(given: Given) -> Meaning:
    if given.value in (None, "", False):
        return Meaning("ignored", {}, "none")
    return as_here(given, {"resume_adapter_file": given.value}, "only the weights, as there")


def _report_to(given: Given) -> Meaning:
    names = given.value if isinstance(given.value, list) else [given.value]
    if not given.is_on or names in (["none"], ["all"]):
        return Meaning("ignored", {}, "nothing is reported")
    return as_here(given, {"report_to": given.value})


def _wandb(given: Given) -> Meaning:
    if not given.is_on:
        return Meaning("ignored", {}, "nothing is reported")
    return Meaning("converted", {"report_to": "wandb", "project_name": str(given.value)})


def _project(given: Given) -> Meaning:
    if given.first("report_to") is None:
        return Meaning("ignored", {}, "nothing is reported")
    return renamed(given, "project_name")


RULES: dict[str, Rule] = {
    **dict.fromkeys(("lora_alpha", "alpha"), _alpha),
    "use_rslora": _rslora,
    "iters": _counted("iters"),
    "steps_per_eval": _counted("steps_per_eval"),
    "save_every": _counted("save_every"),
    **dict.fromkeys(("epochs", "num_train_epochs", "num_epochs"), _epochs),
    **dict.fromkeys(("grad_accumulation_steps", "gradient_accumulation_steps", "accumulation_steps"), _accumulate),
    "mask_prompt": _loss_on("final", "all", "of a conversation only the last message is trained there"),
    "train_on_inputs": _loss_on("all", "assistant"),
    "completion_only_loss": _loss_on("assistant", "all"),
    "assistant_only_loss": _loss_on("assistant", "all"),
    "train_on_responses_only": _loss_on("assistant", "all"),
    "mask_history": _loss_on("final", "assistant"),
    "roles_to_train": _roles,
    **dict.fromkeys(("lr_schedule", "lr_scheduler_type", "lr_scheduler", "scheduler", "schedule"), _schedule),
    "dpo_lr_schedule": _schedule,
    **dict.fromkeys(("warmup", "warmup_steps", "warmup_iters", "num_warmup_steps", "dpo_warmup_iters"), _warmup),
    "warmup_ratio": _warmup_ratio,
    **dict.fromkeys(("adam_beta1", "adam_beta2"), _betas),
    **dict.fromkeys(("optimizer", "optim"), _optimizer),
    "optimizer_config": _optimizer_config,
    **dict.fromkeys(("eval_strategy", "evaluation_strategy"), _strategy("steps_per_eval", "eval_steps")),
    "save_strategy": _strategy("save_every", "save_steps"),
    **dict.fromkeys(("hf_dataset", "datasets"), _dataset),
    **dict.fromkeys(("data", "dataset", "dataset_name", "data_dir"), _data),
    "adapter": _adapter,
    **dict.fromkeys(("fine_tune_type", "train_type", "finetuning_type", "fine_tuning_type"), _fine_tune_type),
    **dict.fromkeys(
        ("loss", "loss_type", "pref_loss", "dpo_cpo_loss_type", "dpo_loss_type", "grpo_loss_type", "sft_loss_type"),
        _loss,
    ),
    **dict.fromkeys(("reward_functions", "reward_funcs"), _rewards),
    "reward_weights": _reward_weights,
    **dict.fromkeys(("template", "chat_template"), _template),
    "report_to": _report_to,
    "project_name": _project,
    **dict.fromkeys(("wandb", "wandb_project"), _wandb),
    "layers_to_transform": _layers,
    **dict.fromkeys(("max_grad_norm", "gradient_clipping", "clip_grad_norm"), _max_norm),
    **dict.fromkeys(("lora_target", "lora_target_modules"), _modules),
    "use_chat_template": _format,
    "rank_scaling": _rank_scaling,
    **dict.fromkeys(("num_layers", "lora_layers"), _num_layers),
    **dict.fromkeys(("resume_adapter_file", "adapter_name_or_path", "lora_model_dir"), _resume),
    "lora_target_linear": lambda given: Meaning("ignored", {}, "every linear layer is adapted by default"),
}
