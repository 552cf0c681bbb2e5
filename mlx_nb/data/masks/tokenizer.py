"""What is needed of a tokenizer: mlx-lm's wrapper around one of transformers has it, and so has that one alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol


class Tokenizer(Protocol):
    """Text to tokens and back; each member is that of `transformers`, but for the last four, which are mlx-lm's."""

    bos_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    all_special_ids: Sequence[int]
    added_tokens_decoder: Mapping[int, Any]
    chat_template: Any
    backend_tokenizer: Any
    split_special_tokens: bool

    def __len__(self) -> int:
        """How many tokens it has, those that were added too."""

    def __call__(self, text: str, **options: Any) -> Any:
        """The tokens of a text, with what `options` ask for."""

    def get_vocab(self) -> dict[str, int]:
        """The number of each entry."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text."""

    def decode(self, tokens: Any, **options: Any) -> str:
        """The text of some tokens."""

    def convert_ids_to_tokens(self, tokens: Any) -> list[str]:
        """Their entries in the vocabulary."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """A conversation as text, or as tokens."""

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The template that is used, of those that there are."""

    has_chat_template: bool
    _chat_template: Any  # code of mlx-lm's own that renders for some models
    eos_token_ids: Collection[int]
    detokenizer: Any
