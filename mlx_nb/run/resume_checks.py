"""What a checkpoint says of the run that wrote it, held against what is there now: may it go on, and with what."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_nb.config.optimizers import has_no_decay
from mlx_nb.config.run_config import LENGTHS, PATHS, SETTINGS, RunConfig, located
from mlx_nb.data.examples.batches import ORDER, Place
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.errors import CheckpointError, ConfigError, did_you_mean, listed_problems, shown
from mlx_nb.events import Event, Request, RunStarted, SettingChanged, event_from_json, request_from_json
from mlx_nb.events.history import History
from mlx_nb.files.history_file import HISTORY_FILE, read_history
from mlx_nb.files.places import check_name
from mlx_nb.files.typed_json import read_as

if TYPE_CHECKING:
    from mlx_nb.train.checkpoint import Checkpoint
    from mlx_nb.train.record import RunRecord

_GROUPS = tuple(name for name in SETTINGS if dataclasses.is_dataclass(getattr(RunConfig(), name)))

# What a run is made from besides its settings, by the names of its fingerprints.
MADE_FROM = (
    "data",
    "template",
    "tokenizer",
    "model",
    "mlx version",
    "row order",
    "device",
    "reference",
    "loss function",
    "reward functions",
)

_READABLE = ("device", "mlx version")  # fingerprints that are words and not digests


def working_folder_of(checkpoint: Checkpoint, run_folder: Path) -> Path:
    """Where the relative paths of a checkpoint's settings begin now.

    When the whole project was copied, that is the copy. When the run's folder alone was, it is where it was; and the
    working folder of the process where nothing of it is left.
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
    """The history that a checkpoint holds or names."""
    return read_history_of(checkpoint)[0]


def read_history_of(checkpoint: Checkpoint) -> tuple[History, list[str]]:
    """The same, and what is wrong with it, in words."""
    lines, problems, whole = checkpoint.state["history"], list[str](), False
    if parts := checkpoint.state.get("history_parts"):
        assert checkpoint.path is not None
        lines, problems = read_history(checkpoint.path.parent, parts)
        whole = not problems  # byte for byte what was written
    history = History()
    for number, line in enumerate(lines):
        try:
            event = event_from_json(line)
            history.append(event if whole else _typed(event))
        except _FOREIGN as error:
            unknown = f"event {number} of the history is unknown ({_reason(error)}), so it is left out from there on"
            return history, [*problems, unknown]
    return history, problems


def requests_of(checkpoint: Checkpoint) -> list[Request]:
    """What had been asked of the run and was not done yet."""
    return [_typed(request_from_json(line)) for line in checkpoint.state.get("asked", ())]


# What reading raises that was not written by this mlx_nb, or by none.
_FOREIGN = (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError, OverflowError)


def _reason(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())


def refuse_unusable(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for a checkpoint, whole as it may be, that does not hold what a run goes on from."""
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
        raise CheckpointError(f"it does not hold what a run goes on from ({_reason(error)})") from error
    except ConfigError as error:
        raise CheckpointError(f"its settings cannot be used: {_reason(error).rstrip('.')}") from error
    if wrong:
        raise CheckpointError(f"it does not hold what a run goes on from (wrong: {', '.join(wrong)})")


class Unfit:
    """The checkpoints that turned out, once all was loaded, not to fit the run that they say they are of."""

    def __init__(self) -> None:
        self._reasons: dict[Path | None, str] = {}

    def refuse(self, checkpoint: Checkpoint) -> None:
        """Raise CheckpointError for one of them, and for one that is unusable by what it says."""
        refuse_unusable(checkpoint)
        if (reason := self._reasons.get(checkpoint.path)) is not None:
            raise CheckpointError(reason)

    @contextmanager
    def noted(self, checkpoint: Checkpoint) -> Iterator[None]:
        """While it is put in place: what is raised then is about the checkpoint, which is one of them."""
        try:
            yield
        except (CheckpointError, ArithmeticError, *_FOREIGN) as error:
            self._reasons[checkpoint.path] = _reason(error).rstrip(".")


def _impossible_counts(record: RunRecord) -> list[str]:
    """The keys whose counts no run can have come to."""
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
    """An event or a request of a file, its values of the kinds that it declares."""
    return read_as(type(found), vars(found), type(found).__name__)


def settings_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings of a checkpoint as plain values; those that came later at their defaults (see `defaults_taken`)."""
    config = dict(checkpoint.state["config"])
    for name, value in RunConfig().to_dict().items():
        if name == "data":
            continue
        if name in _GROUPS and isinstance(config.get(name), dict):
            config[name] = {**value, **config[name]}
        config.setdefault(name, value)
    return config


def defaults_taken(checkpoint: Checkpoint) -> list[str]:
    """A line about each setting that the checkpoint says nothing of: there was none when it was written."""
    written, filled = checkpoint.state["config"], settings_of(checkpoint)
    flat = [(name, name in written, filled[name]) for name in filled if name not in _GROUPS or name not in written]
    for group in _GROUPS:
        if isinstance(inner := written.get(group), dict):
            flat += [(f"{group}.{name}", name in inner, value) for name, value in filled[group].items()]
    return [
        f"the checkpoint does not say `{name}`, which an older mlx_nb did not have: it is {shown(value)}"
        for name, there, value in flat
        if not there
    ]


def settings_to_resume(checkpoint: Checkpoint, folder: Path, config: RunConfig | None, data: Any) -> RunConfig:
    """What a run goes on with: `config` with the live changes since, or null = the settings of the checkpoint.

    Its length is that of the checkpoint, until `length_given` changes it.
    Raises CheckpointError when the rows were an object and are not given again.
    """
    values = settings_of(checkpoint)
    if has_no_decay(values["optimizer"]):
        values["weight_decay"] = 0.0  # it has none; a checkpoint may have been written with the default of others
    if config is not None:
        config = with_shape_of(checkpoint, config)
        for event in _live_changes(checkpoint):
            config = config.with_live(**{event.name: event.new})
        config = config.replace(**{name: values[name] for name in LENGTHS})  # see `length_given`
        values = {**config.to_dict(), "rewards": config.rewards}
    values["adapter_path"] = str(folder)
    if data is not None:
        values["data"] = data
    if "data" not in values:
        raise CheckpointError(f"the rows of {folder} were an object in memory. Pass them again as `data`.")
    started_in = config.working_folder if config is not None else working_folder_of(checkpoint, folder)
    return RunConfig.from_dict(values).at(started_in)


def refuse_missing_variables(config: RunConfig, name: str, namespace: Mapping[str, Any] | None) -> None:
    """Raise CheckpointError for rows or rewards of the run `name` that were a notebook's variables and are none now."""
    from mlx_nb.rollouts.rewards.builtin import REWARDS

    sources = config.data if isinstance(config.data, list) else [config.data]
    rows = [one["path"] if isinstance(one, Mapping) and "path" in one else one for one in sources]
    rewards = [one for one in config.rewards or () if isinstance(one, str) and one not in REWARDS]
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
        raise CheckpointError(f"{name} is made from {words}, no variable or file here: {first}, then resume again.")


def length_given(checkpoint: Checkpoint, config: RunConfig | None) -> dict[str, Any]:
    """The length that `config` gives a run which has another one; empty where it began, or stands, with that one.

    The change is a live one: it is part of the history, and what was done is not taken back.
    """
    if config is None:
        return {}
    given = {name: getattr(config, name) for name in LENGTHS}
    known = [{name: values[name] for name in LENGTHS} for values in (_began_with(checkpoint), settings_of(checkpoint))]
    if not any(known[0].values()):  # a change from `iters` to `epochs` does not say which `iters`
        started = (event for event in history_of(checkpoint).events if isinstance(event, RunStarted))
        known += [{**known[0], "iters": event.iters} for event in started]
    if given in known:
        return {}
    return {name: value for name, value in given.items() if value is not None} or {"epochs": 1.0}


def _began_with(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings that the run of a checkpoint began with."""
    began_with = settings_of(checkpoint)
    for event in reversed(_live_changes(checkpoint)):
        began_with[event.name] = event.old
        if event.name in LENGTHS and event.old is not None:
            began_with |= {name: None for name in LENGTHS if name != event.name}
    return began_with


def with_shape_of(checkpoint: Checkpoint, config: RunConfig) -> RunConfig:
    """`config`, which starts from an adapter, with the shape that the run of `checkpoint` took from it."""
    from mlx_nb.model.adapter_files import filled

    began_with = settings_of(checkpoint)
    if config.resume_adapter_file is None or began_with.get("resume_adapter_file") is None:
        return config
    lora = {f"lora_parameters.{name}": value for name, value in began_with["lora_parameters"].items()}
    return filled(config, {name: began_with[name] for name in ("fine_tune_type", "num_layers")} | lora)


def allowed_changes(words: Any) -> frozenset[str]:
    """What a person allows to have changed, by name; a text is one name. Raises ConfigError for an unknown one."""
    given = [words] if isinstance(words, str) else words
    known = (*MADE_FROM, *(name for name in SETTINGS if name not in MADE_FROM))
    if not isinstance(given, Collection) or not all(isinstance(word, str) for word in given):
        raise ConfigError(f"allow_changed is a list of names, such as ['model'], not {shown(words)}.")
    problems = [
        f"allow_changed: there is nothing called {shown(word)} that could have changed."
        f"{did_you_mean(word, known) if len(word) <= 80 else ''} It takes {', '.join(MADE_FROM)}, and the names of "
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
    """The settings, and what else the run was made from, that are not what they were.

    Raises CheckpointError when one of them is not `allowed` to change.
    """
    made_from = checkpoint.state["made_from"]
    changed = _changed_settings(with_shape_of(checkpoint, config), checkpoint) if config else []
    changed += [what for what in fingerprints if made_from.get(what) != fingerprints[what] and what not in changed]
    refused = [what for what in changed if what not in allowed]
    if refused:
        named = [_with_values(what, made_from, fingerprints) for what in refused]
        raise CheckpointError(
            f"changed since the checkpoint of step {checkpoint.step}: {', '.join(named)}. {_why(refused)}"
            f"Bring back what it was, or go on all the same with allow_changed={refused!r} "
            f"(`--allow-changed {' '.join(shlex.quote(what) for what in refused)}` in a notebook)."
        )
    return changed


def _with_values(what: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    """What changed, with both values where a person can read them."""
    return f"{what} ({before[what]} then, {now[what]} now)" if what in _READABLE and what in before else what


def _why(refused: Collection[str]) -> str:
    """What is wrong with this kernel where that made the device another one, else nothing."""
    from mlx_nb.model.backend import prepare_backend

    warning = prepare_backend().warning if "device" in refused else None
    return f"{warning} " if warning else ""


def _changed_settings(config: RunConfig, checkpoint: Checkpoint) -> list[str]:
    """The settings in which `config` differs from those that the run of `checkpoint` began with.

    Where something is saved changes no number, so those settings do not count.
    """
    began_with = _began_with(checkpoint)
    if any(event.name in LENGTHS for event in _live_changes(checkpoint)):  # either takes the place of the other
        began_with = {name: value for name, value in began_with.items() if name not in LENGTHS}
    now = json.loads(json.dumps(config.described(), default=str))
    counted = [name for name in began_with if name in now and SETTINGS[name].metadata["group"] != "saving"]
    return [name for name in counted if began_with[name] != now[name]]


def _live_changes(checkpoint: Checkpoint) -> list[SettingChanged]:
    """The settings that were changed while the run of `checkpoint` went on, in order."""
    changes = [event_from_json(line) for line in live_change_lines(checkpoint)]
    return [_typed(event) for event in changes if isinstance(event, SettingChanged)]


def live_change_lines(checkpoint: Checkpoint) -> list[str]:
    """The SettingChanged events until a checkpoint, a JSON line each."""
    if (lines := checkpoint.state.get("live_changes")) is not None:
        return list(lines)
    return [event.to_json() for event in history_of(checkpoint).events if isinstance(event, SettingChanged)]


def fingerprints(sources: Iterable[Any], tokenizer: Tokenizer, weights: Iterable[Iterable[str]]) -> dict[str, Any]:
    """What a run's numbers depend on besides its settings, by name."""
    from importlib.metadata import version

    tokenizer = getattr(tokenizer, "_tokenizer", tokenizer)
    return {
        "data": [source.fingerprint() for source in sources],
        "template": _digest(str(tokenizer.chat_template)),
        "tokenizer": _digest(tokenizer.backend_tokenizer.to_str()),
        "model": [list(file) for file in weights],
        "mlx version": version("mlx"),
        "row order": ORDER,
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
