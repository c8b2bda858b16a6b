"""How a process ends that has been in a process group."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A thread that does not end stands for the group's own, which abort a process now and then.
SCRIPT = """
import atexit, threading, time
from pathlib import Path
from torch.distributed import FileStore
from rlhf_exp.distributed.exit import exit_after
from rlhf_exp.distributed.group import process_group
from rlhf_exp.distributed.place import Place

atexit.register(lambda: print("records closed"))

def main():
    store = FileStore({store!r}, 1)
    with process_group(store, 1, Place(0, 1, 0, 1, "127.0.0.1", 0, "the test")):
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
