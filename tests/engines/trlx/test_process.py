"""The worker's process, with programs of our own in its place and this interpreter to run them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_exp.engines.trlx.process import TrlxProcess, environment, worker_folder
from rlhf_exp.errors import UserError

ROOT = Path(__file__).parents[3]
_HEAD = f"""
import os, signal, subprocess, sys, time
sys.path.insert(0, {str(worker_folder())!r})
from trlx_line import Line
line = Line(int(sys.argv[1]))
"""


def program(folder: Path, body: str) -> Path:
    path = folder / "worker.py"
    path.write_text(_HEAD + body)
    return path


def process(folder: Path, body: str) -> TrlxProcess:
    return TrlxProcess(sys.executable, folder / "trlx.log", program(folder, body))


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def ends(pid: int, within: float = 20.0) -> bool:
    end = time.monotonic() + within
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def test_questions_and_answers(tmp_path: Path) -> None:
    body = """
line.send(kind="hello", versions={"trlx": "0.7.0"})
print("as trlx prints", flush=True)
numbers = line.ask(kind="score", ids=[[1, 2], []])["scores"]
line.send(kind="log", sum=sum(numbers), text="\\u20ac", odd=float("nan"))
"""
    with process(tmp_path, body) as worker:
        assert worker.greet() == {"trlx": "0.7.0"}
        assert worker.receive() == {"kind": "score", "ids": [[1, 2], []]}
        worker.send(scores=[0.5, 1.25])
        found = worker.receive()
    assert (found["sum"], found["text"]) == (1.75, "€")
    assert found["odd"] != found["odd"]
    assert (tmp_path / "trlx.log").read_text() == "as trlx prints\n"


def test_an_interpreter_is_found_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path)
    body = program(tmp_path, "line.send(kind='hello', versions={'cwd': os.getcwd()})")
    with TrlxProcess("bin/python", tmp_path / "work" / "trlx.log", body) as worker:
        assert worker.greet() == {"cwd": str(tmp_path / "work")}


def test_an_exception_reaches_the_user_with_its_traceback(tmp_path: Path) -> None:
    body = """
line.send(kind="failed", error="ValueError: no", traceback="Traceback\\n  File x, line 3\\n")
"""
    with process(tmp_path, body) as worker, pytest.raises(UserError) as caught:
        worker.receive()
    text = str(caught.value)
    assert text.startswith("trlx failed: ValueError: no\n")
    assert "File x, line 3" in text
    assert str(tmp_path / "trlx.log") in text


@pytest.mark.parametrize(
    ("body", "how"),
    [
        ("print('out of memory', flush=True); os._exit(3)", "exit code 3"),
        ("os.write(2, b'out of memory'); os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("raise ImportError('out of memory')", "exit code 1"),
    ],
)
def test_a_worker_that_dies_is_told_with_what_it_said(tmp_path: Path, body: str, how: str) -> None:
    with process(tmp_path, body) as worker, pytest.raises(UserError) as caught:
        worker.receive()
    assert f"({how})" in str(caught.value) or f"(killed by {how})" in str(caught.value)
    assert "out of memory" in str(caught.value)
    with process(tmp_path, body) as worker:
        assert ends(worker._process.pid)
        worker.send(scores=[1.0])  # lost, without a sound
        with pytest.raises(UserError, match="has ended before its work was done"):
            worker.receive()


def test_an_interpreter_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"engine\.python=.*nowhere: cannot be started"):
        TrlxProcess(str(tmp_path / "nowhere"), tmp_path / "trlx.log")


HANGS = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
line.send(kind="hello", pids=[os.getpid(), child.pid])
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(600)
"""


def test_leaving_ends_the_worker_and_what_it_has_started(tmp_path: Path) -> None:
    with process(tmp_path, HANGS) as worker:
        pids = worker.receive()["pids"]
        assert all(map(alive, pids))
    assert all(ends(pid, 5.0) for pid in pids)


def test_a_worker_does_not_outlive_who_started_it(tmp_path: Path) -> None:
    body = """
line.send(kind="hello", pid=os.getpid())
time.sleep(600)
"""
    parent = f"""
import os, sys
from pathlib import Path
from rlhf_exp.engines.trlx.process import TrlxProcess
worker = TrlxProcess(sys.executable, Path({str(tmp_path / "trlx.log")!r}),
                     Path({str(program(tmp_path, body))!r}))
print(worker.receive()["pid"], flush=True)
os.kill(os.getpid(), 9)
"""
    command = [sys.executable, "-c", parent]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert ends(int(ended.stdout))


def test_the_worker_is_alone_and_offline(tmp_path: Path) -> None:
    given = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "ACCELERATE_USE_FSDP": "1"}
    given |= {"PYTHONPATH": "/elsewhere", "SLURM_PROCID": "3", "HOME": "/home/x", "HF_HOME": "/h"}
    assert environment(given) == {
        "HOME": "/home/x",
        "HF_HOME": "/h",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "WANDB_MODE": "disabled",
    }
    os.environ["PYTHONHOME"] = "/nowhere"
    try:
        with process(tmp_path, "line.send(kind='hello', versions=dict(os.environ))") as worker:
            assert "PYTHONHOME" not in worker.greet()
    finally:
        del os.environ["PYTHONHOME"]
