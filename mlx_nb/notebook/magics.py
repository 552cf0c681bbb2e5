"""Defines the magics `%%finetune` and `%finetune`: they parse their text and call other modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from IPython.core.interactiveshell import InteractiveShell
from IPython.core.magic import Magics, cell_magic, line_magic, magics_class, no_var_expand
from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring

from mlx_nb.config.yaml_text import load_mapping
from mlx_nb.errors import CommandError
from mlx_nb.notebook.bare_run import BareRun
from mlx_nb.notebook.command import CELL_OPTIONS, output_name, refuse_shortened, wait_of
from mlx_nb.notebook.commands import run_line
from mlx_nb.notebook.console_pictures import ConsolePictures
from mlx_nb.notebook.help_text import cell_help
from mlx_nb.notebook.interrupt_display import InterruptsInOneLine
from mlx_nb.notebook.lost_interrupts import interrupts_noted
from mlx_nb.notebook.preferences import Finetune
from mlx_nb.notebook.question_marks import QuestionMarks
from mlx_nb.notebook.queued_cells import NOW, QueuedCells
from mlx_nb.notebook.session import Session
from mlx_nb.notebook.stage_start import start_settings
from mlx_nb.notebook.sweep_cell import start_sweep
from mlx_nb.notebook.templating import fill
from mlx_nb.notebook.text_output import say


@magics_class
class FinetuneMagics(Magics):
    """The magics of one shell, with the session that holds its runs."""

    def __init__(self, shell: InteractiveShell) -> None:
        super().__init__(shell)
        self.queued = QueuedCells(shell)
        self.preferences = Finetune(parent=shell)
        configurables: list[Any] = shell.configurables
        configurables.append(self.preferences)  # for %config
        self.session = Session(shell.user_ns, self.queued, self.preferences)
        self.interrupts = InterruptsInOneLine(shell)
        self.bare_run = BareRun(shell)
        self.question_marks = QuestionMarks(shell)
        self.console_pictures = ConsolePictures(shell)
        self.matcher: Any = None

    @no_var_expand
    @line_magic("finetune")  # type: ignore[arg-type]
    @interrupts_noted()
    def finetune_line(self, line: str) -> Any:
        """Control and use a run: `%finetune step`, `%finetune generate "..."`; `%finetune help` lists all commands."""
        if line.split()[:1] in (["-c"], ["--config"]):  # IPython has no cell magic without a body
            return self._start(line, "")
        return run_line(self.session, line)

    @no_var_expand
    @cell_magic("finetune")
    @magic_arguments()
    @argument("--name", default="run", help=CELL_OPTIONS["--name"])
    @argument("-c", "--config", default=None, metavar="FILE", help=CELL_OPTIONS["-c"])
    @argument("-o", "--output", default=None, metavar="VARIABLE", help=CELL_OPTIONS["-o"])
    @argument("--paused", action="store_true", help=CELL_OPTIONS["--paused"])
    @argument("--wait", action="store_true", help=CELL_OPTIONS["--wait"])
    @argument("--background", action="store_true", help=CELL_OPTIONS["--background"])
    @argument(NOW, action="store_true", help=CELL_OPTIONS[NOW])
    @argument("--from", dest="start", default=None, metavar="RUN", help=CELL_OPTIONS["--from"])
    @argument("--sweep", action="store_true", help=CELL_OPTIONS["--sweep"])
    @argument("--halving", action="store_true", help=CELL_OPTIONS["--halving"])
    @argument("--trials", type=int, default=None, metavar="N", help=CELL_OPTIONS["--trials"])
    @argument("--resume", action="store_true", help=CELL_OPTIONS["--resume"])
    @argument("--allow-changed", nargs="+", metavar="WHAT", default=(), help=CELL_OPTIONS["--allow-changed"])
    def finetune_cell(self, line: str, cell: str) -> None:
        """Fine-tune a model: the cell's body is YAML, one setting per line."""
        with interrupts_noted():
            self._start(line, cell)

    def _start(self, line: str, cell: str) -> None:
        from mlx_nb.notebook.driver import has_live_front_end, show_panel, train
        from mlx_nb.run.run import Run

        self.queued.note_request()
        arguments = _parse(self.finetune_cell, line)
        if not arguments.name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise CommandError(f"--name {arguments.name!r}: use letters, digits, - and _ only; it names a folder.")
        if arguments.sweep:
            start_sweep(self.session, cell, arguments)
            return
        if arguments.halving or arguments.trials is not None:
            raise CommandError("--halving and --trials are for --sweep.")
        output = output_name(arguments.output)
        wait = wait_of(arguments)
        shell: Any = self.shell
        namespace = shell.user_ns
        allowed = tuple(arguments.allow_changed)
        body, memory = fill(cell, namespace) + "\n", self.preferences.snapshot_memory
        given = load_mapping(body).values
        usual: dict[str, Any] = {} if memory is None or "snapshot_memory" in given else {"snapshot_memory": memory}
        if arguments.start is not None:
            usual |= start_settings(self.session, arguments.start, arguments.name, given)
        source: str | Path = body
        if arguments.config is not None:
            source, usual = Path(arguments.config), {**usual, **given}
        run = Run.from_yaml(source, name=arguments.name, namespace=namespace, allow_changed=allowed, **usual)
        if run.imported is not None:
            say(str(run.imported))
        run.inputs.check_names()
        if not arguments.paused:  # the cell fails if its run cannot start
            run.inputs.check_local_data()
        if arguments.resume and run.has_checkpoint:
            run = Run.resume(run.folder, config=run.config, namespace=namespace, allow_changed=allowed)
            say("\n".join([f"{run.name} continues from update {run.step_count}.", *run.trainer.notes]))
        for note in self.session.add(run, output):
            say(note)
        if arguments.paused:
            if has_live_front_end():
                show_panel(self.session, run)
            say(f"{run.name} is created. `%finetune step` does one update, `%finetune run` all of them.")
            return
        if not run.over:
            train(self.session, run, wait=wait, ends_cell=True)


def _parse(magic: Any, line: str) -> Any:
    """The parsed options. Raises CommandError with one line, where IPython would print the usage."""
    from IPython.core.error import UsageError

    refuse_shortened(line.split(), magic.parser, "%%finetune")
    try:
        return parse_argstring(magic, line)
    except UsageError as error:
        raise CommandError(f"%%finetune {line}: {error}. Options: {', '.join(CELL_OPTIONS)}.") from None


_cell: Any = FinetuneMagics.finetune_cell
_cell.__doc__ = cell_help(_cell.parser)
