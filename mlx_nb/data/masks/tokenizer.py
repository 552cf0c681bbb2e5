"""The interface of a tokenizer that mlx_nb needs: mlx-lm's wrapper has it, and so has a bare transformers tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol


class Tokenizer(Protocol):
    """Text to tokens and back; members are those of `transformers`, except the last four, which are mlx-lm's."""

    bos_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    all_special_ids: Sequence[int]
    added_tokens_decoder: Mapping[int, Any]
    chat_template: Any
    backend_tokenizer: Any
    split_special_tokens: bool

    def __len__(self) -> int:
        """Number of tokens, including added ones."""

    def __call__(self, text: str, **options: Any) -> Any:
        """The tokens of a text; `options` as in transformers."""

    def get_vocab(self) -> dict[str, int]:
        """The id of each vocabulary entry."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text."""

    def decode(self, tokens: Any, **options: Any) -> str:
        """The text of some tokens."""

    def convert_ids_to_tokens(self, tokens: Any) -> list[str]:
        """Their entries in the vocabulary."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Render a conversation as text or tokens."""

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The template in use, if there are several."""

    has_chat_template: bool
    _chat_template: Any  # mlx-lm's own rendering code for some models
    eos_token_ids: Collection[int]
    detokenizer: Any
