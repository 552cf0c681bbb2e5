"""The settings that turn rows of any kind into examples, and the reasons why a row has no example."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mlx_nb.config.methods import method_named
from mlx_nb.config.run_config import RunConfig
from mlx_nb.data.examples.limits import UNLIMITED, ModelLimits
from mlx_nb.data.masks.prompt_format import DEFAULT_RENDERING, Rendering
from mlx_nb.data.masks.tokenizer import Tokenizer
from mlx_nb.data.rows.columns import Columns
from mlx_nb.errors import DataError


@dataclass(frozen=True)
class LeftOut:
    """A row that is not trained, and why."""

    row: int
    reason: str


@dataclass(frozen=True)
class ExampleSettings:
    """The settings that determine how a row becomes an example.

    `limits` are those of the model, and `completion` the most tokens that it generates after a prompt.
    Rows that are `down_weighted` count by `down_weight_factor`.
    """

    loss_on: str
    max_seq_length: int
    truncate: str
    columns: Columns
    stride: int = 0
    rendering: Rendering = DEFAULT_RENDERING
    limits: ModelLimits = UNLIMITED
    completion: int = 0
    down_weighted: frozenset[int] = frozenset()
    down_weight_factor: float = 1.0

    @classmethod
    def of(cls, config: RunConfig, limits: ModelLimits = UNLIMITED) -> ExampleSettings:
        """The settings of a run, with the limits of its model."""
        columns = Columns(
            messages=config.chat_feature,
            prompt=config.prompt_feature,
            completion=config.completion_feature,
            text=config.text_feature,
            system=config.system_feature,
            chosen=config.chosen_feature,
            rejected=config.rejected_feature,
            label=config.label_feature,
            answer=config.answer_feature,
            preference_score=config.preference_score_feature,
            roles=config.roles,
        )
        rendering = Rendering.of(config)
        completion = config.max_completion_length if method_named(config.method).kind.sampled else 0
        cut = (config.loss_on, config.max_seq_length, config.truncate)
        return cls(*cut, columns, config.stride, rendering, limits, completion)

    def resolved(self, tokenizer: Tokenizer) -> ExampleSettings:
        """With the format of strings decided for this tokenizer. Raises DataError as `Rendering.resolved` does."""
        return dataclasses.replace(self, rendering=self.rendering.resolved(tokenizer))


class TooLong(DataError):
    """A row is longer than max_seq_length and `truncate: error` forbids cutting it."""
