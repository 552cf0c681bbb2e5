"""Checks the arguments of `generate` and computes the answers; shared by Run and SavedModel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.masks.prompt_format import Rendering
from mlx_nb.errors import CommandError, shown

if TYPE_CHECKING:
    from mlx_nb.rollouts.generation import Prompt


class GenerationInputs(Protocol):
    """What generation needs: settings, tokenizer, and how prompts are rendered."""

    config: RunConfig

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""

    @property
    def prompt_rendering(self) -> Rendering:
        """How a prompt is rendered for the model."""


def check_generation(prompt: Any, max_tokens: Any, temperature: Any) -> None:
    """Raise CommandError for a prompt or option that `generate` cannot use."""
    if isinstance(prompt, Mapping):
        raise CommandError(
            f"cannot ask {shown(prompt)}, which is not a list of messages. Write `[...]` around a message."
        )
    prompts = [prompt] if isinstance(prompt, str) or not isinstance(prompt, Sequence) else list(prompt)
    for one in prompts:
        if not isinstance(one, str | Mapping) and not (isinstance(one, Sequence) and not isinstance(one, bytes)):
            raise CommandError(f"cannot ask {one!r}. A prompt is a text, or a list of messages with role and content.")
        if isinstance(one, str) and any("\ud800" <= character <= "\udfff" for character in one):
            raise CommandError("the prompt has half a surrogate pair, which is not valid text. Remove it.")
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int):
        raise CommandError(f"max_tokens must be a whole number of 1 or more, not {max_tokens!r}.")
    number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not number or not 0 <= temperature < math.inf:
        raise CommandError(f"temperature must be a number of at least 0, not {temperature!r}.")


def generate_answers(
    inputs: GenerationInputs,
    model: Any,
    prompt: Prompt | Sequence[Prompt],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    tools: Sequence[Any] | None,
    on_text: Callable[[Any], None] | None,
) -> Any:
    """The answer of `model`, or a list of answers. `Run.generate` documents the arguments, already checked."""
    from mlx_nb.model.memory import memory_errors
    from mlx_nb.rollouts.generation import generate_texts

    several = not isinstance(prompt, str) and not (prompt and isinstance(prompt[0], Mapping))
    prompts = list(prompt) if several else [prompt]
    with memory_errors("the model answered", "Fewer prompts at once, or a lower max_tokens, need less."):
        texts = generate_texts(
            model,
            inputs.tokenizer,
            prompts,  # type: ignore[arg-type]
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            rendering=inputs.prompt_rendering,
            tools=tools,
            roles=inputs.config.roles,
            on_texts=on_text if several or on_text is None else lambda texts: on_text(texts[0]),
        )
    return texts if several else texts[0]
