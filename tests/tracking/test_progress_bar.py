"""The progress of a stage, with a terminal and without."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from rlhf_exp.tracking.progress_bar import PROGRESS_FILE, Progress, StageProgress


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
        "ppo 10/100  1:30 left  reward 1.25",
        "ppo 20/100  1:20 left  reward 2.5",
        "ppo 25/100  1:15 left  reward 3.125",
    ]


def test_the_last_line_is_not_said_twice_and_a_missing_number_keeps_its_value() -> None:
    stream, clock = io.StringIO(), Clock()
    with StageProgress("sft", 4, WATCH, stream=stream, clock=clock) as progress:
        progress.update(1, {"kl/sequence": 0.5})
        clock.now = 3700.0
        progress.update(4, {"reward/mean": 1.0})
    assert stream.getvalue() == "sft 4/4  in 1:01:40  reward 1  KL 0.5\n"


def test_the_time_left_after_a_resume_counts_only_the_steps_since() -> None:
    stream, clock = io.StringIO(), Clock()
    with StageProgress("ppo", 100, WATCH, stream=stream, clock=clock) as progress:
        clock.now = 50.0  # loading
        progress.begin(90)
        clock.now = 60.0
        progress.update(95, {})  # 5 steps in 10 s: 5 left take 10 s
    assert stream.getvalue() == "ppo 95/100  0:10 left\n"


def test_before_the_first_step_there_is_no_estimate() -> None:
    stream, clock = io.StringIO(), Clock()
    with StageProgress("ppo", 100, WATCH, stream=stream, clock=clock) as progress:
        clock.now = 70.0
        assert progress.text() == "ppo 0/100  1:10 so far"


@pytest.mark.parametrize(
    ("stage", "steps", "numbers"),
    [
        ("ppo", 480, {"reward/mean": 0.25, "kl/sequence": 3.5, "throughput/samples_per_s": 12.25}),
        ("sft", 9000, {"loss/total": 2.345, "eval/loss": 2.5, "throughput/tokens_per_s": 1234.5}),
        ("reward", 9000, {"loss/total": 0.5, "reward/accuracy": 0.7, "eval/accuracy": 0.6789}),
        ("dpo", 900, {"loss/total": 0.5, "dpo/accuracy": 0.7, "eval/kl_sequence": 12.34}),
    ],
)
def test_eighty_columns_hold_step_time_left_and_three_numbers(
    stage: str, steps: int, numbers: dict[str, float]
) -> None:
    clock = Clock()
    progress = StageProgress(stage, steps, tuple(numbers), stream=io.StringIO(), clock=clock)
    clock.now = 3600.0
    progress.update(steps // 2, numbers)
    line = progress.text(80)
    assert len(line) <= 80
    assert f"{steps // 2}/{steps}  1:00:00 left" in line
    for value in numbers.values():
        assert f"{value:.4g}" in line
    assert ("━" in line) == (len(line) > len(progress.text()))
    assert line.replace("━", "").replace("╌", "").split() == progress.text().split()


def test_other_processes_read_how_far_it_is(tmp_path: Path) -> None:
    clock = Clock()
    given = {"stream": io.StringIO(), "clock": clock, "folder": tmp_path}
    assert Progress.read(tmp_path) is None
    with StageProgress("ppo", 100, WATCH, **given) as progress:  # type: ignore[arg-type]
        assert Progress.read(tmp_path).step == 0  # type: ignore[union-attr]
        for step in range(1, 6):
            clock.now += 1.5
            progress.update(step, {"reward/mean": step / 8})
        # Written at most every 2 s: at 3 s (2 steps) and at 6 s (4 steps, 96 left of 1.5 s each).
        told = Progress.read(tmp_path)
        assert told is not None
        assert (told.label, told.step, told.steps, told.seconds_left) == ("ppo", 4, 100, 144.0)
        assert told.numbers == {"reward/mean": 0.5}
    assert Progress.read(tmp_path).step == 5  # type: ignore[union-attr]
    (tmp_path / PROGRESS_FILE).write_text("{")
    assert Progress.read(tmp_path) is None


def test_the_runs_log_gets_the_same_lines(tmp_path: Path) -> None:
    stream, clock, log = Terminal(), Clock(), tmp_path / "run.log"
    with StageProgress("ppo", 4, WATCH, stream=stream, clock=clock, log=str(log)) as progress:
        clock.now = 11.0
        progress.update(1, {"reward/mean": 1.0})
        progress.update(4, {})
    lines = [line.split("  ", 1)[1] for line in log.read_text().splitlines()]
    assert lines == ["ppo 1/4  0:33 left  reward 1", "ppo 4/4  in 0:11  reward 1"]


def test_the_end_is_said_when_the_stage_fails() -> None:
    stream = io.StringIO()

    def failing_stage() -> None:
        with StageProgress("ppo", 9, WATCH, stream=stream) as progress:
            progress.update(3, {"reward/mean": 2.0})
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        failing_stage()
    assert stream.getvalue().startswith("ppo 3/9  0:00 left  reward 2")


def test_nothing_is_said_by_the_other_processes() -> None:
    for stream in (io.StringIO(), Terminal()):
        with StageProgress("ppo", 9, WATCH, shown=False, stream=stream) as progress:
            progress.update(9, {"reward/mean": 2.0})
        assert stream.getvalue() == ""


def test_a_terminal_gets_a_live_line_with_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    numbers = {"reward/mean": 0.25, "kl/sequence": 3.5, "throughput/samples_per_s": 40.0}
    with StageProgress("ppo", 9, WATCH, stream=stream) as progress:
        progress.update(5, numbers)
    last = [line for line in stream.getvalue().splitlines() if "ppo" in line][-1]
    assert "━" in last
    assert "5/9  0:00 left  reward 0.25  KL 3.5  40 samples/s" in last


def test_standard_error_is_where_it_goes(capsys: pytest.CaptureFixture[str]) -> None:
    with StageProgress("sft", 2, WATCH) as progress:
        progress.update(2, {})
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "sft 2/2  in 0:00\n"
