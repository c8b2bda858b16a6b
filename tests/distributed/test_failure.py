"""Which of several failures is told, and how it ends this process."""

from __future__ import annotations

import pytest

from rlhf_exp.distributed.failure import (
    FailedElsewhere,
    Failure,
    Kind,
    WorkerFailed,
    cause,
    code_of,
    ended,
)
from rlhf_exp.errors import UserError


def failures(*kinds: str) -> list[Failure]:
    return [Failure(rank, Kind(kind), kind) for rank, kind in enumerate(kinds)]


@pytest.mark.parametrize(
    ("kinds", "rank"),
    [
        (["bug", "bug"], 0),
        (["bug", "gone"], 1),  # a lost connection, because rank 1 was killed
        (["stopped", "gone"], 1),  # a launcher has seen rank 1's end before rank 0 did
        (["user", "gone"], 0),  # rank 1 was killed because rank 0 had ended
        (["interrupted", "bug"], 0),
        (["elsewhere", "elsewhere", "user"], 2),
        (["elsewhere", "bug", "gone"], 2),
        (["elsewhere", "elsewhere"], 0),
    ],
)
def test_the_cause_of_several_failures(kinds: list[str], rank: int) -> None:
    assert cause(failures(*kinds)).rank == rank


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (UserError("a"), UserError, 2),
        (KeyboardInterrupt("a"), KeyboardInterrupt, 130),
        (SystemExit(143), SystemExit, 143),
        (ZeroDivisionError("a"), WorkerFailed, 1),
        (FailedElsewhere("a"), WorkerFailed, 1),
    ],
)
def test_an_error_crosses_processes(
    error: BaseException, kind: type[BaseException], code: int
) -> None:
    told = Failure.from_message({"say": "failed", **Failure.of(3, error).message()})
    with pytest.raises(kind) as caught:
        told.throw()
    assert code_of(caught.value) == code
    assert code_of(None) == 0
    if kind is WorkerFailed:
        assert str(caught.value).startswith("rank 3 failed:")


def test_how_a_process_ended() -> None:
    assert "killed by SIGKILL, perhaps because memory ran out" in ended(-9)
    assert "killed by SIGSEGV. The" in ended(-11)
    assert "exit code 3" in ended(3)
