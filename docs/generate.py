"""Write the pages of docs/reference from the code: `python docs/generate.py`. A test holds them to it."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import mlx_nb
from mlx_nb import events
from mlx_nb.cli import command_line
from mlx_nb.config.methods import METHODS, is_built_in
from mlx_nb.notebook.commands import COMMANDS
from mlx_nb.run.run import Run

FOLDER = Path(__file__).parent / "reference"


def _doc(thing: object) -> str:
    return inspect.cleandoc(getattr(thing, "__doc__", None) or "")


def commands() -> Iterator[str]:
    """Every `%finetune` command with its arguments."""
    yield "# Commands\n\n`%finetune COMMAND`, in a cell. `--name` or `-n` chooses another run than the current one.\n"
    for name, command in COMMANDS.items():
        usage = f"%finetune {name} {command.usage}".strip()
        yield f"## {name}\n\n`{usage}`\n\n{_sentence(command.help)}\n"
        yield from _arguments(command.parser, ("name", "help"))


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _arguments(parser: argparse.ArgumentParser, but: Collection[str]) -> Iterator[str]:
    """The arguments of a parser as a table."""
    rows = [
        f"| `{', '.join(one.option_strings) or one.metavar or one.dest}` | {(one.help or '').replace('%%', '%')} |"
        for one in parser._actions
        if one.help and one.dest not in but
    ]
    if rows:
        yield "\n".join(["| argument | |", "|---|---|", *rows]) + "\n"


def terminal() -> Iterator[str]:
    """Every `mlx-nb` command with its arguments."""
    yield "# In a terminal\n"
    yield "The exit status is 0 when all went well, 1 after an error, 130 after an interrupt and 143 after SIGTERM.\n"
    (subparsers,) = (one for one in command_line()._actions if isinstance(one, argparse._SubParsersAction))
    helps = {one.dest: one.help or "" for one in subparsers._choices_actions}
    for name, parser in subparsers.choices.items():
        usage = " ".join(parser.format_usage().split()[1:]).replace("[-h] ", "").replace(" [-h]", "")
        yield f"## {name}\n\n`{usage}`\n\n{_sentence(helps[name])}\n"
        yield from _arguments(parser, ("help",))


def _records(kinds: list[type]) -> Iterator[str]:
    for kind in kinds:
        yield f"### {kind.__name__}\n\n{_prose(_doc(kind))}\n"
        words = field_words(kind)
        own = [one for one in dataclasses.fields(kind) if one.name != "step"]
        rows = [f"| `{one.name}` | `{str(one.type).replace(' | ', ' or ')}` | {words[one.name]} |" for one in own]
        if rows:
            yield "\n".join(["| field | type | |", "|---|---|---|", *rows]) + "\n"


def field_words(kind: type) -> dict[str, str]:
    """What each field of a record is: the comment at the end of its line, or the lines of comment above it."""
    words: dict[str, str] = {}
    above: list[str] = []
    for line in inspect.getsource(kind).splitlines():
        code, _, comment = (part.strip() for part in line.partition("# "))
        name = re.match(r"(\w+):", code)
        if name and name[1] in kind.__annotations__:
            words[name[1]] = (comment or " ".join(above)).removesuffix(".")
        above = [*above, comment] if comment and not code else []
    return words


def _prose(text: str) -> str:
    """A docstring as Markdown: paragraphs, and what is set in columns or indented as it stands."""
    parts = [part.strip("\n") for part in text.split("\n\n")]
    return "\n\n".join(f"```text\n{part}\n```" if re.search(r"^ |\S {2,}\S", part, re.M) else part for part in parts)


def event_pages() -> Iterator[str]:
    """Every event and every request with its fields."""
    found = [one for one in vars(events).values() if inspect.isclass(one) and one.__module__ == events.__name__]
    event_types = [one for one in found if issubclass(one, events.Event) and one is not events.Event]
    request_types = [one for one in found if issubclass(one, events.Request) and one is not events.Request]
    yield "# Events and requests\n"
    yield "What a run yields from `run.events()` and gives its listeners; each has the `step` it belongs to.\n"
    yield "## Events\n"
    yield from _records(event_types)
    yield "## Requests\n\nWhat `run.request(...)` takes, from any thread; read at step boundaries.\n"
    yield from _records(request_types)


def metrics() -> Iterator[str]:
    """Every metric of every built-in method."""
    yield "# Metrics\n\nWhat is measured besides the loss, per update and per evaluation.\n"
    for name, method in METHODS.items():
        if is_built_in(name):
            rows = [f"| `{key}` | {one.help} | {one.healthy} |" for key, one in method.metrics.items()]
            table = "\n".join(["| metric | what it says | where a healthy run moves it |", "|---|---|---|", *rows])
            yield f"## {name}\n\n{table if rows else 'The loss alone.'}\n"


def python() -> Iterator[str]:
    """The public names of the package, and every public member of Run."""
    yield "# Python\n\n`import mlx_nb` gives these names; everything is imported when it is first used.\n"
    for name in sorted(mlx_nb.__all__):
        if not name.startswith("__") and name != "Run":
            thing = getattr(mlx_nb, name)
            signature = "" if name == "RunConfig" else str(inspect.signature(thing))
            yield f"## {name}\n\n```python\n{name}{_plain(signature)}\n```\n\n{_prose(_doc(thing))}\n"
    yield f"## Run\n\n```python\nRun{_plain(str(inspect.signature(Run)))}\n```\n\n{_prose(_doc(Run))}\n"
    for name, member in sorted(vars(Run).items()):
        if name.startswith("_"):
            continue
        inner = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        shown = f"Run.{name}{_plain(str(inspect.signature(inner)))}" if inspect.isfunction(inner) else f"run.{name}"
        yield f"### {name}\n\n```python\n{shown}\n```\n\n{_prose(_doc(inner))}\n"


def _plain(signature: str) -> str:
    """A signature without the names of modules, and without `self`."""
    text = re.sub(r"\b(?:[a-z_]\w*\.)+([A-Z]\w*)", r"\1", signature).replace("'", "")
    return re.sub(r"\((?:self|cls)(?:, )?", "(", text)


PAGES = {"commands": commands, "terminal": terminal, "events": event_pages, "metrics": metrics, "python": python}


def page(name: str) -> str:
    """The page called `name`, as Markdown."""
    return "\n".join(PAGES[name]())


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in PAGES:
        (FOLDER / f"{name}.md").write_text(page(name), encoding="utf-8")
    print(f"wrote {', '.join(PAGES)}", file=sys.stderr)
