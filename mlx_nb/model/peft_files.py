"""Reads adapters in PEFT's format: their configuration as settings of a run, their tensors under mlx-lm's names.

             PEFT                                       mlx-lm
    linear   lora_A (R, in), lora_B (out, R)            lora_a (in, R), lora_b (R, out)
    table    lora_embedding_A (R, V), _B (D, R)         lora_a (V, R), lora_b (R, D)
    DoRA     lora_magnitude_vector (out,)               m (out,)
    factor   lora_alpha / R; rsLoRA lora_alpha / √R     scale

mlx-lm has one rank and one scale for all modules. Smaller ranks are padded with zeros, which stay zeros in training,
and a factor other than the scale goes into lora_b. Modules that PEFT leaves out are zeros too.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_nb.errors import and_more, shown
from mlx_nb.files.typed_json import WrongJson, read_as
from mlx_nb.model.tensor_names import Header, place
from mlx_nb.model.trees import named_arrays

HEAD, TABLE = "lm_head", "embed_tokens"
RECORD = "mlx_nb"  # key of the metadata with what mlx_nb records, which PEFT does not read
# Parts of an adapted module by the end of their tensor's name.
_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
}
_NAME = re.compile(rf"(?P<path>.+)\.(?P<part>{'|'.join(map(re.escape, _PARTS))})")
_PREFIX = "base_model.model."
_OTHER_TOWERS = ("vision", "visual", "audio")
# Keys of adapter_config.json that do not change what the tensors mean. Any other key that is set is refused.
_WITHOUT_EFFECT = {
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_dropout",
    "base_model_name_or_path", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "task_type", "inference_mode", "auto_mapping", "peft_version", "revision", "megatron_config", "megatron_core",
    "qalora_group_size", "ensure_weight_tying", "fan_in_fan_out", "modules_to_save", "eva_config",
}  # fmt: skip
_OFF: dict[str, tuple[Any, ...]] = {"bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal", "eva")}


class NotHeld(ValueError):
    """What MLX cannot hold of a PEFT adapter, by name."""


@dataclass(frozen=True)
class _Description:
    """The keys of PEFT's adapter_config.json that are read."""

    peft_type: str | None = None
    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool | None = False
    use_dora: bool | None = False
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    lora_dropout: float | None = 0.0
    base_model_name_or_path: str | None = None


@dataclass(frozen=True)
class PeftModule:
    """An adapted module: its path in transformers, its tensors by part (a, b, m), its rank R and factor."""

    path: str
    tensors: Mapping[str, str]
    rank: int
    factor: float
    table: bool

    @property
    def place(self) -> tuple[int | None, str]:
        """(layer, path inside the layer), or (None, last part of the path) outside the layers."""
        layer, inner = place(self.path)
        return (layer, inner) if layer is not None else (None, self.path.rsplit(".", 1)[-1])


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter in PEFT's format.

    `copies` has the tensors that are whole weights by the path of the weight: modules_to_save, and embeddings that PEFT
    saves beside their adapter.
    """

    modules: tuple[PeftModule, ...]
    copies: Mapping[str, str]
    dora: bool
    dropout: float
    model: str | None

    @property
    def scale(self) -> float:
        """The factor of most modules."""
        return Counter(module.factor for module in self.modules).most_common(1)[0][0]

    def shape(self) -> dict[str, Any]:
        """Its shape as flat settings, on a model whose layers are all adapted and whose head is a module."""
        return {
            "fine_tune_type": "dora" if self.dora else "lora",
            "num_layers": -1,
            "lora_parameters.rank": max(module.rank for module in self.modules),
            "lora_parameters.scale": self.scale,
            "lora_parameters.dropout": self.dropout,
            "lora_parameters.keys": self._keys(),
        }

    def _keys(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(module.place[1] for module in self.modules))

    @property
    def depends_on_model(self) -> bool:
        """Whether `shape_on` differs from `shape` for some models."""
        layers = self._layers()
        return bool(layers and min(layers)) or {HEAD, TABLE} <= set(self._keys())

    def _layers(self) -> list[int]:
        return [layer for module in self.modules if (layer := module.place[0]) is not None]

    def shape_on(self, model: nn.Module) -> dict[str, Any]:
        """Its shape as flat settings on this model: the last N layers, and no head that is the embedding itself."""
        shape, first = self.shape(), min(self._layers(), default=0)
        if first:
            shape["num_layers"] = max(1, len(model.layers) - first)
        if not has_head(model):
            shape["lora_parameters.keys"] = tuple(key for key in self._keys() if key != HEAD)
        return shape

    def weights(
        self, tensors: Mapping[str, mx.array], expected: Mapping[str, mx.array], model: nn.Module
    ) -> dict[str, mx.array]:
        """The tensors under the names, in the shapes and with the scale of `expected`, those of the attached adapter.

        Raises NotHeld for anything that the model has no place for.
        """
        self._refuse_changed_copies(tensors, model)
        modules = {module.place: module for module in self.modules}
        if not has_head(model):
            self._refuse_untied(modules, tensors)
            modules.pop((None, HEAD), None)
        found: dict[str, mx.array] = {}
        for path in dict.fromkeys(name.rsplit(".", 1)[0] for name in expected):
            layer, inner = place(path)
            module = modules.pop((layer, inner if layer is not None else path.rsplit(".", 1)[-1]), None)
            if module is None and self.dora:
                raise NotHeld(f"DoRA of the same modules in every layer is held, and it has none for {path}")
            for part, name in {"a": "lora_a", "b": "lora_b", "m": "m"}.items():
                if (there := expected.get(f"{path}.{name}")) is not None:
                    found[f"{path}.{name}"] = self._part(module, part, tensors, there)
        if modules:
            names = [module.path for module in modules.values()]
            raise NotHeld(f"this model has no module to adapt for {and_more(names, 3)}")
        return found

    def _part(self, module: PeftModule | None, part: str, tensors: Mapping[str, mx.array], there: mx.array) -> mx.array:
        if module is None:
            return mx.zeros(there.shape, there.dtype)
        array = tensors[module.tensors[part]].astype(there.dtype)
        if part == "m":
            return array.reshape(-1)
        if array.ndim != 2:
            raise NotHeld(f"{module.tensors[part]} has {array.ndim} dimensions, and matrices have 2")
        array = array.T
        if part == "b" and module.factor != self.scale:
            array = array * (module.factor / self.scale)
        missing = there.shape[1 if part == "a" else 0] - module.rank
        return mx.pad(array, [(0, 0), (0, missing)] if part == "a" else [(0, missing), (0, 0)])

    def _refuse_changed_copies(self, tensors: Mapping[str, mx.array], model: nn.Module) -> None:
        base = _base_weights(model)
        for path, name in self.copies.items():
            ours, theirs = base.get(path), tensors[name]
            if ours is None and path == f"{HEAD}.weight" and not has_head(model):
                ours = next((array for key, array in base.items() if key.endswith(f"{TABLE}.weight")), None)
            if ours is None or ours.shape != theirs.shape or not _equal(ours, theirs):
                raise NotHeld(f"{path} is saved as a whole weight that differs from the base's (modules_to_save)")

    def _refuse_untied(
        self, modules: Mapping[tuple[int | None, str], PeftModule], tensors: Mapping[str, mx.array]
    ) -> None:
        """Raise NotHeld unless head and embedding, one module in this model, are changed in the same way."""
        head, table = modules.get((None, HEAD)), modules.get((None, TABLE))
        if head is None and table is None:
            return
        same = (
            head is not None
            and table is not None
            and head.factor == table.factor
            and _equal(tensors[head.tensors["a"]], tensors[table.tensors["b"]].T)
            and _equal(tensors[head.tensors["b"]], tensors[table.tensors["a"]].T)
        )
        if not same:
            one = f"{TABLE} and {HEAD} differently" if head and table else f"{TABLE if table else HEAD} alone"
            raise NotHeld(f"it changes {one}, and in this model both are one module")


def _equal(one: mx.array, other: mx.array) -> bool:
    """Whether two weights are the same, apart from the precision that they are stored in."""
    if one.shape != other.shape:
        return False
    one, other = one.astype(mx.float32), other.astype(mx.float32)
    return bool(mx.allclose(one, other, rtol=2**-7, atol=1e-6).item())


def has_head(model: nn.Module) -> bool:
    """Whether the head is a module. In other models it is the embedding itself."""
    return any(path.rsplit(".", 1)[-1] == HEAD for path, _ in model.named_modules())


def _base_weights(model: nn.Module) -> dict[str, mx.array]:
    """Weights of the base by the name that they have without an adapter."""
    arrays = named_arrays(model.parameters())
    return {name.replace(".linear.", ".").replace(".embedding.", "."): array for name, array in arrays}


def read_peft(facts: Mapping[str, Any], header: Header) -> PeftAdapter:
    """A PEFT adapter from its adapter_config.json and the header of its weights.

    Raises NotHeld for what MLX cannot hold, WrongJson for a configuration that cannot be read.
    """
    described: _Description = read_as(_Description, facts, others=True)
    if described.peft_type not in (None, "LORA"):
        raise NotHeld(f"`peft_type: {described.peft_type}`")
    for key, value in facts.items():
        off = _OFF.get(key)
        if value not in (off or ()) and value and (off or key not in _WITHOUT_EFFECT):
            raise NotHeld(f"`{key}: {shown(value)}`")
    parts: dict[str, dict[str, str]] = {}
    tables, copies, unknown = set(), dict[str, str](), list[str]()
    for name in header.shapes:
        path = name.removeprefix(_PREFIX)
        if matched := _NAME.fullmatch(path):
            parts.setdefault(matched["path"], {})[_PARTS[matched["part"]]] = name
            tables |= {matched["path"]} if "embedding" in matched["part"] else set()
        elif path.endswith(".weight") and ".lora_" not in path:
            copies[path.replace(".base_layer.", ".")] = name
        else:
            unknown.append(path)
    if unknown:
        raise NotHeld(f"the tensors {and_more(unknown, 3)}")
    if not parts:
        raise NotHeld("it adapts no module")
    modules = tuple(_module(path, named, path in tables, described, header) for path, named in parts.items())
    _refuse_other_towers(modules)
    dora = bool(described.use_dora)
    if dora and tables:
        raise NotHeld(f"DoRA of the embedding {and_more(sorted(tables), 1)}: PEFT has one magnitude per column")
    dropout = described.lora_dropout or 0.0
    return PeftAdapter(modules, copies, dora, dropout, described.base_model_name_or_path or None)


def _module(path: str, tensors: Mapping[str, str], table: bool, described: _Description, header: Header) -> PeftModule:
    if lacking := sorted({"a", "b", *("m" if described.use_dora else "")} - tensors.keys()):
        raise NotHeld(f"{path} lacks its part {lacking[0].upper()}")
    if "m" in tensors and not described.use_dora:
        raise NotHeld(f"{path} has a magnitude, and `use_dora` is false")
    rank = _by_pattern(path, described.rank_pattern, described.r)
    alpha = _by_pattern(path, described.alpha_pattern, described.lora_alpha)
    ranks = [header.shapes[tensors["a"]], header.shapes[tensors["b"]]]
    if [shape and shape[axis] for axis, shape in enumerate(ranks)] != [rank, rank] or rank < 1:
        raise WrongJson(f"{path} has matrices of another rank than {rank}, so its weights are another adapter's")
    factor = alpha / (math.sqrt(rank) if described.use_rslora else rank)
    if not 0 < factor < math.inf:
        raise NotHeld(f"{path} with the factor {factor:g}")
    return PeftModule(path, dict(tensors), rank, factor, table)


def _by_pattern(path: str, patterns: Mapping[str, Any] | None, otherwise: Any) -> Any:
    """The value of the first pattern that is the end of the path, as in PEFT."""
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", path):
                return value
        except re.error as error:
            raise WrongJson(f"the pattern {shown(pattern)} cannot be read: {error}") from None
    return otherwise


def _refuse_other_towers(modules: Sequence[PeftModule]) -> None:
    """Raise NotHeld for modules outside the language model, which could be taken for some inside it."""
    for module in modules:
        if any(word in module.path.split(".layers.")[0] for word in _OTHER_TOWERS):
            raise NotHeld(f"{module.path}: only the language model is trained here")
    counts = Counter(module.place for module in modules)
    if twice := [module.path for module in modules if counts[module.place] > 1]:
        raise NotHeld(f"{' and '.join(twice[:2])}, which are one module here")
