"""A tracker is closed with the code that the end of the work deserves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from rlhf_exp.tracking.create import open_tracker
from rlhf_exp.tracking.tracker import CompositeTracker, NullTracker, finishing


class Recorder(NullTracker):
    """Remembers how it was ended."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def mark_preempting(self) -> None:
        self.calls.append("preempting")

    def finish(self, exit_code: int = 0) -> None:
        self.calls.append(exit_code)


@pytest.fixture(autouse=True)
def default_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def ended(error: BaseException | None) -> list[object]:
    tracker = Recorder()

    def work() -> None:
        with finishing(tracker):
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(type(error)):
            work()
    return tracker.calls


@pytest.mark.parametrize(
    ("error", "calls"),
    [
        (None, [0]),
        (RuntimeError("boom"), [1]),
        (KeyboardInterrupt(), ["preempting", 130]),
        (SystemExit(143), ["preempting", 143]),
        (SystemExit(130), ["preempting", 130]),
        (SystemExit(3), [3]),
        (SystemExit(None), [0]),
        (SystemExit("a message"), [1]),
    ],
)
def test_every_end_has_its_code(error: BaseException | None, calls: list[object]) -> None:
    assert ended(error) == calls


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_unwinds_the_work_and_the_handler_is_put_back(number: int, code: int) -> None:
    tracker = Recorder()
    unwound = []

    def work() -> None:
        with finishing(tracker):
            try:
                os.kill(os.getpid(), number)
            finally:
                unwound.append(True)

    with pytest.raises(SystemExit) as end:
        work()
    assert end.value.code == code
    assert unwound == [True]
    assert tracker.calls == ["preempting", code]
    assert signal.getsignal(number) is signal.SIG_DFL


def test_a_closed_terminal_does_not_end_what_nohup_protects() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        tracker = Recorder()
        with finishing(tracker):
            os.kill(os.getpid(), signal.SIGHUP)
        assert tracker.calls == [0]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_what_a_closed_terminal_can_no_longer_take_is_no_error() -> None:
    """The work is unwound although its terminal has gone: writing to it fails."""
    program = """
import os, signal, sys, time
from rlhf_exp.signals import exiting_on_signals
with exiting_on_signals():
    try:
        os.write(int(sys.argv[1]), b"1")
        time.sleep(60)
    finally:
        print("unwinding", flush=True)
        print("unwinding", file=sys.stderr, flush=True)
        os.write(int(sys.argv[1]), b"2")
"""
    terminal, inner = os.openpty()
    read, write = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(write)],
        stdin=inner,
        stdout=inner,
        stderr=inner,
        pass_fds=[write],
        preexec_fn=os.setsid,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    os.close(inner)
    os.close(write)
    assert os.read(read, 1) == b"1"
    os.close(terminal)
    child.send_signal(signal.SIGHUP)
    assert child.wait(30) == 129
    assert os.read(read, 9) == b"2"


def test_a_second_sigterm_does_not_cut_off_the_closing() -> None:
    class Slow(Recorder):
        def finish(self, exit_code: int = 0) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            super().finish(exit_code)

    tracker = Slow()
    with finishing(tracker):
        pass
    assert tracker.calls == [0]


def test_somebody_elses_handler_stays() -> None:
    def handler(number: int, frame: FrameType | None) -> None: ...

    signal.signal(signal.SIGTERM, handler)
    with finishing(Recorder()):
        assert signal.getsignal(signal.SIGTERM) is handler
    assert signal.getsignal(signal.SIGTERM) is handler


def test_several_trackers_hear_the_same(tmp_path: Path) -> None:
    recorders = Recorder(), Recorder()
    several = CompositeTracker(*recorders)
    several.mark_preempting()
    several.finish(5)
    assert [recorder.calls for recorder in recorders] == [["preempting", 5]] * 2


def test_a_run_keeps_its_id_over_starts_without_a_checkpoint(tmp_path: Path) -> None:
    first = open_tracker("disabled", tmp_path)
    again = open_tracker("disabled", tmp_path)
    assert len(first.run_id) == 8
    assert again.run_id == first.run_id
    assert open_tracker("disabled", tmp_path, run_id="checkpoint").run_id == "checkpoint"
    assert open_tracker("disabled", tmp_path).run_id == "checkpoint"
    assert open_tracker("disabled", tmp_path / "other").run_id != first.run_id
