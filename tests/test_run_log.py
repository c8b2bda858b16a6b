"""The log that a run started by hand leaves."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path

import pytest

from rlhf_exp.run_log import Tee, append, recording
from rlhf_exp.store.run_records import Records

EVALUATION = ("eval preference, SFT 8/8", "eval preference, PPO 8/8")
STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ")


def lines_of(path: Path) -> list[str]:
    """Return the lines of a log, each without its time."""
    lines = path.read_text().splitlines()
    assert all(STAMP.match(line) for line in lines)
    return [STAMP.sub("", line) for line in lines]


def test_what_the_console_shows_is_logged_as_plain_text(tmp_path: Path) -> None:
    stream, log = io.StringIO(), tmp_path / "run.log"
    tee = Tee(stream, log)
    tee.write("\x1b[1mfirst\x1b[0m li")
    assert not log.exists()  # a line is logged when it ends
    tee.write("ne\n\nsecond\n")
    assert stream.getvalue() == "\x1b[1mfirst\x1b[0m line\n\nsecond\n"
    assert lines_of(log) == ["first line", "", "second"]
    assert not tee.isatty()


def test_no_secret_is_logged_and_no_error_ends_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    append(tmp_path / "run.log", "key 0123456789abcdef")
    assert lines_of(tmp_path / "run.log") == ["key ***"]
    append(tmp_path / "none" / "run.log", "text")
    assert not (tmp_path / "none").exists()


def test_warnings_are_logged_once_and_still_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as without pytest
    monkeypatch.setattr(logging.lastResort, "_stream", None, raising=False)
    library = logging.getLogger("some.library")
    shown = io.StringIO()
    library.addHandler(logging.StreamHandler(shown))
    log = tmp_path / "run.log"
    try:
        with recording(log), recording(log):
            logging.getLogger("rlhf_exp.one").warning("mind %s", "this")
            logging.getLogger("rlhf_exp.one").info("resumed")
            logging.getLogger("other").info("chatter")
            library.warning("theirs")
    finally:
        library.handlers.clear()
    logging.getLogger("rlhf_exp.one").info("after")
    assert lines_of(log) == ["warning: mind this", "info: resumed", "warning: theirs"]
    # Python's last resort shows what no handler does; the library's own showed its warning.
    assert capsys.readouterr().err == "mind this\n"
    assert shown.getvalue() == "theirs\n"


def test_a_single_run_leaves_a_log(small_run: Path) -> None:
    (record,) = Records(small_run / "sweeps").sweep("small")
    lines = lines_of(small_run / "sweeps" / "small" / "logs" / f"{record.key}.log")
    assert lines[0].startswith("$ python launch.py output_dir=")
    for stage, key in record.keys.items():
        assert f"{stage} {key}: running" in lines
    ends = [line.split("  ")[0] for line in lines if "  in " in line]
    # Of the evaluation, the answers of each model.
    assert ends == ["sft 6/6", "reward 6/6", "ppo 6/6", *EVALUATION]
    assert any(
        line.startswith(("The reward that PPO was trained on", "Report: ")) for line in lines
    )
    assert lines[-1].startswith("tokenizer = AutoTokenizer")
