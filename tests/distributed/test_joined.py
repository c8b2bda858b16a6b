"""Processes that something else has started: one leads, all take part, all end together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ADD = {"do": "add"}


def slow(*values: Any) -> Any:
    """A case that takes as long as the others and tells less."""
    return pytest.param(*values, marks=pytest.mark.slow)


@dataclass
class Ended:
    """How two processes have ended: exit codes, standard errors, seconds."""

    codes: list[int]
    errors: list[str]
    seconds: float


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def two(folder: Path, *experiments: list[dict[str, Any]]) -> Ended:
    """Start two processes as Slurm does, with nobody to look after them; wait for their end."""
    port = str(free_port())
    began = time.monotonic()
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.distributed.joined_process"),
                *(json.dumps(experiments), str(folder)),
            ],
            cwd=ROOT,
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    codes = [process.returncode for process in processes]
    return Ended(codes, errors, time.monotonic() - began)


def test_experiments_one_after_another_in_one_process(tmp_path: Path) -> None:
    ended = two(tmp_path, [ADD, ADD], [ADD])
    assert ended.codes == [0, 0], ended.errors
    # 3 = 1 of rank 0 + 2 of rank 1, in three process groups.
    assert json.loads((tmp_path / "report0").read_text()) == [{"total": 3.0}] * 3
    assert json.loads((tmp_path / "report1").read_text()) == [0.5, 1.5], "the leader's objectives"


@pytest.mark.slow
def test_a_plan_that_fails_ends_all_alike(tmp_path: Path) -> None:
    ended = two(tmp_path, [ADD], [], [ADD])
    assert ended.codes == [2, 2], ended.errors
    assert ended.errors == ["error: no such plan\n", ""]


@pytest.mark.parametrize(
    ("do", "rank", "codes", "message"),
    [
        ("bug", 1, [1, 1], "failed: rank 1 failed:"),
        slow("mistake", 1, [2, 2], "error: data.jsonl:17: not JSON"),
        slow("mistake", 0, [2, 2], "error: data.jsonl:17: not JSON"),
        ("die", 1, [1, -9], "failed: the process of rank 1 was killed"),
        slow("die", 0, [-9, 1], ""),
    ],
)
def test_a_failure_in_one_process_ends_all(
    do: str, rank: int, codes: list[int], message: str, tmp_path: Path
) -> None:
    ended = two(tmp_path, [ADD, {"do": do, "rank": rank}], [ADD])
    assert ended.codes == codes, ended.errors
    assert ended.errors[0].startswith(message), ended.errors
    assert do == "die" or ended.errors[1] == "", "one process speaks"
    if do == "bug":
        assert "ZeroDivisionError: by the test" in ended.errors[0]
        assert "joined_process.py" in ended.errors[0]


@pytest.mark.parametrize(
    ("orders", "codes"),
    [slow([{"do": "die idle"}], [-9, 1]), slow([{"do": "wait", "quits": 1}], [1, -9])],
)
def test_a_death_while_nobody_computes(
    orders: list[dict[str, Any]], codes: list[int], tmp_path: Path
) -> None:
    """As while the leader waits for a lease: nobody is in a collective that would notice."""
    ended = two(tmp_path, orders)
    assert ended.codes == codes, ended.errors
    assert ended.seconds < 50
