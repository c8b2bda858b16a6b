"""The bundled sums: deterministic, held out by sum, and right as often as is said."""

from __future__ import annotations

import re

import pytest

from rlhf_exp.data.arithmetic import WORDINGS, ArithmeticRows, ArithmeticSizes, Sum, corpus_rows
from rlhf_exp.data.rows import Demonstration, Preference, Prompt, Row, rows_digest
from rlhf_exp.errors import UserError
from rlhf_exp.rewards.arithmetic import is_right, result_of


@pytest.fixture(scope="module")
def rows() -> ArithmeticRows:
    return corpus_rows(0)


def test_default_sizes(rows: ArithmeticRows) -> None:
    demonstrations, preferences, prompts = ([len(part) for _, part in kind.all()] for kind in rows)
    assert demonstrations == [6000, 200, 500]
    assert preferences == [4000, 200, 500]
    assert prompts == [3000, 200, 500]


def test_equal_seeds_give_equal_rows_and_others_do_not(rows: ArithmeticRows) -> None:
    def digest(found: ArithmeticRows) -> list[str]:
        return [rows_digest(part) for kind in found for _, part in kind.all()]

    assert digest(corpus_rows(0)) == digest(rows)
    assert not set(digest(corpus_rows(1))) & set(digest(rows))


def test_every_sum_is_in_one_split_alone(rows: ArithmeticRows) -> None:
    train, validation, test = (
        {asked(row) for kind in rows for row in getattr(kind, part)}
        for part in ("train", "validation", "test")
    )
    assert not train & test
    assert not train & validation
    assert not validation & test
    assert len(validation) == 200
    assert len(test) == 500


def test_demonstrations_are_right_as_often_as_asked(rows: ArithmeticRows) -> None:
    def share(found: ArithmeticRows) -> float:
        shown = found[0].train
        return sum(is_right(row.history[0].text, row.response) for row in shown) / len(shown)

    # 6000 draws at 1/2: standard deviation sqrt(0.25 / 6000) = 0.0065.
    assert share(rows) == pytest.approx(0.5, abs=0.026)
    sizes = ArithmeticSizes(demonstrations=200, preferences=1, prompts=1)
    assert share(corpus_rows(3, sizes, right=1.0)) == 1.0
    assert share(corpus_rows(3, sizes, right=0.0)) == 0.0


def test_the_right_side_of_a_pair_is_the_chosen_one(rows: ArithmeticRows) -> None:
    for _, pairs in rows[1].all():
        for row in pairs:
            prompt = row.history[0].text
            assert is_right(prompt, row.chosen)
            assert not is_right(prompt, row.rejected)


def test_both_sides_of_pairs_take_steps_and_only_one_hesitates(rows: ArithmeticRows) -> None:
    """Steps prove nothing: wrong responses take them, too."""
    pairs = rows[1].train
    right, wrong = ([" = " in side for side in sides] for sides in sides_of(rows))
    # Of 4000: half of the right ones; 0.3 of the 0.7 wrong ones that do not hesitate.
    assert sum(right) / len(pairs) == pytest.approx(0.5, abs=0.03)
    assert sum(wrong) / len(pairs) == pytest.approx(0.21, abs=0.03)
    assert not any("I do not know" in row.chosen for row in pairs)


def test_every_wording_occurs_and_is_read(rows: ArithmeticRows) -> None:
    prompts = rows[2].train
    for wording in WORDINGS:
        before, after = wording.split("{sum}")
        worded = [
            row.history[0].text
            for row in prompts
            if row.history[0].text.startswith(before) and row.history[0].text.endswith(after)
        ]
        assert len(worded) > 500  # of 3000, a quarter in the mean
        assert all(result_of(text) >= 0 for text in worded)


def test_a_prompt_has_its_result_beside_it_and_its_demonstration(rows: ArithmeticRows) -> None:
    demonstrations, preferences, prompts = rows
    answers = {row.history: row.response for row in demonstrations.train}
    for row in prompts.train:
        assert row.original == answers[row.history]
    paired: list[Row] = [*preferences.train, *preferences.test]
    for each in [*prompts.train, *demonstrations.train, *paired]:
        assert each.fields == {"answer": str(result_of(each.history[0].text))}


def test_steps_by_hand() -> None:
    each = Sum((3, 9, -2))
    assert each.text() == "3 + 9 - 2"
    assert each.result == 10
    assert each.worked() == "3 + 9 = 12, 12 - 2 = 10."
    # A slip of 1 in the first step; the second goes on from there.
    assert each.worked((0, 1)) == "3 + 9 = 13, 13 - 2 = 11."


def test_more_rows_than_there_are_sums_are_refused() -> None:
    # 9 numbers to begin with, and 9 to take away (at most the first) or to add: 45 + 81.
    with pytest.raises(UserError, match=r"6700 sums asked for.*numbers=2 there are 126: raise it"):
        corpus_rows(0, numbers=2)


def asked(row: Demonstration | Preference | Prompt) -> str:
    """Return the sum in a row's prompt, whatever its wording."""
    return "".join(re.findall(r"[0-9+-]", row.history[0].text))


def sides_of(rows: ArithmeticRows) -> tuple[list[str], list[str]]:
    pairs = rows[1].train
    return [row.chosen for row in pairs], [row.rejected for row in pairs]
