"""A leader over both transports, with real processes that answer, fail, die, stop and exit."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf_exp.errors import UserError
from rlhf_exp.processes.failures import WorkerFailed
from rlhf_exp.processes.leader import Leader, StartedWorkers
from tests.processes import targets

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
                *(sys.executable, "-m", "tests.processes.joined_process"),
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


SECONDS = 15.0
"""In which everything must be over that has to be over within seconds, on a busy machine."""


def children() -> set[int]:
    """Return the processes below this one, but multiprocessing's own."""
    found = psutil.Process().children(recursive=True)
    return {one.pid for one in found if "resource_tracker" not in " ".join(one.cmdline())}


def leader_of_two(setup: str = "", threads: int = 1) -> Leader:
    return Leader(StartedWorkers(2, threads, targets.serve, setup))


@contextmanager
def two_workers(setup: str = "", threads: int = 1) -> Iterator[Leader]:
    """The leader of two workers; all processes are gone afterwards."""
    before = children()
    workers = leader_of_two(setup, threads)
    try:
        yield workers
        workers.end(None)
    except BaseException as error:
        workers.end(error)
        raise
    assert children() == before


def gone(pids: list[int]) -> bool:
    """Whether processes end in time."""
    deadline = time.monotonic() + SECONDS
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(psutil.pid_exists, pids))


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether something becomes true in time."""
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_stages_one_after_another_in_the_same_workers() -> None:
    with two_workers("hello", threads=2) as workers:
        first = workers.run({"do": "add"})
        second = workers.run({"do": "add"})
    assert first["total"] == 3.0, "1 of rank 0 and 2 of rank 1"
    assert first["setup"] == "hello"
    assert (first["RANK"], first["WORLD_SIZE"], first["LOCAL_RANK"]) == ("0", "2", "0")
    assert first["MASTER_ADDR"] == "127.0.0.1"
    assert first["port"]
    assert (first["OMP_NUM_THREADS"], first["threads"]) == ("2", 2)
    assert first["pid"] != os.getpid()
    assert second == first, "the same process, in a new group"
    assert "RANK" not in os.environ


@pytest.mark.parametrize(
    ("stage", "kind", "message"),
    [
        ("bug", WorkerFailed, r"(?s)^rank 1 failed:.*targets\.py.*ZeroDivisionError: by the test"),
        ("mistake", UserError, r"^data\.jsonl:17: not JSON$"),
        ("killed", WorkerFailed, r"rank 1 was killed by SIGKILL.*memory.*same command"),
    ],
)
def test_a_failure_in_one_worker_ends_all(stage: str, kind: type[Exception], message: str) -> None:
    before, workers = children(), leader_of_two()
    workers.run({"do": "add"})
    began = time.monotonic()
    with pytest.raises(kind, match=message) as caught:
        workers.run({"do": stage})
    workers.end(caught.value)
    assert time.monotonic() - began < SECONDS
    assert children() == before


def test_ctrl_c_asks_the_workers_to_save(tmp_path: Path) -> None:
    training = tmp_path / "training"

    def interrupted() -> bool:
        return training.exists() and workers.saving

    with pytest.raises(KeyboardInterrupt), two_workers(str(training)) as workers:
        workers.run({"do": "train"}, interrupted=interrupted)


def start_leader(folder: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """Start a process that leads two workers in a stage that never ends."""
    program = (
        "from tests.processes import targets\n"
        "from rlhf_exp.processes.leader import Leader, StartedWorkers\n"
        f"workers = Leader(StartedWorkers(2, 1, targets.serve, {str(folder / 'begun')!r}))\n"
        f"order = {{'do': 'hang', 'pids': {{'pid{{rank}}': {str(folder)!r}}}}}\n"
        "try:\n    workers.run(order)\nfinally:\n    workers.end(SystemExit(143))\n"
    )
    leader = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, text=True)
    files = [folder / "pid0", folder / "pid1"]
    assert eventually(lambda: all(file.exists() and file.read_text() for file in files))
    return leader, [int(file.read_text()) for file in files]


def test_workers_do_not_outlive_a_leader_that_is_killed(tmp_path: Path) -> None:
    leader, pids = start_leader(tmp_path)
    assert all(map(psutil.pid_exists, pids))
    leader.kill()
    leader.wait()
    assert gone(pids)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_all_at_once(tmp_path: Path) -> None:
    leader, pids = start_leader(tmp_path)
    leader.send_signal(signal.SIGINT)
    assert leader.wait(SECONDS) != 0
    assert gone(pids)
