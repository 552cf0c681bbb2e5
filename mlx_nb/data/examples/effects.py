"""Settings without effect on the given rows: detected once the rows are opened, before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from mlx_nb.config.run_config import SETTINGS, RunConfig
from mlx_nb.data.examples.examples import Examples, trains_plain_text
from mlx_nb.data.examples.kinds import recognize
from mlx_nb.data.rows.imitation import TextRow
from mlx_nb.data.sources.splits import Splits
from mlx_nb.errors import DataError

_OF_VALIDATION = (
    "steps_per_eval",
    "early_stopping_patience",
    "best_by",
)  # val_batches also limits an evaluation of train


def refuse_ineffective(config: RunConfig, splits: Splits) -> None:
    """Raise DataError, one line for each setting that has no effect with these rows."""
    problems = list(_problems(config, splits))
    if problems:
        raise DataError("\n".join(problems))


def refuse_loss_on(examples: Examples, loss_on: str) -> None:
    """Raise DataError for a `loss_on` that selects turns if every row is plain text, which has none."""
    if loss_on in ("final", "completion") and _is_plain_text(examples):
        raise DataError(
            f"`loss_on: {loss_on}` has no effect: every row is plain text, which is trained whole. Remove it, or give "
            "rows with `messages`, or with `prompt` and `completion`."
        )


def _is_plain_text(examples: Examples) -> bool:
    """Whether no row has turns, not even as written-out control tokens of a chat."""
    for row in range(len(examples)):
        try:
            content = recognize(examples.kind, examples.source[row], examples.settings.columns, row=row)
        except DataError:
            continue
        if not isinstance(content, TextRow):
            return False
    return trains_plain_text(examples)


def _problems(config: RunConfig, splits: Splits) -> Iterator[str]:
    changed = {name for name in (*_OF_VALIDATION, "val_set_size") if getattr(config, name) != SETTINGS[name].default}
    if splits.valid is None:
        why = "val_set_size: 0" if config.val_set_size == 0 else "too few training rows to hold any out"
        for name in _OF_VALIDATION:
            if name in changed and getattr(config, name) != -1:
                yield (
                    f"`{name}` has no effect: there are no validation rows ({why}). "
                    "Add a validation split, or set val_set_size; else remove it."
                )
    elif not splits.held_out and "val_set_size" in changed and config.val_set_size:
        yield "`val_set_size` has no effect: these data have a validation split. Remove it."
    if splits.test is None and config.test:
        yield (
            "`test: true`, but these data have no test split. Add one (test.jsonl in the folder, a dict with "
            "`test`, `test_split` of a hub dataset), or leave `test` out."
        )
