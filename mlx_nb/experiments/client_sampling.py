"""Samples from a model that does not change, in the words of tinker."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np

from mlx_nb.errors import CommandError
from mlx_nb.experiments.client_types import APIFuture, ModelInput, SampledSequence, SampleResponse, SamplingParams
from mlx_nb.model.logprobs import TargetScorer
from mlx_nb.rollouts.sampling import SamplingSettings, sample_groups

_MOST_TOKENS = 2048  # of a sample without max_tokens


class SamplingClient:
    """Samples from a model that does not change."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        model.eval()
        self.model, self._tokenizer = model, tokenizer

    def result(self, timeout: float | None = None) -> SamplingClient:
        """Itself."""
        return self

    def __await__(self) -> Generator[Any, None, SamplingClient]:
        return APIFuture(self).__await__()

    def get_tokenizer(self) -> Any:
        """The tokenizer of the model."""
        return self._tokenizer

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
    ) -> APIFuture[SampleResponse]:
        """`num_samples` completions of a prompt, with the log-probability of each token as it was drawn."""
        params = sampling_params
        stop = (params.stop,) if isinstance(params.stop, str) else tuple(params.stop or ())
        if params.stop is not None and (not stop or not all(isinstance(one, str) for one in stop)):
            raise CommandError("stop takes texts. Tokens, and an empty list, are not supported.")
        settings = SamplingSettings(
            max_tokens=params.max_tokens or _MOST_TOKENS,
            temperature=float(params.temperature),
            top_p=params.top_p,
            top_k=None if params.top_k in (-1, 0) else params.top_k,
            stop=stop,
        )
        seed = int(np.random.default_rng().integers(2**31)) if params.seed is None else params.seed
        sampling = sample_groups(self.model, self._tokenizer, [prompt.to_ints()], num_samples, settings, seed)
        while True:
            try:
                next(sampling)
            except StopIteration as ended:
                completions = ended.value
                break
        sequences = [
            SampledSequence("stop" if one.finished else "length", one.tokens.tolist(), one.logprobs.tolist())
            for one in completions
        ]
        logprobs = self.compute_logprobs(prompt).result() if include_prompt_logprobs else None
        return APIFuture(SampleResponse(sequences, logprobs))

    def compute_logprobs(self, prompt: ModelInput) -> APIFuture[list[float | None]]:
        """The log-probability of each token of a prompt; None for the first."""
        losses = TargetScorer(self.model).token_losses(np.asarray(prompt.to_ints(), np.int32))
        return APIFuture([None, *(-losses[1:]).tolist()])
