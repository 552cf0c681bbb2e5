"""The house has one reading order: a room imports only from the rooms before it, and modules in no circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mlx_nb

PACKAGE = Path(mlx_nb.__file__).parent
# Folders and single files in reading order. A new file in a folder needs no place here.
LAYERS = [
    "errors",
    "events",
    "config",
    "config.dialects",
    "process",
    "files",
    "data.sources",
    "data.masks",
    "data.rows",
    "data.examples",
    "view",
    "view.rows",
    "view.curves",
    "data.check",
    "model.gguf",
    "model",
    "rollouts",
    "rollouts.rewards",
    "objectives",
    "train",
    "view.reports",
    "view.panel",
    "export",
    "run",
    "experiments",
    "notebook",
    "cli",
    "mlx_nb",  # the package itself, which hands on the public names
]
IN_ONE_PROCESS = pytest.mark.xdist_group("layers")  # which parses the files of the package once
HEAVY = ("mlx_lm", "transformers", "datasets", "matplotlib", "pandas", "torch")


def modules_of(package: Path) -> dict[str, Path]:
    """The files of a package by dotted name, without the package's own."""
    files = {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}
    return {name: path for name, path in files.items() if not name.endswith("__init__") and name != "__main__"}


@cache
def imported(text: str) -> list[tuple[str, str]]:
    """(module, name) of every import in a file of this text, wherever in it; the name of `import module` is empty."""
    nodes = list(ast.walk(ast.parse(text)))
    from_modules = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    found = [(node.module, alias.name) for node in from_modules for alias in node.names]
    return found + [(alias.name, "") for node in nodes if isinstance(node, ast.Import) for alias in node.names]


def imports(path: Path, modules: dict[str, Path]) -> set[str]:
    """Names of the package's modules that a file imports, wherever in it; `mlx_nb` is the package itself."""
    found = set()
    for module, name in imported(path.read_text()):
        if module.split(".")[0] == "mlx_nb":
            inner = module.removeprefix("mlx_nb").lstrip(".")
            full = f"{inner}.{name}".strip(".")
            found.add(full if full in modules else inner or "mlx_nb")
    return found


def room_of(module: str, modules: dict[str, Path]) -> str:
    """The folder of a module; a file at the top is a room of its own, and so is a folder that is imported from."""
    return module if module not in modules or "." not in module else module.rpartition(".")[0]


def faults(package: Path, layers: list[str]) -> list[str]:
    """Imports from a later room, rooms without a layer, and circles, each in one line."""
    modules = modules_of(package)
    graph = {name: imports(path, modules) for name, path in modules.items()}
    rooms = {name: room_of(name, modules) for name in {*graph, *(one for many in graph.values() for one in many)}}
    found = [f"{room} has no layer" for room in sorted(set(rooms.values()) - set(layers))]
    if not found:
        found = [
            f"{name} imports {other}, of a later room"
            for name, others in sorted(graph.items())
            for other in sorted(others)
            if layers.index(rooms[other]) > layers.index(rooms[name])
        ]
    try:
        TopologicalSorter({name: others & set(graph) for name, others in graph.items()}).prepare()
    except CycleError as error:
        found.append(f"circle: {' -> '.join(error.args[1])}")
    return found


@IN_ONE_PROCESS
def test_a_room_imports_only_from_rooms_before_it_and_no_module_in_a_circle():
    assert faults(PACKAGE, LAYERS) == []


@IN_ONE_PROCESS
def test_the_rooms_are_tied_by_fewer_than_75_arrows():
    """Rooms: the folders and single files of the package, and benchmarks/. An arrow: one imports from another.

    Left out are `export` and `experiments`, which use many rooms because they put a trained model to use.
    """
    rooms = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir()}
    files = [(path.relative_to(PACKAGE).with_suffix("").parts[0], path) for path in PACKAGE.rglob("*.py")]
    files += [("benchmarks", path) for path in (PACKAGE.parent / "benchmarks").glob("*.py")]
    arrows = {("benchmarks", "__init__")}  # `from mlx_nb import Run`
    for room, path in files:
        named = {name.split(".")[0] for name in imports(path, {})}
        arrows |= {(room, name if name in rooms else "__init__") for name in named}
    users = {"export", "experiments"}
    between = sorted((one, other) for one, other in arrows if one != other and not users & {one, other})
    assert 50 < len(between) < 75, between


def test_an_upward_import_a_circle_and_a_room_without_a_layer_are_named(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    write("low/a.py", "from mlx_nb.high import b\n")
    write("high/b.py", "def later():\n    from mlx_nb.high.c import x\n")
    write("high/c.py", "from mlx_nb.high.b import y\n")
    write("high/new.py", "from mlx_nb.low.a import z\nimport mlx_nb\n")
    face, upward, circle = faults(tmp_path, ["low", "high", "mlx_nb"])
    assert upward == "low.a imports high.b, of a later room"
    assert face == "high.new imports mlx_nb, of a later room"
    assert circle in ("circle: high.b -> high.c -> high.b", "circle: high.c -> high.b -> high.c")
    assert faults(tmp_path, ["low"])[0] == "high has no layer"


@pytest.mark.parametrize("room", ["config", "data"])
def test_settings_and_rows_do_not_know_mlx(room):
    for path in (PACKAGE / room).rglob("*.py"):
        tree = ast.parse(path.read_text())
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        roots = {alias.name.split(".")[0] for node in names if isinstance(node, ast.Import) for alias in node.names}
        roots |= {node.module.split(".")[0] for node in names if isinstance(node, ast.ImportFrom) and node.module}
        assert not roots & {"mlx", "mlx_lm"}, path


def test_loading_the_extension_imports_nothing_heavy():
    code = (
        "from IPython.core.interactiveshell import InteractiveShell as S; import sys; before = set(sys.modules);"
        "shell = S.instance(); shell.run_line_magic('load_ext', 'mlx_nb');"
        f"loaded = [name for name in {HEAVY!r} if name in set(sys.modules) - before]; assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_file_of_tests_has_a_name_of_its_own():
    """Or pytest cannot collect the second."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)


def test_no_test_imports_another_test():
    """What two of them need is in tests/support."""
    tests = Path(__file__).parent
    names = {path.stem for path in tests.rglob("test_*.py")}
    for path in tests.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not names & {str(module).split(".")[-1] for module in modules}, path
