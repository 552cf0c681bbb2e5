"""Whether this process is a notebook: also asked by a signal that comes while IPython is being imported."""

from __future__ import annotations

import subprocess
import sys
import textwrap


def test_a_plain_process_has_no_shell_and_imports_none():
    asked = """
        import sys
        from mlx_nb.process.ipython import in_ipython, shell
        print(shell(), in_ipython(), "IPython" in sys.modules)
    """
    assert subprocess.check_output([sys.executable, "-c", textwrap.dedent(asked)], text=True).split() == [
        "None",
        "False",
        "False",
    ]


def test_a_shell_is_known():
    asked = """
        from IPython.core.interactiveshell import InteractiveShell
        from mlx_nb.process.ipython import in_ipython, shell
        before = in_ipython()
        made = InteractiveShell.instance()
        print(before, in_ipython(), shell() is made)
    """
    out = subprocess.check_output([sys.executable, "-c", textwrap.dedent(asked)], text=True)
    assert out.split() == ["False", "True", "True"]


def test_it_may_be_asked_in_the_middle_of_every_import_of_ipython():
    asked = """
        import os, signal, sys
        from mlx_nb.process.ipython import in_ipython
        found = []
        class Finder:
            def find_spec(self, name, path, target=None):
                if name.startswith("IPython"):
                    found.append(in_ipython())
        sys.meta_path.insert(0, Finder())
        import IPython
        print(len(found) > 20, any(found))
    """
    out = subprocess.check_output([sys.executable, "-c", textwrap.dedent(asked)], text=True)
    assert out.split() == ["True", "False"]
