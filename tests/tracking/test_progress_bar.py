"""The progress of a stage, with a terminal and without."""

from __future__ import annotations

import io

import pytest

from rlhf_exp.tracking.progress_bar import StageProgress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


WATCH = ("reward/mean", "kl/sequence", "throughput/samples_per_s")


def test_plain_lines_come_at_most_every_ten_seconds_and_at_the_end() -> None:
    stream, clock = io.StringIO(), Clock()
    with StageProgress("ppo", 100, WATCH, stream=stream, clock=clock) as progress:
        for step in range(1, 26):  # one step a second
            clock.now += 1
            progress.update(step, {"reward/mean": step / 8, "loss": 9.0})
    # 10 s for 10 steps: 90 left take 90 s. 20 s: 80. The end: 25 steps in 25 s, 75 left.
    assert stream.getvalue().splitlines() == [
        "ppo 10/100  reward/mean 1.25  0:10  1:30 left",
        "ppo 20/100  reward/mean 2.5  0:20  1:20 left",
        "ppo 25/100  reward/mean 3.125  0:25  1:15 left",
    ]


def test_the_last_line_is_not_said_twice_and_a_missing_number_keeps_its_value() -> None:
    stream, clock = io.StringIO(), Clock()
    with StageProgress("sft", 4, WATCH, stream=stream, clock=clock) as progress:
        progress.update(1, {"kl/sequence": 0.5})
        clock.now = 3700.0
        progress.update(4, {"reward/mean": 1.0})
    assert stream.getvalue() == "sft 4/4  reward/mean 1  kl/sequence 0.5  1:01:40\n"


def test_the_time_left_after_a_resume_counts_only_the_steps_since() -> None:
    stream, clock = io.StringIO(), Clock()
    with StageProgress("ppo", 100, WATCH, start=90, stream=stream, clock=clock) as progress:
        clock.now = 10.0
        progress.update(95, {})  # 5 steps in 10 s: 5 left take 10 s
    assert stream.getvalue() == "ppo 95/100  0:10  0:10 left\n"


def test_the_end_is_said_when_the_stage_fails() -> None:
    stream = io.StringIO()

    def failing_stage() -> None:
        with StageProgress("ppo", 9, WATCH, stream=stream) as progress:
            progress.update(3, {"reward/mean": 2.0})
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        failing_stage()
    assert stream.getvalue().startswith("ppo 3/9  reward/mean 2")


def test_nothing_is_said_by_the_other_processes() -> None:
    for stream in (io.StringIO(), Terminal()):
        with StageProgress("ppo", 9, WATCH, shown=False, stream=stream) as progress:
            progress.update(9, {"reward/mean": 2.0})
        assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_with_the_three_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    numbers = {"reward/mean": 0.25, "kl/sequence": 3.5, "throughput/samples_per_s": 40.0}
    with StageProgress("ppo", 9, WATCH, start=2, stream=stream) as progress:
        progress.update(5, numbers)
    last = [line for line in stream.getvalue().splitlines() if "ppo" in line][-1]
    assert "5/9" in last
    assert "reward/mean 0.25  kl/sequence 3.5  throughput/samples_per_s 40" in last


def test_standard_error_is_where_it_goes(capsys: pytest.CaptureFixture[str]) -> None:
    with StageProgress("sft", 2, WATCH) as progress:
        progress.update(2, {})
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "sft 2/2  0:00\n"
