"""How a process ends that has been in a process group.

Which of several failures is the root cause, and how it is raised in this process.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from rlhf_exp.errors import UserError
from rlhf_exp.processes.failures import (
    FailedElsewhere,
    FailureKind,
    ProcessFailure,
    WorkerFailed,
    describe_exit,
    exit_code_of,
    root_cause,
)

ROOT = Path(__file__).parents[2]

# A thread that does not end stands for the group's own, which abort a process now and then.
SCRIPT = """
import atexit, threading, time
from pathlib import Path
from torch.distributed import FileStore
from rlhf_exp.processes.failures import exit_after
from rlhf_exp.processes.worker import process_group
from rlhf_exp.processes.environment import LaunchEnvironment

atexit.register(lambda: print("records closed"))

def main():
    store = FileStore({store!r}, 1)
    with process_group(store, 1, LaunchEnvironment(0, 1, 0, 1, "127.0.0.1", 0, "the test")):
        {inside}
    return 0

{thread}
exit_after(main)
"""
STAYS = "threading.Thread(target=time.sleep, args=(60,)).start()"


def end(folder: Path, inside: str, thread: str) -> subprocess.CompletedProcess[str]:
    script = textwrap.dedent(SCRIPT).format(
        store=str(folder / "store"), inside=inside, thread=thread
    )
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=50
    )


@pytest.mark.parametrize(
    ("inside", "code", "said"),
    [
        ("raise SystemExit(143)", 143, ""),
        ("raise SystemExit('no room')", 1, "no room\n"),
        ("raise SystemExit", 0, ""),
        ("pass", 0, ""),
    ],
)
def test_no_thread_of_a_group_changes_the_exit_code(
    tmp_path: Path, inside: str, code: int, said: str
) -> None:
    ended = end(tmp_path, inside, STAYS)
    assert (ended.returncode, ended.stdout) == (code, "records closed\n")
    assert ended.stderr == said


def test_a_bug_is_told_with_its_traceback(tmp_path: Path) -> None:
    ended = end(tmp_path, "1 / 0", STAYS)
    assert (ended.returncode, ended.stdout) == (1, "records closed\n")
    assert "Traceback (most recent call last)" in ended.stderr
    assert "ZeroDivisionError: division by zero" in ended.stderr


def failures(*kinds: str) -> list[ProcessFailure]:
    return [ProcessFailure(rank, FailureKind(kind), kind) for rank, kind in enumerate(kinds)]


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
    assert root_cause(failures(*kinds)).rank == rank


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
    failure = ProcessFailure.from_message(
        {"say": "failed", **ProcessFailure.of(3, error).message()}
    )
    with pytest.raises(kind) as caught:
        failure.reraise()
    assert exit_code_of(caught.value) == code
    assert exit_code_of(None) == 0
    if kind is WorkerFailed:
        assert str(caught.value).startswith("rank 3 failed:")


def test_how_a_process_ended() -> None:
    assert "killed by SIGKILL, perhaps because memory ran out" in describe_exit(-9)
    assert "killed by SIGSEGV. The" in describe_exit(-11)
    assert "exit code 3" in describe_exit(3)
