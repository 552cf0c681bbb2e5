"""The `%finetune` commands for results: curves, reports, comparisons, and runs saved on disk.

A new command of this group is a function here and its entry in the table at the end.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mlx_nb.config.dialects.exported import EXPORTED, export_settings
from mlx_nb.config.dialects.imported import import_settings
from mlx_nb.config.dialects.programs import DIALECTS
from mlx_nb.config.yaml_text import read_list
from mlx_nb.errors import CommandError
from mlx_nb.files.places import run_folder, working_folder
from mlx_nb.notebook.command import (
    OUTPUT,
    Command,
    argument,
    command,
    output_name,
)
from mlx_nb.notebook.front_end import insert_cell
from mlx_nb.notebook.session import Session, how_to_get_one
from mlx_nb.notebook.text_output import Text
from mlx_nb.run.adapter_exports import FORMATS, MLX_LM
from mlx_nb.run.inputs import SPLITS
from mlx_nb.run.saved_model import how_to_use
from mlx_nb.view.metric_text import headline


def _save(session: Session, arguments: argparse.Namespace) -> Text:
    run = session.get(arguments.name)
    folder = run.save(arguments.path, format=arguments.format)
    lines = how_to_use(run.config, run.loaded, folder, peft=arguments.format != MLX_LM)
    return Text("\n".join([f"saved to {folder}", *lines]))


def _runs(session: Session, arguments: argparse.Namespace) -> Text:
    if arguments.disk:
        from mlx_nb.notebook.runs_on_disk import kept_text

        return Text(kept_text(run.folder for run in session.runs.values()))
    if not session.runs:
        return Text(f"no runs yet. {how_to_get_one()}")
    table = [("", "run", "state", "update", "loss", "validation", "method", "model")]
    for run in session.runs.values():
        last, valid = run.history.last_step, run.history.evaluations("valid")
        table.append(
            (
                "→" if session.is_current(run) else "",
                run.name,
                run.state,
                f"{run.step_count} of {run.trainer.iters}" if run.prepared else "-",
                f"{last.loss:.4f}" if last else "-",
                _headline_text(valid[-1]) if valid else "-",
                f"{run.config.method}, {run.config.fine_tune_type}",
                run.config.model,
            )
        )
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return Text("\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in table))


def _headline_text(evaluation: dict[str, Any]) -> str:
    name, value = headline(evaluation)
    return f"{value:.4f}" if name == "loss" else f"{name} {value:.4f}"


def _config(session: Session, arguments: argparse.Namespace) -> Text:
    run = session.get(arguments.name)
    if arguments.export is None:
        return Text(run.config.to_yaml().rstrip() or "# every setting is at its default")
    iters = run.trainer.iters if run.prepared else None
    written = export_settings(run.config, arguments.export, iters=iters)
    if arguments.path is None:
        return Text(f"{written}\n\n{written.yaml}".rstrip())
    path = written.save(arguments.path)
    return Text(f"{written}\n`{written.command} {path}` trains with it.")


def _import(session: Session, arguments: argparse.Namespace) -> Text:
    imported = import_settings(arguments.source, arguments.dialect)
    insert_cell(imported.cell())
    return Text(str(imported))


def _compare(session: Session, arguments: argparse.Namespace) -> Any:
    from mlx_nb.experiments.compare import compare
    from mlx_nb.notebook.comparison import compared
    from mlx_nb.notebook.progress_line import progress_shown

    base = "base" in arguments.runs and "base" not in session.runs
    runs = [session.get(name) for name in arguments.runs if not (base and name == "base")]
    if len(runs) == 1 and not base and not session.is_current(runs[0]):
        runs.insert(0, session.get())
    if not runs:
        runs = [session.get()] if base else list(session.runs.values())
    if len(runs) + base < 2:
        raise CommandError(
            f"%finetune compare: name two runs, or a run and base, as in `%finetune compare {runs[0].name} base`. "
            "`%finetune runs` lists them."
        )
    if len(runs) > 2 or not all(run.prepared for run in runs):
        return Text(compared(runs))
    metrics = None if arguments.metrics is None else read_list(arguments.metrics)
    options = {"metrics": metrics, "max_tokens": arguments.max_tokens, "answers": arguments.answers}
    options["rows"] = arguments.rows
    with progress_shown() as show:
        found = compare(*runs, base=base, split=arguments.split, on_progress=show, **options)
    if session.namespace is not None and (output := output_name(arguments.output)):
        session.namespace[output] = found
    return found.blind() if arguments.blind else found


def _lm_eval(session: Session, arguments: argparse.Namespace) -> Any:
    from mlx_nb.experiments.harness import lm_eval

    run = session.get(arguments.name)
    options = {"base": arguments.base, "limit": arguments.limit, "num_fewshot": arguments.shots}
    tasks = [name for name in arguments.tasks.split(",") if name]
    found = lm_eval(run, tasks, include_path=arguments.include_path, **options)
    if session.namespace is not None and (output := output_name(arguments.output)):
        session.namespace[output] = found
    return found


def _load(session: Session, arguments: argparse.Namespace) -> Text:
    from mlx_nb.run.saved_model import load

    output = output_name(arguments.output) or "model"
    known = session.runs.get(arguments.folder)
    place = known.folder if known is not None else Path(arguments.folder)
    model = load(place if place.exists() else run_folder(arguments.folder, working_folder()))
    if session.namespace is not None:
        session.namespace[output] = model
    return Text(
        f"{model!r}\n`{output}.generate('Hello')` uses the adapter, `{output}.generate('Hello', base=True)` the base."
    )


def _delete(session: Session, arguments: argparse.Namespace) -> Text:
    from mlx_nb.notebook.runs_on_disk import delete_kept

    known = session.runs.get(arguments.run)
    folder = known.folder if known is not None else run_folder(arguments.run, working_folder())
    return Text(delete_kept(folder, yes=arguments.yes))


RESULT_COMMANDS: dict[str, Command] = {
    "plot": command(
        "plot", "plot the curves so far", lambda session, arguments: session.get(arguments.name).plot(), of_now=True
    ),
    "save": command(
        "save",
        "save the adapter in the format of mlx-lm or PEFT",
        _save,
        argument("path", nargs="?", help="folder (default: the run's own)"),
        argument("--format", choices=FORMATS, default=MLX_LM, help="mlx-lm (default), peft, or peft-rslora"),
        of_now=True,
    ),
    "runs": command(
        "runs",
        "list the runs of this notebook, or on disk (--disk)",
        _runs,
        argument("--disk", action="store_true", help="include the runs in adapters/, with their size on disk"),
        steers=True,
    ),
    "config": command(
        "config",
        "print the settings that differ from the defaults, or write them for another program",
        _config,
        argument("path", nargs="?", help="with --export: new file"),
        argument("--export", choices=EXPORTED, help="as the settings of this program"),
    ),
    "import": command(
        "import",
        "translate the settings of another program into a cell",
        _import,
        argument("source", help='file (YAML or JSON), or a command in quotes: "mlx_lm.lora --model ..."'),
        argument(
            "--dialect",
            choices=sorted(DIALECTS),
            metavar="PROGRAM",
            help=f"{', '.join(sorted(DIALECTS))} (default: recognized by its words)",
        ),
        steers=True,
    ),
    "report": command(
        "report",
        "write one HTML page with everything about the run",
        lambda session, arguments: session.get(arguments.name).report(arguments.path),
        argument("path", nargs="?", help="file (default: report.html in its folder)"),
        of_now=True,
    ),
    "compare": command(
        "compare",
        "compare two runs, or a run and its base, row by row; of more runs, losses and settings",
        _compare,
        argument(
            "runs",
            nargs="*",
            metavar="run",
            help="names, or base (default: all; a single one is compared with the current run)",
        ),
        argument("--metrics", help="functions that judge the answers, such as exact_match,my_metric"),
        argument("--split", default="valid", choices=SPLITS, help="rows to compare on (default: valid)"),
        argument("--rows", help="other rows: general (what was forgotten), or a variable, file, folder or hub id"),
        argument("--answers", type=int, default=3, help="rows to answer that became worse, and better (default: 3)"),
        argument("--max-tokens", type=int, default=128, help="longest answer in tokens"),
        argument("--blind", action="store_true", help="vote on the answers without knowing whose they are"),
        OUTPUT,
    ),
    "lm_eval": command(
        "lm_eval",
        "measure tasks of lm-evaluation-harness, if that is installed",
        _lm_eval,
        argument("tasks", help="names of tasks, such as arc_easy,hellaswag"),
        argument("--base", action="store_true", help="the base model, without the adapter"),
        argument("--limit", type=int, help="only the first rows of each task"),
        argument("--shots", type=int, help="examples in each prompt (default: those of the task)"),
        argument("--include-path", metavar="FOLDER", help="a folder with tasks of your own"),
        OUTPUT,
    ),
    "load": command(
        "load",
        "load a saved adapter with its base, without its run",
        _load,
        argument("folder", help="name of a run, or folder of its adapter"),
        OUTPUT,
    ),
    "delete": command(
        "delete",
        "delete the files that mlx_nb wrote for a run",
        _delete,
        argument("run", help="name of the run, or its adapter folder"),
        argument("--yes", action="store_true", help="delete them; without it, only list what would be deleted"),
    ),
}
