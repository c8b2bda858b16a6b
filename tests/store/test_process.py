from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace

from rlhf_exp.store.process import Process

PROGRAM = (
    "import json, dataclasses; from rlhf_exp.store.process import Process\n"
    "print(json.dumps(dataclasses.asdict(Process.current())), flush=True); input()"
)


def test_a_process_is_gone_when_it_is_killed() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    found = Process(**json.loads(child.stdout.readline()))
    assert found.pid == child.pid
    assert not found.gone
    child.kill()
    deadline = time.monotonic() + 30
    while not found.gone and time.monotonic() < deadline:
        time.sleep(0.01)
    assert found.gone, "even before its parent has asked for its exit code"
    child.communicate()
    assert found.gone


def test_another_process_with_the_same_number_is_another_one() -> None:
    own = Process.current()
    assert not own.gone
    assert replace(own, started="1").gone


def test_of_other_machines_nothing_is_known() -> None:
    own = Process.current()
    assert not replace(own, host="elsewhere", started="1").gone
    assert not replace(own, namespace="other", started="1").gone
