"""The `%finetune` commands that show and check rows: row, rows, browse, batch, rollouts, check, plan.

A new command of this group is a function here and its entry in the table at the end.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from mlx_nb.config.methods import method_named
from mlx_nb.config.run_config import RunConfig
from mlx_nb.config.yaml_text import advice_as_words, read_words
from mlx_nb.errors import CommandError
from mlx_nb.notebook.command import (
    SPLIT,
    Command,
    argument,
    command,
)
from mlx_nb.notebook.session import Session
from mlx_nb.notebook.text_output import Text
from mlx_nb.run.inputs import SPLITS
from mlx_nb.run.run import Run
from mlx_nb.view.event_text import visits_text

_ROWS_EXAMPLE = "%finetune rows data=bees model=smollm2-135m"


def _row(session: Session, arguments: argparse.Namespace) -> Any:
    from mlx_nb.view.rows.display import RowDisplay, measured_losses

    run = session.get(arguments.name)
    rows = run.rows(arguments.split)
    try:
        view = rows[arguments.number]
    except IndexError as error:
        raise CommandError(f"%finetune row: {error}") from None
    losses = {}
    if arguments.loss or arguments.compare:
        losses = measured_losses(view, run.token_losses, compare=bool(arguments.compare))
    return RowDisplay(view, run.tokenizer, arguments.split, per_token=arguments.tokens, page=arguments.page, **losses)


def _rows(session: Session, arguments: argparse.Namespace) -> Any:
    settings = [word for word in arguments.what if "=" in word]
    splits = [word for word in arguments.what if "=" not in word]
    if len(splits) > 1:
        raise CommandError(f"%finetune rows: {' '.join(splits)!r} is more than one split. Example: {_ROWS_EXAMPLE}")
    arguments.split = splits[0] if splits else "train"
    if settings:
        return _rows_of(session, arguments.split, settings)
    run = session.get(arguments.name)
    rows = run.rows(arguments.split)
    if arguments.top_loss is not None:
        return _top_loss(run, arguments.split, arguments.top_loss, arguments.measure)
    lines = [f"{len(rows)} rows in {arguments.split}. `%finetune row 0` shows one, token by token."]
    if arguments.split not in run.left_out:
        lines += ["Rows are left out when they are tokenized. `%finetune check` lists these rows now."]
    elif run.left_out[arguments.split]:
        lines += ["Left out:", *(f"  {row.reason}" for row in run.left_out[arguments.split])]
    return Text("\n".join(lines))


def _rows_of(session: Session, split: str, words: Sequence[str]) -> Any:
    """A browser for rows of data that no run uses yet; loads only the tokenizer of the model."""
    settings = read_words(words, "%finetune rows", _ROWS_EXAMPLE)
    if "data" not in settings:
        raise CommandError(f"%finetune rows: `data` is missing. Example: {_ROWS_EXAMPLE}")
    with advice_as_words():
        session.row_preview = Run(RunConfig.from_dict(settings), name="rows", namespace=session.namespace)
    session.row_preview.inputs.check_names()
    return session.row_preview.browse(split)


def _top_loss(run: Run, split: str, count: int, measure: bool) -> Text:
    if measure:
        run.evaluate(split, all_rows=True)
    losses = run.row_losses(split)
    if not losses:
        raise CommandError(
            f"%finetune rows: no row of {split} has been measured yet. Add --measure to measure all of them now."
        )
    visits = run.history.row_losses(split)
    lines = [f"highest loss ({_row_loss_is(run)}) of {len(losses)} rows of {split}:"]
    source = run.inputs.split(split).source
    lines += [
        f"  {source.named(row):>10}  {loss:7.3f}   {visits_text(visits[row])}"
        for row, loss in list(losses.items())[:count]
    ]
    return Text("\n".join(lines))


def _row_loss_is(run: Run) -> str:
    """What the loss of a row measures in the run's method."""
    method = method_named(run.config.method)
    if method.kind.loss_of_row:
        return method.kind.loss_of_row
    loss = run.config.loss or next(iter(method.losses))
    return "nats per trained token" if (method.name, loss) == ("sft", "nll") else "mean over its trained tokens"


def _browse(session: Session, arguments: argparse.Namespace) -> Any:
    return session.get(arguments.name).browse(arguments.split)


def _batch(session: Session, arguments: argparse.Namespace) -> Any:
    from mlx_nb.view.rows.batch import BatchDisplay

    run = session.get(arguments.name)
    return BatchDisplay(run.trainer.next_batches(), run.tokenizer)


def _rollouts(session: Session, arguments: argparse.Namespace) -> Any:
    return session.get(arguments.name).completions(arguments.step, ratios=arguments.ratios)


def _check(session: Session, arguments: argparse.Namespace) -> Any:
    from mlx_nb.view.reports.check import CheckDisplay

    run = session.get(arguments.name)
    key, equals, value = arguments.rows.partition("=")
    if key != "rows" or not equals:
        raise CommandError(f"%finetune check: {arguments.rows!r} is not rows=NUMBER. Example: rows=20000")
    check = run.check(rows=value)
    return Text(json.dumps(check.to_dict(), ensure_ascii=False)) if arguments.json else CheckDisplay(check)


def _plan(session: Session, arguments: argparse.Namespace) -> Any:
    return Text(str(session.get(arguments.name).plan(arguments.memory, time=arguments.time)))


ROW_COMMANDS: dict[str, Command] = {
    "row": command(
        "row",
        "show one row with its tokens and loss mask",
        _row,
        argument("number", type=int),
        argument("--split", default="train", choices=SPLITS),
        argument("--tokens", action="store_true", help="one cell per token"),
        argument("--loss", action="store_true", help="color tokens by the model's current loss"),
        argument("--compare", choices=["base"], help="color tokens by the change in loss since the base"),
        argument("--page", type=int, default=0, help="page of a long row"),
        of_now=True,
    ),
    "rows": command(
        "rows",
        "count rows and those left out, or browse any data",
        _rows,
        argument(
            "what",
            nargs="*",
            metavar="split, key=value",
            help="a split, or data=bees model=smollm2-135m to browse rows before a run",
        ),
        argument("--top-loss", type=int, metavar="N", help="the N rows with the highest loss at their last visit"),
        argument("--measure", action="store_true", help="with --top-loss: measure every row of the split first"),
        of_now=True,
    ),
    "browse": command("browse", "page through the rows, with filters and colors", _browse, SPLIT, steers=True),
    "batch": command("batch", "show the exact arrays of the next update", _batch, of_now=True),
    "rollouts": command(
        "rollouts",
        "show the newest completions with their rewards",
        _rollouts,
        argument("--step", type=int, metavar="UPDATE", help="the newest up to this update"),
        argument("--ratios", action="store_true", help="color tokens by log(current policy / sampling policy)"),
        of_now=True,
    ),
    "check": command(
        "check",
        "find problems in the rows, by row number",
        _check,
        argument(
            "rows",
            nargs="?",
            default="rows=5000",
            metavar="rows=N",
            help="how many rows of each split to tokenize, or all",
        ),
        argument("--json", action="store_true", help="print one JSON document"),
    ),
    "plan": command(
        "plan",
        "plan the memory of an update, and what fits",
        _plan,
        argument("--memory", metavar="SIZE", help="memory to fit into, such as 16GB; default: memory_limit"),
        argument("--time", action="store_true", help="measure 3 updates, which are undone, and estimate the rest"),
        of_now=True,
    ),
}
