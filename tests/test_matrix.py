"""What the quick tests leave of a matrix to the slow ones."""

from __future__ import annotations

from itertools import product

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
