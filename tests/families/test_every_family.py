"""A few updates of a tiny model of every family: it trains and resumes, or is refused by name beforehand."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path

import pytest

from every_family import ENDS_THE_PROCESS, EVERY_FAMILY, REFUSED, TRAINED
from family_sweep import KINDS, METHODS, examine, is_in_cover

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
# One with a wrapper, one with latent attention and experts, one without attention, one with a soft cap.
FEW = [
    ("qwen3_5", "lora", "sft"),
    ("deepseek_v3", "full", "dpo"),
    ("mamba2", "dora", "sft"),
    ("gemma2", "quantized", "dpo"),
]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder for a tiny model of each family."""
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize(("family", "kind", "method"), FEW)
@pytest.mark.matrix(every=4)
def test_it_trains_resumes_and_answers(family, kind, method, tmp_path, models, tiny_folder):
    assert "refused" not in examine(family, kind, method, tmp_path, models, tiny_folder)


# Whose own code cannot compute it.
REFUSED_IN_A_KIND = {("afm7", "quantized")}


SWEPT = [family for family in EVERY_FAMILY if family not in ENDS_THE_PROCESS]
CASES = list(product(SWEPT, KINDS, METHODS))
COVER = [case for case in CASES if is_in_cover(*case, SWEPT)]


@pytest.mark.families
@pytest.mark.parametrize(
    ("family", "kind", "method"),
    [
        pytest.param(
            *case,
            marks=[
                pytest.mark.xdist_group(case[0]),  # one process makes and tries its model
                *([] if is_in_cover(*case, SWEPT) else [pytest.mark.beyond_pairs]),
            ],
        )
        for case in CASES
    ],
)
def test_every_family_trains_resumes_and_answers_or_is_refused_by_name(
    family, kind, method, tmp_path, models, tiny_folder
):
    found = examine(family, kind, method, tmp_path, models, tiny_folder)
    if "refused" in found:
        assert family in found["refused"]
        assert family in REFUSED or kind in ("dora", "full") or (family, kind) in REFUSED_IN_A_KIND
    else:
        assert family in TRAINED


def test_half_of_the_cases_have_every_pair_of_family_kind_and_method():
    assert len(COVER) == len(CASES) / 2
    for one, other in combinations(range(3), 2):
        pairs = {(case[one], case[other]) for case in CASES}
        assert {(case[one], case[other]) for case in COVER} == pairs
    families_of = {pair: sum(case[1:] == pair for case in COVER) for pair in product(KINDS, METHODS)}
    assert max(families_of.values()) - min(families_of.values()) <= 1


def table_of_families():
    """What the page has for each family: whether it trains, by kind."""
    lines = [line.split("|")[1:-1] for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    cells = {family.strip(): [cell.strip() for cell in row] for family, *row in lines}
    return {
        family: {kind: cell != "refused" for kind, cell in zip(KINDS, row, strict=True)}
        for family, row in cells.items()
        if family != "family"
    }


def test_the_page_of_families_names_each():
    assert set(table_of_families()) == set(EVERY_FAMILY)


def test_a_family_that_trains_in_two_kinds_trains_with_both_methods_in_the_half():
    for family, trains in table_of_families().items():
        methods = {method for name, kind, method in COVER if name == family and trains[kind]}
        assert len(methods) == min(sum(trains.values()), len(METHODS)) or family in ENDS_THE_PROCESS, family
