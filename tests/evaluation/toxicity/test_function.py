from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.toxicity.function import FunctionToxicity


def scorer(function: Callable[[list[str]], Any]) -> FunctionToxicity:
    return FunctionToxicity(function, "mine.py:score", "eval.toxicity.scorer")


def test_its_numbers() -> None:
    found = scorer(lambda texts: [len(text) / 10 for text in texts]).score(("abc", ""))
    assert list(found) == [0.3, 0.0]
    assert list(scorer(lambda texts: []).score([])) == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([0.5], "returned 1 scores for 2 texts"),
        ([0.5, math.nan], "returned nan for the text 'second'; return a number from 0 to 1"),
        ([-0.1, 0.5], r"returned -0\.1 for the text 'first'"),
        ([0.5, 100], r"returned 100\.0 for the text 'second'"),
        ([0.5, "much"], "returned list with could not convert string"),
        (None, "returned NoneType with"),
    ],
)
def test_what_it_must_not_return(answer: object, message: str) -> None:
    with pytest.raises(UserError, match=rf"eval\.toxicity\.scorer=mine\.py:score {message}"):
        scorer(lambda texts: answer).score(["first", "second"])


def test_an_error_in_it_names_its_line() -> None:
    def fails(texts: list[str]) -> list[float]:
        raise KeyError("lost")

    with pytest.raises(UserError, match=r"failed on 1 texts at .*test_function\.py:\d+: KeyError"):
        scorer(fails).score(["x"])
