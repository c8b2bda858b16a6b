from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def run(body: str) -> list[str]:
    """Run lines in a process of its own, as a job does; return what they print."""
    program = f"""
import os, signal, subprocess, sys, threading, time
from rlhf_exp.launchers.slurm.job import NOTICE_SIGNAL, block_notices, handle_notices
block_notices()
def notify(): os.kill(os.getpid(), NOTICE_SIGNAL)
def leave(): print("left", flush=True); os._exit(7)
{body}
"""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    return [*ended.stdout.split(), f"exit={ended.returncode}"]


def test_no_thread_is_started_before_notices_are_blocked() -> None:
    assert run('print(len(os.listdir("/proc/self/task")))') == ["1", "exit=0"]


def test_a_notice_is_ctrl_c() -> None:
    body = """
with handle_notices(30, leave) as notice:
    try:
        notify(); time.sleep(30)
    except KeyboardInterrupt:
        print("interrupted", notice.is_set())
print("over", threading.active_count())
"""
    assert run(body) == ["interrupted", "True", "over", "1", "exit=0"]


def test_a_notice_that_comes_early_is_not_lost() -> None:
    body = """
notify(); print("alive")
try:
    with handle_notices(30, leave): time.sleep(30)
except KeyboardInterrupt:
    print("interrupted")
"""
    assert run(body) == ["alive", "interrupted", "exit=0"]


def test_who_does_not_leave_is_made_to() -> None:
    body = """
signal_lost = []
with handle_notices(0.5, leave):
    while True:
        try:
            notify() if not signal_lost else None
            time.sleep(30)
        except KeyboardInterrupt:
            signal_lost.append(1)
"""
    assert run(body) == ["left", "exit=7"]


def test_children_do_not_notice() -> None:
    body = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(2); print('child')"])
with handle_notices(30, leave) as notice:
    forked = os.fork()
    if not forked:
        time.sleep(2); print("fork", notice.is_set(), flush=True); os._exit(0)
    for pid in (child.pid, forked): os.kill(pid, NOTICE_SIGNAL)
    child.wait(); os.waitpid(forked, 0)
    print("unnoticed", not notice.is_set())
"""
    printed = run(body)
    assert sorted(printed[:-1]) == sorted(["child", "fork", "False", "unnoticed", "True"])
    assert printed[-1] == "exit=0"


def test_without_a_notice_nothing_happens() -> None:
    body = """
with handle_notices(0.1, leave): time.sleep(0.3)
print("over", threading.active_count())
time.sleep(0.3)
"""
    assert run(body) == ["over", "1", "exit=0"]
