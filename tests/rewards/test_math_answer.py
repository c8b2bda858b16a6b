"""Mathematical answers against references; needs math-verify (extra `math`)."""

from __future__ import annotations

import pytest

from rlhf_exp.errors import UserError
from rlhf_exp.rewards.math_answer import FIELDS, score


def scored(answer: object, response: str) -> float:
    (value,) = score(["?"], [response], [{"answer": answer}])
    return value


@pytest.mark.parametrize(
    ("answer", "response", "right"),
    [
        ("75", "It is 75.", 1.0),
        (75, "3 + 4 = 7, 7 + 68 = 75.", 1.0),
        ("1/2", "so x = 0.5", 1.0),
        ("75", r"Thus \boxed{75}.", 1.0),
        ("3,000", "The answer is 3000.", 1.0),
        ("$x + 1$", "It is $1 + x$.", 1.0),
        ("She has 20 - 2 = 18 left. #### 18", "18", 1.0),
        ("75", "It is 76.", 0.0),
        ("75", "75 or 76", 0.0),
        ("75", "I do not know.", 0.0),
        ("75", "", 0.0),
    ],
)
def test_answers_are_compared_as_mathematics(answer: object, response: str, right: float) -> None:
    pytest.importorskip("math_verify")
    assert scored(answer, response) == right


def test_a_reference_without_mathematics_is_refused() -> None:
    pytest.importorskip("math_verify")
    with pytest.raises(UserError, match="the reference '' has no mathematical expression"):
        scored("", "75")


def test_what_it_needs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert FIELDS == ("answer",)
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(UserError, match=r"pip install math-verify` \(extra `math`\)"):
        scored("75", "75")
