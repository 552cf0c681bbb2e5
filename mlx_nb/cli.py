"""The `mlx-nb` command in a terminal; `command_line` lists its commands.

A new command is a subparser in `command_line` and the function that it calls.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import TYPE_CHECKING, Any

from mlx_nb.errors import ConfigError, DataError, MlxNbError

if TYPE_CHECKING:
    from mlx_nb.config.run_config import RunConfig
    from mlx_nb.run.run import Run
    from mlx_nb.run.saved_model import SavedModel

_CLOSED_PIPE = 141  # a shell's status for a program that was ended by SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status; an expected error is one line on stderr and status 1.

    If the reader of the output has closed it, as with `| head`, the status is 141 and no error is printed. If the
    output cannot be written, as on a full disk, one line on stderr says so, and the command continues without output.
    """
    output = _Output(sys.stdout)
    try:
        with redirect_stdout(output):
            try:
                return _carry_out(arguments)
            finally:
                output.flush()
    except BrokenPipeError:
        _discard(sys.stdout, sys.stderr)
        return _CLOSED_PIPE


class _Output:
    """Standard output of a command; all other attributes are those of the stream.

    If writing fails, as on a full disk, one line on stderr says so, and all later output is dropped. A closed pipe
    raises BrokenPipeError as usual. A process that was started without standard output writes nothing.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text, or drop it if that fails."""
        if self._stream is not None:
            with self._left_out():
                self._stream.write(text)
        return len(text)

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._stream is not None and bool(self._stream.isatty())

    def flush(self) -> None:
        """Write what is buffered, or drop it if that fails."""
        if self._stream is not None:
            with self._left_out():
                self._stream.flush()

    @contextmanager
    def _left_out(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            _discard(self._stream)
            with suppress(OSError, AttributeError):
                print(
                    f"mlx-nb: the output cannot be written ({error.strerror}); the command continues without it.",
                    file=sys.stderr,
                )


def _discard(*streams: Any) -> None:
    """Discard all further output of the streams, at exit as well."""
    with open(os.devnull, "w") as nowhere:
        for stream in streams:
            with suppress(OSError, ValueError, AttributeError):  # if the stream is not a file
                os.dup2(nowhere.fileno(), stream.fileno())


def _carry_out(arguments: Sequence[str] | None) -> int:
    # Slow imports happen inside this function, so that an interrupt during them is one line too.
    try:
        parser = command_line()
        chosen, further = parser.parse_known_args(arguments)
        # argparse assigns DATA and the settings together, and returns settings that follow an option as unknown.
        if further and (not hasattr(chosen, "settings") or any(word.startswith("-") for word in further)):
            parser.error(f"unrecognized arguments: {' '.join(further)}")
        if further:
            chosen.settings = [*chosen.settings, *further]
        if chosen.act is None:
            parser.print_help()
            return 2
        result: int = chosen.act(chosen)
        return result
    except MlxNbError as error:
        for line in str(error).splitlines():
            print(f"mlx-nb: {line}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mlx-nb: interrupted", file=sys.stderr)
        return 130


def command_line() -> argparse.ArgumentParser:
    """The parser of `mlx-nb`."""
    parser = argparse.ArgumentParser(prog="mlx-nb", description="Fine-tune a language model with MLX.")
    parser.set_defaults(act=None)
    commands = parser.add_subparsers(title="commands", metavar="")
    quickstart = commands.add_parser(
        "quickstart", help="fine-tune a small model in an example notebook, and measure it"
    )
    quickstart.add_argument(
        "--folder", default="mlx_nb_quickstart", help="folder for the notebook, its rows and the adapter"
    )
    quickstart.add_argument("--json", action="store_true", help="print the results as one line of JSON at the end")
    quickstart.set_defaults(act=_quickstart)
    train = commands.add_parser("train", help="train with the settings of a YAML file")
    train.add_argument("config", help="YAML file with the settings of a %%%%finetune cell, or of another program")
    train.add_argument("settings", nargs="*", metavar="key=value", help="settings that override the file")
    train.add_argument("--name", default="run", help="name of the run")
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="the same, as an option")
    train.add_argument("--resume", action="store_true", help="continue from the newest checkpoint of this name, if any")
    train.add_argument("--rewards", metavar="FILE", help="Python file that defines the reward functions")
    train.add_argument(
        "--json", action="store_true", help="print each event as a line of JSON on stdout, and nothing else"
    )
    train.add_argument(
        "--allow-changed",
        nargs="+",
        metavar="WHAT",
        default=(),
        help="model: start from an adapter trained on another base",
    )
    train.set_defaults(act=_train)
    importing = commands.add_parser("import", help="translate the settings of another program")
    importing.add_argument("source", help='YAML or JSON file, or a command in quotes: "mlx_lm.lora --model ..."')
    importing.add_argument("--dialect", help="mlx-lm, mlx-lm-lora, ... (default: recognized by its words)")
    importing.set_defaults(act=_import)
    evaluate = commands.add_parser("evaluate", help="measure a saved adapter, and the answers it gives, on a split")
    evaluate.add_argument("run", help="name of a run, or its adapter folder")
    evaluate.add_argument("settings", nargs="*", metavar="key=value", help="settings that override those of the run")
    evaluate.add_argument("--split", default="valid", choices=["train", "valid", "test"], help="rows to measure")
    evaluate.add_argument("--all", action="store_true", help="all rows of the split, not the fixed set of a validation")
    evaluate.add_argument("--metrics", help="functions that judge the answers, such as exact_match,my_metric")
    evaluate.add_argument("--functions", metavar="FILE", help="Python file that defines metric functions")
    evaluate.add_argument("--max-tokens", type=int, help="longest answer in tokens")
    evaluate.add_argument("--best", action="store_true", help="the best adapter of the run, not the last")
    evaluate.add_argument("--base", action="store_true", help="the base model, without the adapter")
    evaluate.add_argument("--json", action="store_true", help="print one JSON document")
    evaluate.set_defaults(act=_evaluate)
    fusing = commands.add_parser("fuse", help="merge a saved adapter into its base, for mlx-lm")
    fusing.add_argument("adapter", help="name of a run, or a folder in the format of mlx-lm or PEFT")
    fusing.add_argument("path", nargs="?", help="new folder; without it, only tell what each precision would lose")
    fusing.add_argument("--precision", help="base, mixed or 16-bit (default: the recommended one)")
    fusing.set_defaults(act=_fuse)
    gguf = commands.add_parser("gguf", help="write a model with a saved adapter for llama.cpp, Ollama and LM Studio")
    gguf.add_argument("adapter", help="name of a run, or a folder in the format of mlx-lm or PEFT")
    gguf.add_argument("path", nargs="?", help="new folder")
    gguf.add_argument("--type", default="f16", help="f16 (default), bf16, f32, q8_0, or one that llama.cpp makes")
    gguf.add_argument("--adapter-only", action="store_true", help="only the LoRA adapter")
    gguf.add_argument("--base", metavar="FILE", help="with --adapter-only: the base as GGUF, to check the adapter on")
    gguf.add_argument("--lm-studio", metavar="NAME", help="write to LM Studio's folder, under this name")
    gguf.set_defaults(act=_gguf)
    check = commands.add_parser("check", help="find problems in the rows, by row number")
    check.add_argument("data", help="folder, file or hub id, as in the setting `data`")
    check.add_argument("settings", nargs="*", metavar="key=value", help="settings, and rows=N (or all) to tokenize")
    check.add_argument("--model", help="model whose tokenizer and chat template are used; its weights are not loaded")
    check.add_argument("--json", action="store_true", help="print one JSON document")
    check.add_argument("--rows", action="store_true", help="print one JSON line per row, with tokens and loss mask")
    check.add_argument("--split", default="train", choices=["train", "valid", "test"], help="split for --rows")
    check.set_defaults(act=_check)
    plan = commands.add_parser("plan", help="plan the memory of a run, without loading weights")
    plan.add_argument("model", help="model (alias, folder, .gguf file or hub id), or a YAML file with settings")
    plan.add_argument("settings", nargs="*", metavar="key=value", help="settings, such as max_seq_length=1024")
    plan.add_argument("--memory", metavar="SIZE", help="memory to fit into, such as 16GB; default: what is available")
    plan.set_defaults(act=_plan)
    runs = commands.add_parser("runs", help="list the runs in adapters/")
    runs.add_argument("--disk", action="store_true", help="with their size on disk")
    runs.set_defaults(act=_runs)
    delete = commands.add_parser("delete", help="delete the files that mlx_nb wrote for a run")
    delete.add_argument("run", help="name of the run, or its adapter folder")
    delete.add_argument("--yes", action="store_true", help="delete them; without it, only list what would be deleted")
    delete.set_defaults(act=_delete)
    doctor = commands.add_parser(
        "doctor", help="report device, BLAS and speed of this machine, and how to improve them"
    )
    doctor.set_defaults(act=_doctor)
    settings = commands.add_parser("settings", help="list all settings with defaults and help")
    settings.add_argument("--markdown", action="store_true", help="as the Markdown page in the docs")
    settings.set_defaults(act=_settings)
    return parser


def _quickstart(chosen: argparse.Namespace) -> int:
    from mlx_nb.notebook.quickstart import run_quickstart

    return run_quickstart(chosen.folder, as_json=chosen.json)


def _train(chosen: argparse.Namespace) -> int:
    from pathlib import Path

    from mlx_nb.config.yaml_text import read_words
    from mlx_nb.model.backend import prepare_backend

    prepare_backend()
    from mlx_nb.notebook.driver import exit_status, print_events, train_here
    from mlx_nb.run.run import Run

    settings = read_words([*chosen.settings, *chosen.set], "mlx-nb train", "run.yaml iters=100")
    made = {"namespace": _functions_in(chosen.rewards), "allow_changed": chosen.allow_changed}
    run = Run.from_yaml(Path(chosen.config), name=chosen.name, **made, **settings)
    if run.imported is not None:
        print(run.imported, file=sys.stderr)
    if chosen.resume and run.has_checkpoint:
        run = Run.resume(run.folder, config=run.config, **made)
        print(f"{run.name} continues from update {run.step_count}.", *run.trainer.notes, sep="\n", file=sys.stderr)
    continue_hint = "the same command with --resume continues"
    return exit_status(print_events(run) if chosen.json else train_here(run, continue_hint=continue_hint))


def _import(chosen: argparse.Namespace) -> int:
    """Print the report on stderr and the settings on stdout; status 1 if something would change what is trained."""
    from mlx_nb.config.dialects.imported import import_settings

    imported = import_settings(chosen.source, chosen.dialect)
    print(imported, file=sys.stderr)
    print(imported.yaml, end="")
    return 1 if imported.missing else 0


def _evaluate(chosen: argparse.Namespace) -> int:
    import tempfile
    from pathlib import Path

    from IPython.lib.pretty import pretty

    from mlx_nb.config.yaml_text import read_list, read_words
    from mlx_nb.model.backend import prepare_backend

    prepare_backend()
    from mlx_nb.notebook.progress_line import shown_progress
    from mlx_nb.run.saved_evaluation import run_to_evaluate

    settings = read_words(chosen.settings, "mlx-nb evaluate", "adapters/run batch_size=8")
    metrics = None if chosen.metrics is None else read_list(chosen.metrics)
    functions = _functions_in(chosen.functions, "--functions")
    with tempfile.TemporaryDirectory(prefix="mlx_nb-") as scratch:
        run = run_to_evaluate(chosen.run, Path(scratch), settings, functions, best=chosen.best, base=chosen.base)
        try:
            with shown_progress(run):
                result = run.evaluate(chosen.split, all_rows=chosen.all, metrics=metrics, max_tokens=chosen.max_tokens)
        finally:
            run.release()
    print(result.to_json() if chosen.json else pretty(result))
    return 0


def _saved(folder: str) -> SavedModel:
    """The model with the adapter in a folder, or in that of a run."""
    from mlx_nb.model.backend import prepare_backend

    prepare_backend()
    from mlx_nb.run.saved_model import load_named

    return load_named(folder)


def _fuse(chosen: argparse.Namespace) -> int:
    report = _saved(chosen.adapter).fuse(chosen.path, precision=chosen.precision)
    print(report, "" if report.path is None else f"\n{report.how_to_use}", sep="\n")
    return 0


def _gguf(chosen: argparse.Namespace) -> int:
    options = {"type": chosen.type, "adapter": chosen.adapter_only, "base": chosen.base}
    print(_saved(chosen.adapter).gguf(chosen.path, lm_studio_name=chosen.lm_studio, **options))
    return 0


def _functions_in(path: str | None, option: str = "--rewards") -> dict[str, Any]:
    """The names that a Python file defines, with their values. Raises ConfigError if it cannot be read or run."""
    import runpy
    from pathlib import Path

    if path is None:
        return {}
    if not Path(path).is_file():
        raise ConfigError(f"{option} {path}: no such file. Give a Python file that defines the functions.")
    try:
        return runpy.run_path(path)
    except Exception as error:
        raise ConfigError(f"{option} {path}: {type(error).__name__}: {error}") from None


def _check(chosen: argparse.Namespace) -> int:
    import json

    from mlx_nb.config.yaml_text import advice_as_words, read_words
    from mlx_nb.run.run import Run

    settings = read_words(chosen.settings, "mlx-nb check", "data max_seq_length=1024")
    rows = settings.pop("rows", None)
    with advice_as_words():
        config = _config_for_check(chosen, settings)
    run = Run(config)
    if chosen.rows:
        return _print_rows(run, chosen.split, rows)
    check = run.check() if rows is None else run.check(rows=rows)
    print(json.dumps(check.to_dict(), ensure_ascii=False, indent=1) if chosen.json else str(check))
    return 0 if check.ok else 1


def _config_for_check(chosen: argparse.Namespace, settings: Mapping[str, Any]) -> RunConfig:
    from mlx_nb.config.methods import METHODS
    from mlx_nb.config.run_config import RunConfig

    values = dict(settings)
    given = {"data": chosen.data} | ({"model": chosen.model} if chosen.model else {})
    method = METHODS.get(str(values.get("method")))
    if method is not None and method.kind.sampled:
        values.setdefault("rewards", ["number_match"])  # a run needs some, and they do not affect how rows are read
    return RunConfig.from_dict({**values, **given})


def _plan(chosen: argparse.Namespace) -> int:
    from pathlib import Path

    from mlx_nb.config.yaml_text import advice_as_words, read_words
    from mlx_nb.run.run import Run

    settings = read_words(chosen.settings, "mlx-nb plan", "smollm2-135m max_seq_length=1024")
    if chosen.model.endswith((".yaml", ".yml", ".json")):
        run = Run.from_yaml(Path(chosen.model), **settings)
    else:
        with advice_as_words():
            data = settings.pop("data", [{"text": "any row"}])  # rows are not read
            run = Run(_config_for_check(argparse.Namespace(data=data, model=chosen.model), settings))
    plan = run.plan(chosen.memory)
    print(plan)
    return 0 if plan.fits else 1


def _print_rows(run: Run, split: str, wanted: int | str | None) -> int:
    import json

    from mlx_nb.run.displays import row_records

    if getattr(run.splits, split) is None:
        raise DataError(f"{run.config.data} has no {split} split. Give another --split, or val_set_size=0.1.")
    stopped, trained = False, 0
    for record, is_trained, stops in row_records(run, split, wanted):
        stopped = stopped or stops
        trained += is_trained
        print(json.dumps(record, ensure_ascii=False))
    return 1 if stopped or not trained else 0


def _runs(chosen: argparse.Namespace) -> int:
    from mlx_nb.notebook.runs_on_disk import kept_text

    print(kept_text(sizes=chosen.disk))
    return 0


def _delete(chosen: argparse.Namespace) -> int:
    from mlx_nb.notebook.runs_on_disk import delete_named

    print(delete_named(chosen.run, yes=chosen.yes))
    return 0


def _doctor(_chosen: argparse.Namespace) -> int:
    from mlx_nb.model.doctor import format_doctor_report

    print(format_doctor_report())
    return 0


def _settings(chosen: argparse.Namespace) -> int:
    from mlx_nb.config.help import settings_markdown, settings_text

    print(settings_markdown() if chosen.markdown else settings_text())
    return 0
