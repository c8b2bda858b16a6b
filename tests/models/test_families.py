"""No family is silently wrong: what is accepted is equal to `model(...)`, whatever is asked of it.

The comparisons are those of the table in docs/reference/models.md (`tests/models/families.py`),
which share no code with the check at load that accepts or refuses.
"""

from __future__ import annotations

import pytest

from tests.models.families import FEATURES, KINDS, PAGE, judge, quiet, table_of

# By scale and factor at the entry, cap and windows, sinks and experts, window fixed when it is
# built, convolutions, positions scaled by the batch.
TELLING = {
    "granite": {},
    "gemma2": {},
    "gpt_oss": {},
    "gpt_neo": {"slots"},
    "lfm2": {"packing", "slots"},
    "phi3, longrope": set(FEATURES),
}


@pytest.mark.parametrize("name", TELLING)
def test_telling_families_are_right_or_refused(name: str) -> None:
    with quiet():
        cells = judge(name).cells
    assert set(cells) == set(FEATURES)
    accepted = {feature for feature, cell in cells.items() if cell == "right"}
    assert accepted == set(FEATURES) - set(TELLING[name])
    assert "wrong" not in cells.values()


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_no_family_is_silently_wrong(name: str) -> None:
    with quiet():
        assert "wrong" not in judge(name).cells.values()


def test_the_table_has_every_family_and_none_that_is_wrong() -> None:
    lines = table_of(PAGE.read_text(encoding="utf-8"))
    assert lines.keys() == KINDS.keys()
    assert not [name for name, line in lines.items() if "wrong" in line.cells.values()]
    for name, refused in TELLING.items():
        cells = lines[name].cells
        assert {feature for feature, cell in cells.items() if "refused" in cell} == set(refused)
