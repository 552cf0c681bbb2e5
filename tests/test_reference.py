"""The reference says what the code has: every command, event, request, metric and public name, each with its words."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
from pathlib import Path

import pytest

import mlx_nb
from mlx_nb import events
from mlx_nb.config.methods import METHODS, is_built_in
from mlx_nb.notebook.commands import COMMANDS
from mlx_nb.run.run import Run

DOCS = Path(mlx_nb.__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["commands", "terminal", "events", "metrics", "python"])
def test_a_page_is_what_is_generated(generate, name):
    written = (DOCS / "reference" / f"{name}.md").read_text(encoding="utf-8")
    assert written == generate.page(name), "run `python docs/generate.py`"


def test_nothing_public_is_missing_or_without_words(generate):
    pages = {name: generate.page(name) for name in generate.PAGES}
    assert [name for name in COMMANDS if f"## {name}\n" not in pages["commands"]] == []
    assert "`%finetune rewind " in pages["commands"]
    assert all(f"## {name}\n" in pages["terminal"] for name in ("quickstart", "train", "check", "doctor", "settings"))
    classes = [one for one in vars(events).values() if inspect.isclass(one) and one.__module__ == events.__name__]
    reported = [one for one in classes if issubclass(one, events.Event | events.Request)]
    bases = (events.Event, events.Request)
    assert [
        one.__name__ for one in reported if one not in bases and f"### {one.__name__}\n" not in pages["events"]
    ] == []
    measured = {key for name, method in METHODS.items() if is_built_in(name) for key in method.metrics}
    assert [key for key in measured if f"`{key}`" not in pages["metrics"]] == []
    members = [name for name in vars(Run) if not name.startswith("_")]
    assert [name for name in members if f"### {name}\n" not in pages["python"]] == []
    wordless = [name for name in members if not inspect.getdoc(getattr(Run, name))]
    assert wordless == []
    assert [one.__name__ for one in reported if not one.__doc__] == []


def test_every_field_of_an_event_and_of_a_request_says_what_it_is(generate):
    kinds = [
        one for one in vars(events).values() if inspect.isclass(one) and issubclass(one, events.Event | events.Request)
    ]
    own = {
        (kind, field.name)
        for kind in kinds
        for field in dataclasses.fields(kind)
        if field.name in vars(kind)["__annotations__"]
    }
    assert len(own) > 60
    wordless = [f"{kind.__name__}.{name}" for kind, name in own if len(generate.field_words(kind).get(name, "")) < 5]
    assert wordless == []
    page = generate.page("events")
    missing = [name for kind, name in own if name != "step" and f"| {generate.field_words(kind)[name]} |" not in page]
    assert missing == []


def test_a_comment_is_that_of_its_own_field(generate):
    words = generate.field_words(events.RolloutCompleted)
    assert words["groups"].startswith("for each prompt {row, prompt, completions}")
    assert words["seconds"] == "wall time of sampling"
    assert words["reward_seconds"] == "wall time of each reward function"
