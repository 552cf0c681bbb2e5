"""The types of the low-level client, with the names, fields and defaults of tinker 0.38."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

_INTEGERS = ("target_tokens",)
Value = TypeVar("Value")


class APIFuture(Generic[Value]):
    """A result that is there already: `.result()`, `await`, or `await future.result_async()`."""

    def __init__(self, value: Value) -> None:
        self._value = value

    def result(self, timeout: float | None = None) -> Value:
        """The value."""
        return self._value

    async def result_async(self, timeout: float | None = None) -> Value:
        """The value."""
        return self._value

    def __await__(self) -> Generator[Any, None, Value]:
        return self.result_async().__await__()


@dataclass(frozen=True, eq=False)
class TensorData:
    """An array as it goes in and comes out: `data` is a flat list, `dtype` `float32` or `int64`.

    `to_numpy()`, `to_torch()` and `tolist()` convert it; it can be iterated over like a list.
    """

    data: list[Any]
    dtype: str
    shape: list[int] | None = None

    @classmethod
    def from_numpy(cls, array: np.ndarray) -> TensorData:
        """Of an array of numbers: integers become int64, others float32."""
        dtype = "int64" if array.dtype.kind in "iu" else "float32"
        return cls(array.astype(dtype).reshape(-1).tolist(), dtype, list(array.shape))

    @classmethod
    def from_torch(cls, tensor: Any) -> TensorData:
        """Of a torch tensor."""
        return cls.from_numpy(tensor.detach().cpu().numpy())

    def to_numpy(self) -> np.ndarray:
        """As a numpy array."""
        return np.asarray(self.data, dtype=self.dtype).reshape(self.shape or [len(self.data)])

    def to_torch(self) -> Any:
        """As a torch tensor, if torch is installed."""
        import torch  # type: ignore[import-not-found, unused-ignore]

        return torch.from_numpy(self.to_numpy())

    def tolist(self) -> list[Any]:
        """As a list."""
        found: list[Any] = self.to_numpy().tolist()
        return found

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, place: Any) -> Any:
        return self.data[place]


@dataclass(frozen=True)
class EncodedTextChunk:
    """A piece of a model input: tokens of text."""

    tokens: Sequence[int]
    type: str = "encoded_text"

    @property
    def length(self) -> int:
        """The number of tokens."""
        return len(self.tokens)


@dataclass(frozen=True)
class ModelInput:
    """What the model reads: `ModelInput.from_ints(tokens)`."""

    chunks: list[EncodedTextChunk]

    @classmethod
    def from_ints(cls, tokens: Sequence[int]) -> ModelInput:
        """Of a list of tokens."""
        return cls([EncodedTextChunk(list(tokens))])

    @classmethod
    def empty(cls) -> ModelInput:
        """Without tokens."""
        return cls([])

    def to_ints(self) -> list[int]:
        """All tokens as a list."""
        return [int(token) for chunk in self.chunks for token in chunk.tokens]

    def append(self, chunk: EncodedTextChunk) -> ModelInput:
        """A new input with one more chunk."""
        return ModelInput([*self.chunks, chunk])

    def append_int(self, token: int) -> ModelInput:
        """A new input with one more token."""
        return self.append(EncodedTextChunk([token]))

    @property
    def length(self) -> int:
        """The number of tokens."""
        return sum(chunk.length for chunk in self.chunks)


@dataclass(frozen=True)
class Datum:
    """One sequence with what a loss needs: `target_tokens`, and `weights`, `logprobs` or `advantages`.

    All have one number for each token of the input: position i predicts target i. Lists, arrays and torch tensors
    become TensorData.
    """

    model_input: ModelInput
    loss_fn_inputs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        made = {name: _tensor(name, value) for name, value in self.loss_fn_inputs.items()}
        object.__setattr__(self, "loss_fn_inputs", made)


def _tensor(name: str, value: Any) -> TensorData:
    if isinstance(value, TensorData):
        return value
    if hasattr(value, "detach"):
        return TensorData.from_torch(value)
    return TensorData.from_numpy(np.asarray(value, dtype="int64" if name in _INTEGERS else "float32"))


@dataclass(frozen=True)
class AdamParams:
    """The numbers of one AdamW step; `grad_clip_norm` 0 clips nothing."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True)
class SamplingParams:
    """How to sample: `stop` is a text or texts; `top_k` -1 is no limit."""

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    temperature: float = 1
    top_k: int = -1
    top_p: float = 1


@dataclass(frozen=True)
class ForwardBackwardOutput:
    """What a pass gives: for each datum its `logprobs`, and the summed loss as the metric `loss:sum`."""

    loss_fn_output_type: str
    loss_fn_outputs: list[dict[str, TensorData]]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimStepResponse:
    """What an optimizer step gives: the gradient norm before clipping."""

    metrics: dict[str, float] | None = None


@dataclass(frozen=True)
class SaveWeightsResponse:
    """Where a state or the weights were saved."""

    path: str


@dataclass(frozen=True)
class LoadWeightsResponse:
    """What was loaded."""

    path: str


@dataclass(frozen=True)
class SampledSequence:
    """A completion: its tokens with their log-probabilities, and `stop` or `length`."""

    stop_reason: str
    tokens: list[int]
    logprobs: list[float] | None = None


@dataclass(frozen=True)
class SampleResponse:
    """The completions of a prompt."""

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
