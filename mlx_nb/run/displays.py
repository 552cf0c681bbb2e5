"""The displays of a run: curves, panel, report, completions, row browser and status text."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mlx_nb.config.methods import method_named
from mlx_nb.data.sources.splits import Splits
from mlx_nb.errors import CommandError, MlxNbError
from mlx_nb.events import RunState
from mlx_nb.files.places import same_folder
from mlx_nb.files.run_folder import RunFolder
from mlx_nb.files.written_files import REPORT_FILE
from mlx_nb.run.inputs import SPLITS
from mlx_nb.view.panel.run_handle import RunHandle

if TYPE_CHECKING:
    from mlx_nb.view.curves.shown_figure import ShownFigure
    from mlx_nb.view.panel.panel import Panel
    from mlx_nb.view.reports.completions import CompletionsDisplay
    from mlx_nb.view.rows.browser import RowBrowser


class ShownRun(RunHandle, Protocol):
    """The interface of a run that its displays need."""

    @property
    def home(self) -> RunFolder:
        """Its folder, with the lock and the list of written files."""

    @property
    def splits(self) -> Splits:
        """The rows of each split."""

    def status(self) -> str:
        """The run in a few lines of text."""

    def visits_text(self, split: str, row: int) -> str:
        """When a row was trained on, as text."""


def plot(run: ShownRun) -> ShownFigure:
    """The curves of a run as a figure that displays itself."""
    from mlx_nb.view.curves.figure import plot_history

    metrics = method_named(run.config.method).metrics
    return plot_history(run.history, f"{run.name}: {run.config.model}", metrics)


def panel(run: ShownRun) -> Panel:
    """A new panel for a run."""
    from mlx_nb.model.backend import device_name, prepare_backend
    from mlx_nb.view.panel.panel import Panel

    return Panel(run, device=device_name(), warning=prepare_backend().warning)


def status(run: ShownRun, error: BaseException | None) -> str:
    """The run in a few lines of text. `error` is the exception that ended it, if there was one."""
    from mlx_nb.view.event_text import summary_text

    if run.prepared:
        return summary_text(run.history, f"{run.name}: {run.state}")
    if error is not None and run.state == RunState.FAILED:
        return f"{run.name}: failed before its first update. {type(error).__name__}: {error}"
    if run.state == RunState.PAUSED:
        return f"{run.name}: paused while loading, no update done yet. `%finetune run` continues it."
    return f"{run.name}: built, no update done yet. `%finetune step` or `%finetune run` starts it."


def card(run: ShownRun) -> dict[str, str]:
    """The run as text and HTML, for the output of a cell."""
    from mlx_nb.view.event_text import summary_html

    text = run.status()
    if not run.prepared:
        return {"text/plain": f"{run!r}\n{text}", "text/html": f"<pre>{escape(text)}</pre>"}
    return {"text/plain": text, "text/html": summary_html(run.history, f"{run.name}: {run.state}")}


def report(run: ShownRun, path: str | Path | None) -> Path:
    """Write the report page of a run to `path`, by default into its folder. Returns the path. Raises CommandError."""
    from mlx_nb.files.report_file import ReportPath, report_mark, report_path, write_report
    from mlx_nb.view.reports.run import report_html

    own = run.folder / REPORT_FILE
    path = own if path is None else report_path(path, run.name, run.folder)
    page = report_html(
        run.history,
        title=f"{run.name}: {run.state} after update {run.step_count}",
        mark=report_mark(run.name),
        settings=_settings_in_words(run),
        metrics=method_named(run.config.method).metrics,
        worst_rows=[(row, loss, _excerpt(run, row)) for row, loss in list(run.row_losses().items())[:10]],
    )
    if path.name == own.name and same_folder(path.parent, own.parent):
        try:
            with run.home.writing():
                run.home.write(own, lambda file: file.write(page.encode()))
        except OSError as error:
            raise CommandError(f"{path} cannot be written: {error.strerror or error}. Name another file.") from None
        return ReportPath(path)
    return ReportPath(write_report(path, page, run.name))


def _settings_in_words(run: ShownRun) -> dict[str, Any]:
    """The settings as shown in the report. Rows in memory are shown by their number."""
    settings = run.config.described()
    if "data" not in settings:
        settings["data"] = f"{len(run.splits.train):,} training rows in memory"
    return settings


def _excerpt(run: ShownRun, row: int) -> str:
    """The beginning of a training row; empty if it cannot be read."""
    try:
        conversation = run.inputs.split("train").view(row).conversation
    except MlxNbError:
        return ""
    return "" if conversation is None else conversation.text[:200]


def completions(run: ShownRun, step: int | None, ratios: bool) -> CompletionsDisplay:
    """The completions of the last rollout up to update `step` (None = the end). Raises CommandError without any."""
    from mlx_nb.view.reports.completions import CompletionsDisplay

    if not method_named(run.config.method).kind.sampled:
        raise CommandError(f"`method: {run.config.method}` trains on rows: {run.name} samples no completions.")
    rollouts = run.history.last_rollouts(run.history.rollout_count)
    found = [rollout for rollout in rollouts if step is None or rollout.step <= step]
    if not found:
        when = "yet. `%finetune step` does" if step is None else f"until update {step}"
        raise CommandError(f"{run.name} has sampled no completions {when}.")
    return CompletionsDisplay(found[-1], run.tokenizer, run.log_ratios() if ratios else ())


def browser(run: ShownRun, split: str) -> RowBrowser:
    """A browser for the rows of a run, `split` first. It holds only weak references to the run."""
    from mlx_nb.view.rows.browser import RowBrowser

    there = [name for name in SPLITS if getattr(run.splits, name) is not None]
    if split not in there:
        run.inputs.split(split)
    ordered = sorted(there, key=lambda name: name != split)
    return RowBrowser(
        {name: run.inputs.split(name) for name in ordered},
        run.tokenizer,
        losses=_weakly(run.row_losses),
        token_loss=_weakly(run.token_losses),
        visits=_weakly(run.visits_text),
    )


def row_records(run: ShownRun, split: str, wanted: int | str | None) -> Iterator[tuple[dict[str, Any], bool, bool]]:
    """Yields (row as plain values with tokens and mask, whether it can be trained, whether it stops a run).

    `wanted` is the number of rows, spread over the split; None and `all` = all. Raises CommandError for other words.
    """
    from mlx_nb.data.check.check import row_count, row_record, stops_a_run
    from mlx_nb.data.check.token_pass import sampled_rows

    examples = run.inputs.split(split)
    for row in sampled_rows(len(examples), row_count(wanted)).tolist():
        view = examples.view(row)
        yield row_record(view, examples.settings), view.error is None, stops_a_run(view, examples.settings)


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A weak reference to a method of a run, as a function. It raises CommandError once the run is gone."""
    there, name = weakref.WeakMethod(method), method.__self__.name  # type: ignore[attr-defined]

    def call(*arguments: Any, **options: Any) -> Any:
        found = there()
        if found is None:
            raise CommandError(
                f"{name} no longer exists: nothing refers to it any more, so there are no losses to show."
            )
        return found(*arguments, **options)

    return call
