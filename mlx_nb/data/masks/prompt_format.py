"""How strings become model input: the one decision shared by training and generation."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.errors import DataError

CHAT, RAW = "chat", "raw"
FORMAT_WORDS = {CHAT: "chat template", RAW: "raw text"}


@dataclass(frozen=True)
class Rendering:
    """How strings are written for the model, in rows and in prompts. Messages always use the chat template.

    prompt_format           "chat": a prompt is a user turn and a completion an assistant turn of the chat template;
                            "raw": the text itself, the completion directly after its prompt; None: chat if the
                            tokenizer has a template
    special_tokens_in_text  "keep": control tokens written in a text become control tokens, as in mlx-lm;
                            "text": they are tokenized as ordinary characters
    """

    prompt_format: str | None = None
    special_tokens_in_text: str = "keep"

    @classmethod
    def of(cls, config: RunConfig) -> Rendering:
        """The Rendering that a run's settings describe."""
        return cls(config.prompt_format, config.special_tokens_in_text)

    def resolved(self, tokenizer: Tokenizer) -> Rendering:
        """A copy with its format decided. Raises DataError for "chat" with a tokenizer without a template."""
        template = has_chat_template(tokenizer)
        if self.prompt_format == CHAT and not template:
            raise DataError(
                "`prompt_format: chat` needs a chat template, and the tokenizer has none. Set `chat_template:` to one, "
                "or `prompt_format: raw`."
            )
        return self if self.prompt_format else replace(self, prompt_format=CHAT if template else RAW)

    def is_raw(self, tokenizer: Tokenizer) -> bool:
        """Whether strings are raw text for this tokenizer. Raises as `resolved` does."""
        return self.resolved(tokenizer).prompt_format == RAW

    @property
    def as_text(self) -> bool:
        """Whether control tokens in a text are ordinary characters."""
        return self.special_tokens_in_text == "text"


DEFAULT_RENDERING = Rendering()


def has_chat_template(tokenizer: Tokenizer) -> bool:
    """Whether messages can be rendered: by a template of the tokenizer, or by mlx-lm's own code for the model."""
    return getattr(tokenizer, "chat_template", None) is not None or has_own_code(tokenizer)


def has_own_code(tokenizer: Tokenizer) -> bool:
    """Whether mlx-lm's wrapper renders with its own code for the model, regardless of the tokenizer's template."""
    return getattr(tokenizer, "_chat_template", None) is not None
