"""The rule of the bundled sums, against sums worked out by hand."""

from __future__ import annotations

import pytest

from rlhf_exp.rewards.arithmetic import is_right, result_of, score, stated_number


@pytest.mark.parametrize(
    ("prompt", "result"),
    [
        ("What is 3 + 9 - 2?", 10),
        ("4 - 2 = ?", 2),
        ("\n\nHuman: Work out 9 - 7 + 6 + 9.\n\nAssistant:", 17),
        ("\n\nHuman: 1 + 1?\n\nAssistant: 2\n\nHuman: 2 + 5 = ?\n\nAssistant:", 7),
        ("How much is 47 + 28?", 75),
    ],
)
def test_the_result_of_the_last_sum_in_a_prompt(prompt: str, result: int) -> None:
    assert result_of(prompt) == result


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("It is 10.", True),
        ("10", True),
        ("3 + 9 = 12, 12 - 2 = 10.", True),
        ("It is not 11 but 10!", True),
        ("It is 11.", False),
        ("It is 10, or 11.", False),
        ("It is 10.5.", False),
        ("It is -10.", False),
        ("1 0", False),
        ("I do not know.", False),
        ("", False),
    ],
)
def test_the_last_number_decides(response: str, right: bool) -> None:
    assert is_right("What is 3 + 9 - 2?", response) is right
    assert score(["What is 3 + 9 - 2?"], [response]) == [float(right)]


def test_a_number_below_zero_is_read_as_such() -> None:
    assert stated_number("That makes -4.") == -4


def test_another_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="'How do I boil 2 eggs\\?' asks for no sum"):
        score(["How do I boil 2 eggs?"], ["4"])
