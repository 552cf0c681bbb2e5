"""The benchmarks import only what is there: they are run by hand, so nothing else would notice."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import mlx_nb

FILES = sorted((Path(mlx_nb.__file__).parent.parent / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_a_benchmark_imports_is_there(path):
    found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in found if str(node.module).split(".")[0] == "mlx_nb"]
    for node in ours:
        module = importlib.import_module(node.module)
        for one in node.names:
            assert hasattr(module, one.name) or importlib.import_module(f"{node.module}.{one.name}"), one.name
