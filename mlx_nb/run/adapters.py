"""The adapters on one base, by name: loads, compares and merges them without loading the base again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from mlx_nb.config.run_config import RunConfig
from mlx_nb.errors import CommandError, did_you_mean, shown
from mlx_nb.files.places import check_name, run_folder, working_folder

if TYPE_CHECKING:
    from mlx_nb.model.merging import Part
    from mlx_nb.run.inputs import RunInputs

_BASE = "base"


class Adapted(Protocol):
    """A model with an adapter that answers: a run, or a loaded adapter."""

    config: RunConfig

    @property
    def folder(self) -> Path | None:
        """Where its files are; None for one that is only in memory."""

    @property
    def model(self) -> Any:
        """The mlx model, adapter included."""

    def generate(self, prompt: Any, *, base: bool = False, max_tokens: int = 256, temperature: float = 0.0) -> Any:
        """The answer to a prompt."""

    def save(self, path: str | Path, *, format: str = "mlx-lm") -> Path:
        """Write the adapter to a folder."""


Loaded = TypeVar("Loaded", bound=Adapted)


@dataclass(frozen=True)
class AdapterMakers(Generic[Loaded]):
    """Opens the adapter in a folder on a given base, and makes one that has given matrices."""

    opened: Callable[[Path, Mapping[str, Any]], Loaded]
    holding: Callable[[RunConfig, Mapping[str, Any]], Loaded]


class Adapters(Generic[Loaded]):
    """The adapters on the base of a run or a loaded adapter, by name, that one first.

    All of them share the arrays of the base, so each takes only the memory of its own matrices, and none changes what
    the base answers: `run.adapters.load("adapters/bees")`, then `run.adapters["bees"].generate("Hello")`.
    """

    def __init__(
        self,
        name: str,
        own: Adapted,
        inputs: RunInputs,
        loaded: MutableMapping[str, Loaded],
        makers: AdapterMakers[Loaded],
        *,
        ready: bool,
    ) -> None:
        self._name = name
        self._own = own
        self._inputs = inputs
        self._loaded = loaded
        self._makers = makers
        self._ready = ready  # whether `own` has an adapter already

    def load(self, folder: str | Path, name: str | None = None) -> Loaded:
        """Load the adapter in `folder`, in the format of mlx-lm or PEFT, as `name` (default: that of the folder).

        Raises ModelError for an adapter of another base, CommandError for a name that is taken.
        """
        from mlx_nb.model.model_source import model_named

        place = run_folder(str(folder), working_folder())
        name = self._free(place.name if name is None else name)
        ours = self._inputs.config
        base = {"load_in_bits": ours.load_in_bits, "chat_template": ours.located("chat_template")}
        self._loaded[name] = self._makers.opened(place, {**base, "model": model_named(ours)})
        return self._loaded[name]

    def merge(self, name: str, weights: Mapping[str, float], *, how: str = "cat") -> Loaded:
        """A new adapter `name`, the weighted sum of others: `merge("both", {"bees": 0.7, "pirate": 0.3})`.

        `cat` adds up their changes exactly, and their ranks; `linear` adds up their matrices, which keeps the rank (see
        model/merging.py). Raises CommandError for adapters that cannot be added up.
        """
        from mlx_nb.model.merging import HOW, merged

        name = self._free(name)
        if how not in HOW:
            raise CommandError(f"adapters are merged by {' or '.join(HOW)}, not {shown(how)}.")
        if not isinstance(weights, Mapping) or not weights:
            raise CommandError("give the weight of each adapter to merge, such as {'bees': 0.7, 'pirate': 0.3}.")
        result = merged([self._part(one, weight) for one, weight in weights.items()], how)
        ours = self._inputs.config
        rendering = {"prompt_format": self._inputs.prompt_rendering.prompt_format, "roles": ours.roles}
        base = {"load_in_bits": ours.load_in_bits, "chat_template": ours.located("chat_template")}
        settings = {**rendering, **base, "model": ours.located("model"), **result.settings}
        self._loaded[name] = self._makers.holding(RunConfig.from_dict(settings).at(ours.working_folder), result.weights)
        return self._loaded[name]

    def _part(self, name: str, weight: float) -> Part:
        from mlx_nb.model.adapters import adapter_weights
        from mlx_nb.model.merging import Part

        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or not weight:
            raise CommandError(f"the weight of {name} is a number other than 0, not {shown(weight)}.")
        adapted = self[name]
        config = adapted.config
        if config.fine_tune_type != "lora":
            raise CommandError(f"{name} is a {config.fine_tune_type} fine-tune; only LoRA adapters can be added up.")
        arrays = {
            path: array
            for path, array in adapter_weights(adapted.model).items()
            if path.endswith((".lora_a", ".lora_b"))
        }
        if any(array.ndim != 2 for array in arrays.values()):
            raise CommandError(f"{name} adapts experts, which cannot be added up yet.")
        return Part(name, arrays, config.lora_parameters.scale, config.num_layers, float(weight))

    def compare(self, prompt: Any, *, max_tokens: int = 256, temperature: float = 0.0) -> dict[str, Any]:
        """The answers of the base and of each adapter to a prompt, by name."""
        options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
        answers = {_BASE: self._own.generate(prompt, base=True, **options)}
        return answers | {name: self[name].generate(prompt, **options) for name in self.names}

    def drop(self, name: str) -> None:
        """Forget a loaded or merged adapter. Its files stay."""
        if name == self._name:
            raise CommandError(f"{name} is the adapter that the others were loaded beside, and stays.")
        _ = self[name]
        del self._loaded[name]

    def __getitem__(self, name: str) -> Adapted | Loaded:
        if name not in self:
            raise CommandError(
                f"no adapter is called {shown(name)}.{did_you_mean(str(name), self.names)} {self._listed()}"
            )
        return self._own if name == self._name else self._loaded[name]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all adapters, the own one first."""
        return (*([self._name] if self._ready else []), *self._loaded)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def _listed(self) -> str:
        return (
            f"There are {', '.join(self.names)}."
            if self.names
            else "There is none yet; `adapters.load(FOLDER)` loads one."
        )

    def _free(self, name: str) -> str:
        check_name(name)
        if name in (self._name, _BASE) or name in self._loaded:
            raise CommandError(f"an adapter is called {name} already. Give another name.")
        return name

    def __repr__(self) -> str:
        if not self.names:
            return f"Adapters: {self._listed()}"
        lines = [("", "adapter", "kind", "rank", "scale", "from")]
        for name in self:
            config, saved = self[name].config, self._loaded.get(name)
            lora = config.lora_parameters
            shape = ("-", "-") if config.fine_tune_type == "full" else (str(lora.rank), f"{lora.scale:g}")
            where = "live" if saved is None else str(saved.folder or "merged")
            lines.append(("→" if saved is None else "", name, config.fine_tune_type, *shape, where))
        widths = [max(len(row[column]) for row in lines) for column in range(len(lines[0]))]
        return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in lines)
