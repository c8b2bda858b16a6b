"""Functions of the user's own, as they should not be."""

from __future__ import annotations

import itertools
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_exp.errors import UserError
from rlhf_exp.user_function import UserFunction, UserReader, load_function

PROMPTS, ANSWERS = ["p", "q"], ["yes", "no"]


def call(function: Callable[..., Any]) -> list[float]:
    return UserFunction(function, "key=mine.py:f", "answer")(PROMPTS, ANSWERS)


@pytest.mark.parametrize(
    "scores",
    [
        [1, 2.0],
        (True, 2),
        np.array([1.0, 2.0], dtype=np.float32),
        torch.tensor([[1.0], [2.0]]),
        (n + 1 for n in range(2)),
    ],
)
def test_numbers_of_any_kind(scores: object) -> None:
    assert call(lambda prompts, answers: scores) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        (None, "returned NoneType; return a list of numbers, one for each answer"),
        (0.5, "returned float; return a list of numbers"),
        ("12", "returned str; return a list"),
        ({0: 1.0, 1: 2.0}, "returned dict; return a list"),
        ({1.0, 2.0}, "returned set; return a list"),
        ([1.0], "returned 1 scores for 2 answers; return one number for each"),
        ([1.0] * 5, "returned 5 scores for 2 answers"),
        (itertools.count(), "returned more than 2 scores for 2 answers"),
        ([1.0, "2"], "returned '2' (str) for the answer 'no'; return a finite number"),
        ([1.0, None], "returned None (NoneType) for the answer 'no'"),
        ([1.0, 2j], "returned 2j (complex) for the answer 'no'"),
        ([10**400, 1.0], "returned inf for the answer 'yes'"),
        ([-(10**5000), 1.0], "returned inf for the answer 'yes'"),
        ([1.0, math.nan], "returned nan for the answer 'no'"),
        # A 32-bit float, in which rewards are computed, would make infinity of it.
        ([1e39, 1.0], "returned 1e+39 for the answer 'yes'"),
        ([1.0, "x" * 10_000], "returned 'xxx"),
        (torch.ones(2, 2), "returned tensor([1., 1.]) (Tensor) for the answer 'yes'"),
    ],
)
def test_what_is_no_number_for_each_row(scores: object, says: str) -> None:
    with pytest.raises(UserError) as caught:
        call(lambda prompts, answers: scores)
    assert says in str(caught.value)
    assert str(caught.value).startswith("key=mine.py:f ")
    assert len(str(caught.value)) < 300


def raises(error: BaseException) -> Callable[..., Any]:
    def function(*_: object) -> None:
        raise error

    return function


def late(*_: object) -> Any:
    yield 1.0
    raise ZeroDivisionError("late")


class Numberless(float):
    def __float__(self) -> float:
        raise SystemExit(0)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (raises(SystemExit(0)), "it tried to end the program (SystemExit: 0)"),
        (raises(SystemExit()), "it tried to end the program"),
        (lambda *_: os._exit(0), "it tried to end the program (os._exit); raise an exception"),
        (raises(KeyboardInterrupt()), ": KeyboardInterrupt"),
        (raises(GeneratorExit()), ": GeneratorExit"),
        (raises(BaseException("odd")), ": BaseException: odd"),
        (raises(MemoryError()), ": MemoryError"),
        (raises(StopIteration()), ": StopIteration"),
        (late, ": ZeroDivisionError: late"),
        (lambda *_: [Numberless(), 1.0], "it tried to end the program"),
    ],
)
def test_a_function_that_raises_or_exits_is_named_with_the_line(
    function: Callable[..., Any], says: str
) -> None:
    with pytest.raises(UserError) as caught:
        call(function)
    assert "key=mine.py:f failed on 2 answers at " in str(caught.value)
    assert "test_user_function.py:" in str(caught.value)
    assert says in str(caught.value)
    assert os._exit.__module__ == "posix", "put back"


def test_a_function_that_empties_its_lists_changes_nobody_elses() -> None:
    def function(prompts: list[str], answers: list[str]) -> list[float]:
        prompts.clear()
        answers.append("more")
        return [3.0, 4.0]

    assert call(function) == [3.0, 4.0]
    assert (PROMPTS, ANSWERS) == (["p", "q"], ["yes", "no"])


@pytest.mark.parametrize("swallows", [False, True])
def test_ctrl_c_is_the_users_and_not_the_functions(swallows: bool) -> None:
    def function(prompts: list[str], answers: list[str]) -> list[float]:
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException:
            if not swallows:
                raise
        return [1.0, 2.0]

    with pytest.raises(KeyboardInterrupt):
        call(function)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_child_of_the_functions_may_exit() -> None:
    def function(prompts: list[str], answers: list[str]) -> list[float]:
        child = os.fork()
        if not child:
            os._exit(7)
        return [1.0, float(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))]

    assert call(function) == [1.0, 7.0]


def test_in_another_thread() -> None:
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.extend(call(lambda p, a: [1, 2])))
    thread.start()
    thread.join()
    assert found == [1.0, 2.0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import sys\nsys.exit(0)", "it tried to end the program (SystemExit: 0)"),
        ("import os\nos._exit(0)", "it tried to end the program (os._exit)"),
        ("1 / 0", "mine.py:1: ZeroDivisionError"),
        ("f = 7", "has no function 'f'"),
        ("def f(:", "SyntaxError"),
    ],
)
def test_a_file_that_cannot_be_run(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(UserError, match=f"key={file}:f") as caught:
        load_function(f"{file}:f", "key")
    assert says in str(caught.value)


def reader(function: Callable[[Path], Any]) -> UserReader:
    return UserReader(function, "data.reader=mine.py:read")


def test_a_reader_returns_or_yields_records() -> None:
    """Of one that never ends, no more are asked for than the limit."""
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    assert reader(lambda path: rows)(Path("x.xml"), None) == [
        ("x.xml:1", rows[0]),
        ("x.xml:2", rows[1]),
    ]
    assert [record for _, record in reader(lambda path: itertools.count())(Path("x"), 2)] == [0, 1]


def test_a_reader_that_fails_is_named() -> None:
    def late(path: Path) -> Iterator[dict[str, str]]:
        yield {"prompt": "a"}
        raise KeyError("answer")

    with pytest.raises(UserError, match=r"data\.reader=mine\.py:read failed on x\.xml.*'answer'"):
        reader(late)(Path("x.xml"), None)
    with pytest.raises(UserError, match=r"returned dict for x\.xml; return or yield a dict for"):
        reader(lambda path: {"prompt": "a"})(Path("x.xml"), None)
    with pytest.raises(UserError, match="returned NoneType for"):
        reader(lambda path: None)(Path("x.xml"), None)
