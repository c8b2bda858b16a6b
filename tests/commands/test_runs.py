"""Which run a name means that several share."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_exp.commands.runs import OutputFolder
from rlhf_exp.errors import UserError
from rlhf_exp.store.run_records import RunRecord, Status


def record(day: int, keys: dict[str, str], status: Status = Status.done) -> RunRecord:
    created = f"2026-03-0{day}T10:00:00+00:00"
    overrides = (f"ppo.lr={day}",)
    return RunRecord("demo", "pipeline", keys, overrides, created=created, status=status)


@pytest.fixture
def folder(tmp_path: Path) -> OutputFolder:
    made = OutputFolder(tmp_path)
    made.records.write(record(1, {"sft": "aa", "reward": "ab", "ppo": "ac"}))
    made.records.write(record(2, {"sft": "aa", "ppo": "ba"}))
    made.records.write(record(3, {"sft": "aa", "reward": "ab", "ppo": "ca"}, Status.failed))
    return made


def test_a_name_means_its_newest_run_that_is_done_and_says_so(
    folder: OutputFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert folder.run("demo").key == "ba"
    assert folder.run("demo").key == "ba"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "demo: 3 runs have this name" in said[0]
    assert "newest that is done, demo/ba (ppo.lr=2)" in said[0]


def test_only_runs_count_that_have_what_is_asked_for(folder: OutputFolder) -> None:
    assert folder.run("demo", ("reward",)).key == "ac"
    assert folder.run("demo", ("ppo", "sft")).key == "ba"


def test_one_run_is_named_by_its_key_without_a_word(
    folder: OutputFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert folder.run("demo/ca").key == "ca"
    assert capsys.readouterr().err == ""


def test_several_runs_of_which_none_is_usable_are_listed(folder: OutputFolder) -> None:
    with pytest.raises(UserError, match="'demo' fits 3 runs"):
        folder.run("demo", ("eval",))


def test_the_beginning_of_several_keys_stays_ambiguous(folder: OutputFolder) -> None:
    folder.records.write(record(4, {"ppo": "bb"}))
    with pytest.raises(UserError, match="'demo/b' fits 2 runs"):
        folder.run("demo/b")
