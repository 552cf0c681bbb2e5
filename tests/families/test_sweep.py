"""A few updates of a tiny model of every family: it trains and resumes, or is refused by name beforehand."""

from __future__ import annotations

from pathlib import Path

import pytest

from every_family import ENDS_THE_PROCESS, EVERY_FAMILY, REFUSED, TRAINED
from family_sweep import KINDS, METHODS, examine

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


@pytest.mark.families
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=pytest.mark.xdist_group(family))  # one process makes and tries its model
        for family in EVERY_FAMILY
        if family not in ENDS_THE_PROCESS
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


def test_the_page_of_families_names_each():
    lines = [line.split("|")[1].strip() for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert set(lines) - {"family"} == set(EVERY_FAMILY)
