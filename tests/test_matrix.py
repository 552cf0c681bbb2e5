"""What the quick tests leave of a matrix to the slow ones, and which objects a collection of garbage examines."""

from __future__ import annotations

import gc
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest

import fault_count
from matrix import part


def test_each_value_of_each_parameter_is_in_the_part_and_the_part_is_small():
    cases = [{"form": a, "kind": b, "way": c} for a, b, c in product(range(7), range(4), range(3))]
    chosen = [cases[number] for number in part(cases, None)]
    assert len(chosen) == 7
    for name, values in (("form", 7), ("kind", 4), ("way", 3)):
        assert {case[name] for case in chosen} == set(range(values))


def test_a_list_of_cases_is_run_in_steps_and_a_case_asked_for_alone_is_run():
    cases = [{"setting": number} for number in range(10)]
    assert part(cases, 4) == [0, 4, 8]
    assert part(cases[7:8], 4) == [0]
    assert part(cases[7:8], None) == [0]


def test_of_interrupts_and_kills_a_third_is_made_or_all(monkeypatch):
    monkeypatch.setattr(fault_count, "_ALL", False)
    assert [fault_count.part_of(number) for number in (110, 40, 13, 3, 1)] == [37, 14, 5, 1, 1]
    monkeypatch.setattr(fault_count, "_ALL", True)
    assert fault_count.part_of(110) == 110


def test_what_tests_of_other_files_left_is_in_no_collection(request):
    conftest = request.config.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))
    left = ["by a test of another file"]
    item = SimpleNamespace(config=SimpleNamespace(stash=pytest.Stash()), path=Path("test_of_this_file.py"))
    assert any(one is left for one in gc.get_objects())
    conftest.pytest_runtest_setup(item)
    assert not any(one is left for one in gc.get_objects())
    ours = ["by this file"]
    conftest.pytest_runtest_setup(item)
    assert any(one is ours for one in gc.get_objects())
