"""Compares a checkpoint with the current settings, data and model, and decides whether the run can be resumed."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_nb.config.optimizers import has_no_decay
from mlx_nb.config.run_config import FUNCTIONS, LENGTHS, PATHS, SETTINGS, RunConfig, located
from mlx_nb.data.examples.batches import Place
from mlx_nb.errors import CheckpointError, ConfigError, did_you_mean, listed_problems, shown
from mlx_nb.events import Event, Request, RunStarted, SettingChanged, event_from_json, request_from_json
from mlx_nb.events.history import History
from mlx_nb.files.history_file import HISTORY_FILE, read_history
from mlx_nb.files.places import check_name
from mlx_nb.files.typed_json import read_as
from mlx_nb.run.fingerprints import MADE_FROM

if TYPE_CHECKING:
    from mlx_nb.train.checkpoint import Checkpoint
    from mlx_nb.train.record import RunRecord

_GROUPS = tuple(name for name in SETTINGS if dataclasses.is_dataclass(getattr(RunConfig(), name)))

_READABLE = ("device", "mlx version")  # fingerprints in plain words instead of digests


def working_folder_of(checkpoint: Checkpoint, run_folder: Path) -> Path:
    """The folder that relative paths in a checkpoint's settings refer to now.

    If the whole project was copied, that is the copy. If only the run's folder was copied, it is the original folder;
    if that no longer exists, it is the working folder of the process.
    """
    recorded = checkpoint.state.get("working_folder") or {}
    candidates = [Path(recorded["path"])] if "path" in recorded else []
    if "from_run" in recorded:
        candidates.insert(0, Path(os.path.realpath(run_folder / recorded["from_run"])))
    config = checkpoint.state["config"]
    names = [name for name in PATHS if isinstance(config.get(name), str)]
    return max(
        [*candidates, Path.cwd()],
        key=lambda folder: sum(os.path.isabs(str(located(config[name], folder))) for name in names),
    )


def history_of(checkpoint: Checkpoint) -> History:
    """The history stored in a checkpoint, or in the files that it refers to."""
    return read_history_of(checkpoint)[0]


def read_history_of(checkpoint: Checkpoint) -> tuple[History, list[str]]:
    """The history of a checkpoint, and a message for each problem with it."""
    lines, problems, whole = checkpoint.state["history"], list[str](), False
    if parts := checkpoint.state.get("history_parts"):
        assert checkpoint.path is not None
        lines, problems = read_history(checkpoint.path.parent, parts)
        whole = not problems  # every byte is as written
    history = History()
    for number, line in enumerate(lines):
        try:
            event = event_from_json(line)
            history.append(event if whole else _typed(event))
        except _FOREIGN as error:
            unknown = f"event {number} of the history is unknown ({_reason(error)}), so the history ends before it"
            return history, [*problems, unknown]
    return history, problems


def requests_of(checkpoint: Checkpoint) -> list[Request]:
    """The requests that were pending when the checkpoint was written."""
    return [_typed(request_from_json(line)) for line in checkpoint.state.get("asked", ())]


# Errors raised while reading a file of another mlx_nb version or of another program.
_FOREIGN = (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError, OverflowError)


def _reason(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())


def refuse_unusable(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for an undamaged checkpoint whose contents cannot be resumed from."""
    from mlx_nb.train.record import check_seal, read_record

    try:
        record = read_record(checkpoint.state)
        wrong = [] if record.trainer.step == checkpoint.step else ["step"]
        for group in ("parameters", "optimizer"):
            checkpoint.arrays[group]
        for number in range(len(record.feed.batches) if record.feed else 0):
            for name in ("tokens", "loss_mask"):
                checkpoint.arrays["feed"][f"{number}.{name}"]
        RunConfig.from_dict({name: value for name, value in record.config.items() if name != "data"})
        if "data" in record.config and not isinstance(record.config["data"], str | list):
            wrong.append("config.data")
        check_name(record.name)
        wrong += ["history_parts" for part in record.history_parts if not HISTORY_FILE.fullmatch(part.file)]
        wrong += _impossible_counts(record)
        wrong += ["live_changes" for event in _live_changes(checkpoint) if event.name not in SETTINGS]
        requests_of(checkpoint)
        if not wrong:
            check_seal(checkpoint.state)
    except _FOREIGN as error:
        raise CheckpointError(f"its contents cannot be resumed from ({_reason(error)})") from error
    except ConfigError as error:
        raise CheckpointError(f"its settings cannot be used: {_reason(error).rstrip('.')}") from error
    if wrong:
        raise CheckpointError(f"its contents cannot be resumed from (wrong: {', '.join(wrong)})")


class Unfit:
    """Checkpoints that turned out not to fit their run once everything was loaded."""

    def __init__(self) -> None:
        self._reasons: dict[Path | None, str] = {}

    def refuse(self, checkpoint: Checkpoint) -> None:
        """Raise CheckpointError for one of these checkpoints, or one with unusable contents."""
        refuse_unusable(checkpoint)
        if (reason := self._reasons.get(checkpoint.path)) is not None:
            raise CheckpointError(reason)

    @contextmanager
    def restoring(self, checkpoint: Checkpoint) -> Iterator[None]:
        """A context for restoring `checkpoint`. An error inside marks it as unfit and is suppressed."""
        try:
            yield
        except (CheckpointError, ArithmeticError, *_FOREIGN) as error:
            self._reasons[checkpoint.path] = _reason(error).rstrip(".")


def _impossible_counts(record: RunRecord) -> list[str]:
    """The keys with impossible counts."""
    place = record.place or Place(0, 0, 1)
    counts = {
        **{f"trainer.{name}": count for name, count in vars(record.trainer).items() if isinstance(count, int)},
        **{
            f"history_parts.{name}": getattr(part, name) for part in record.history_parts for name in ("bytes", "lines")
        },
        "events": record.events,
        "standing": record.standing,
        "place.epoch": place.epoch,
        "place.rows": place.rows,
        "place.batch_size": place.batch_size - 1,
    }
    return [name for name, count in counts.items() if not 0 <= count < 2**63]


def _typed(found: Event | Request) -> Any:
    """An event or request from a file, with values of the declared types."""
    return read_as(type(found), vars(found), type(found).__name__)


def settings_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings of a checkpoint as plain values. Settings newer than it have their defaults."""
    config = dict(checkpoint.state["config"])
    for name, value in RunConfig().to_dict().items():
        if name == "data":
            continue
        if name in _GROUPS and isinstance(config.get(name), dict):
            config[name] = {**value, **config[name]}
        config.setdefault(name, value)
    return config


def defaults_taken(checkpoint: Checkpoint) -> list[str]:
    """A line for each setting that did not exist yet when the checkpoint was written."""
    written, filled = checkpoint.state["config"], settings_of(checkpoint)
    flat = [(name, name in written, filled[name]) for name in filled if name not in _GROUPS or name not in written]
    for group in _GROUPS:
        if isinstance(inner := written.get(group), dict):
            flat += [(f"{group}.{name}", name in inner, value) for name, value in filled[group].items()]
    return [
        f"the checkpoint is from an older mlx_nb without the setting `{name}`, so its default is used: {shown(value)}"
        for name, there, value in flat
        if not there
    ]


def settings_to_resume(checkpoint: Checkpoint, folder: Path, config: RunConfig | None, data: Any) -> RunConfig:
    """The settings of the resumed run: `config` with the live changes since, or the checkpoint's if `config` is None.

    The length of the run is the checkpoint's; `length_given` tells whether to change it.
    Raises CheckpointError if the rows were an object in memory and are not passed again.
    """
    values = settings_of(checkpoint)
    if has_no_decay(values["optimizer"]):
        values["weight_decay"] = 0.0  # unused by this optimizer, but old checkpoints have a default
    if config is not None:
        config = with_shape_of(checkpoint, config)
        for event in _live_changes(checkpoint):
            config = config.with_live(**{event.name: event.new})
        config = config.replace(**{name: values[name] for name in LENGTHS})  # see `length_given`
        values = {**config.to_dict(), **{name: getattr(config, name) for name in FUNCTIONS}}
    values["adapter_path"] = str(folder)
    if data is not None:
        values["data"] = data
    if "data" not in values:
        raise CheckpointError(f"the rows of {folder} were an object in memory. Pass them again as `data`.")
    started_in = config.working_folder if config is not None else working_folder_of(checkpoint, folder)
    return RunConfig.from_dict(values).at(started_in)


def refuse_missing_variables(config: RunConfig, name: str, namespace: Mapping[str, Any] | None) -> None:
    """Raise CheckpointError if rows, rewards or metrics of the run `name` were variables that no longer exist."""
    from mlx_nb.rollouts.rewards.builtin import REWARDS

    sources = config.data if isinstance(config.data, list) else [config.data]
    rows = [one["path"] if isinstance(one, Mapping) and "path" in one else one for one in sources]
    functions = (*(config.rewards or ()), *(config.metrics or ()))
    rewards = [one for one in functions if isinstance(one, str) and one not in REWARDS]
    folder = config.working_folder or Path()
    missing = [
        word
        for word in (*rows, *rewards)
        if isinstance(word, str)
        and word.isidentifier()
        and word not in (namespace or {})
        and not (folder / word).exists()
    ]
    if missing:
        words = ", ".join(f"`{word}`" for word in dict.fromkeys(missing))
        first = (
            "give `namespace=globals()` where they are defined"
            if namespace is None
            else f"run the cell that defines {words} first"
        )
        raise CheckpointError(f"{name} uses {words}, which is no variable or file here: {first}, then resume again.")


def length_given(checkpoint: Checkpoint, config: RunConfig | None) -> dict[str, Any]:
    """The length in `config` if it differs from the run's initial and current length; otherwise empty.

    It is applied as a live change: the history records it, and finished updates stay.
    """
    if config is None:
        return {}
    given = {name: getattr(config, name) for name in LENGTHS}
    known = [{name: values[name] for name in LENGTHS} for values in (_began_with(checkpoint), settings_of(checkpoint))]
    if not any(known[0].values()):  # a change from `iters` to `epochs` does not record the old `iters`
        started = (event for event in history_of(checkpoint).events if isinstance(event, RunStarted))
        known += [{**known[0], "iters": event.iters} for event in started]
    if given in known:
        return {}
    return {name: value for name, value in given.items() if value is not None} or {"epochs": 1.0}


def _began_with(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings that the run started with, before its live changes."""
    began_with = settings_of(checkpoint)
    for event in reversed(_live_changes(checkpoint)):
        began_with[event.name] = event.old
        if event.name in LENGTHS and event.old is not None:
            began_with |= {name: None for name in LENGTHS if name != event.name}
    return began_with


def with_shape_of(checkpoint: Checkpoint, config: RunConfig) -> RunConfig:
    """`config` with the adapter shape that the run of `checkpoint` took over from its start adapter."""
    from mlx_nb.model.adapter_files import filled

    began_with = settings_of(checkpoint)
    if config.resume_adapter_file is None or began_with.get("resume_adapter_file") is None:
        return config
    lora = {f"lora_parameters.{name}": value for name, value in began_with["lora_parameters"].items()}
    return filled(config, {name: began_with[name] for name in ("fine_tune_type", "num_layers")} | lora)


def allowed_changes(words: Any) -> frozenset[str]:
    """The names in `allow_changed`; a string is one name. Raises ConfigError for an unknown name."""
    given = [words] if isinstance(words, str) else words
    known = (*MADE_FROM, *(name for name in SETTINGS if name not in MADE_FROM))
    if not isinstance(given, Collection) or not all(isinstance(word, str) for word in given):
        raise ConfigError(f"allow_changed is a list of names, such as ['model'], not {shown(words)}.")
    problems = [
        f"allow_changed: {shown(word)} is not the name of an input or setting."
        f"{did_you_mean(word, known) if len(word) <= 80 else ''} It accepts {', '.join(MADE_FROM)}, and the names of "
        "settings."
        for word in given
        if word not in known
    ]
    if problems:
        raise ConfigError(listed_problems(problems))
    return frozenset(given)


def changes_since(
    checkpoint: Checkpoint, config: RunConfig | None, fingerprints: dict[str, Any], allowed: Collection[str]
) -> list[str]:
    """The names of settings and inputs that have changed since the checkpoint.

    Raises CheckpointError if one of them is not in `allowed`.
    """
    made_from = checkpoint.state["made_from"]
    changed = _changed_settings(with_shape_of(checkpoint, config), checkpoint) if config else []
    changed += [what for what in fingerprints if made_from.get(what) != fingerprints[what] and what not in changed]
    refused = [what for what in changed if what not in allowed]
    if refused:
        named = [_with_values(what, made_from, fingerprints) for what in refused]
        raise CheckpointError(
            f"changed since the checkpoint of step {checkpoint.step}: {', '.join(named)}. {_why(refused)}"
            f"Restore it, or resume anyway with allow_changed={refused!r} "
            f"(`--allow-changed {' '.join(shlex.quote(what) for what in refused)}` in a notebook)."
        )
    return changed


def _with_values(what: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    """The name of a change, with both values if they are readable."""
    return f"{what} ({before[what]} then, {now[what]} now)" if what in _READABLE and what in before else what


def _why(refused: Collection[str]) -> str:
    """The backend warning of this kernel if the device has changed; otherwise empty."""
    from mlx_nb.model.backend import prepare_backend

    warning = prepare_backend().warning if "device" in refused else None
    return f"{warning} " if warning else ""


def _changed_settings(config: RunConfig, checkpoint: Checkpoint) -> list[str]:
    """The settings in which `config` differs from the initial settings of the checkpoint's run.

    Settings about saving and reports are ignored: they change no number.
    """
    began_with = _began_with(checkpoint)
    if any(event.name in LENGTHS for event in _live_changes(checkpoint)):  # `iters` and `epochs` replace each other
        began_with = {name: value for name, value in began_with.items() if name not in LENGTHS}
    now = json.loads(json.dumps(config.described(), default=str))
    counted = [name for name in began_with if name in now and SETTINGS[name].metadata["group"] not in _WITHOUT_NUMBERS]
    return [name for name in counted if began_with[name] != now[name]]


_WITHOUT_NUMBERS = ("saving", "reports")


def _live_changes(checkpoint: Checkpoint) -> list[SettingChanged]:
    """The live changes of the checkpoint's run, in order."""
    changes = [event_from_json(line) for line in live_change_lines(checkpoint)]
    return [_typed(event) for event in changes if isinstance(event, SettingChanged)]


def live_change_lines(checkpoint: Checkpoint) -> list[str]:
    """The SettingChanged events up to a checkpoint, as JSON lines."""
    if (lines := checkpoint.state.get("live_changes")) is not None:
        return list(lines)
    return [event.to_json() for event in history_of(checkpoint).events if isinstance(event, SettingChanged)]
