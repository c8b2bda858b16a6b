"""Votes are stored once, durably, and never overwritten unseen."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_exp.errors import UserError
from rlhf_exp.human.database import reading
from rlhf_exp.human.study import Conflict, Study
from rlhf_exp.human.votes import Choice, Vote, choice_of
from tests.human.lab import study

ROOT = Path(__file__).parents[2]


def vote(found: Study, item: int, choice: str = "A", annotator: str = "anna") -> Vote:
    """Return a first answer; model a's answer is shown as A."""
    return Vote(found.items[item].id, annotator, "overall", 0, Choice(choice), 1.5, "now", 0)


@pytest.mark.parametrize(
    ("side", "choice", "winner", "sign"),
    [
        (0, "A", "a", -1),
        (0, "B", "b", 1),
        (1, "A", "b", 1),
        (1, "B", "a", -1),
        (0, "Tie", "tie", 0),
        (1, "Tie", "tie", 0),
    ],
)
def test_sides_are_resolved(side: int, choice: str, winner: str, sign: int) -> None:
    found = Vote("i", "anna", "overall", side, Choice(choice), None, "")
    assert (found.winner, found.sign) == (winner, sign)
    assert choice_of(winner, side) is found.choice


def test_an_answer_can_be_changed_and_its_repetition_changes_nothing(tmp_path: Path) -> None:
    found = study(tmp_path)
    first = found.record(vote(found, 0))
    assert first.revision == 1
    # The same request again, because its answer was lost on the way.
    assert found.record(vote(found, 0)) == first
    changed = found.record(replace(vote(found, 0, "B"), revision=1))
    assert changed.revision == 2
    assert Study(found.path).votes() == [changed]


def test_a_stale_page_does_not_overwrite(tmp_path: Path) -> None:
    found = study(tmp_path)
    found.record(vote(found, 0, "A"))
    found.record(replace(vote(found, 0, "B"), revision=1))
    with pytest.raises(Conflict) as conflict:
        found.record(replace(vote(found, 0, "Tie"), revision=1))
    assert conflict.value.stored.choice is Choice.B
    with pytest.raises(Conflict):
        found.record(vote(found, 0, "A"))  # a request of the first page that arrives late
    assert [one.choice for one in found.votes()] == [Choice.B]


def test_many_threads_lose_and_double_nothing(tmp_path: Path) -> None:
    found = study(tmp_path, count=40)

    def work(name: str) -> None:
        for number in range(40):
            found.record(vote(found, number, "AB"[number % 2], name))

    # Two threads for each annotator: everything is sent twice.
    threads = [threading.Thread(target=work, args=(name,)) for name in ("anna", "ben") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    votes = found.votes()
    assert len(votes) == 80
    assert {one.revision for one in votes} == {1}


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    found = study(tmp_path, count=200)
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from rlhf_exp.human.study import Study
        from rlhf_exp.human.votes import Choice, Vote
        found = Study(Path(sys.argv[1]))
        for number, item in enumerate(found.items):
            found.record(Vote(item.id, "anna", "overall", 0, Choice.A, None, "", 0))
            print(number, flush=True)
        """
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(found.path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == "20":
            os.kill(child.pid, signal.SIGKILL)
            break
    told = 21 + len(child.stdout.read().splitlines())
    child.wait()
    stored = {one.item for one in Study(found.path).votes()}
    assert {found.items[number].id for number in range(told)} <= stored
    assert len(stored) <= told + 1  # the one under way may be stored without having been told


def test_commits_are_flushed_to_a_write_ahead_log(tmp_path: Path) -> None:
    found = study(tmp_path)
    with reading(found.path) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL: at every commit


def test_the_file_is_the_owners_alone(tmp_path: Path) -> None:
    found = study(tmp_path)
    assert stat.S_IMODE(found.path.stat().st_mode) == 0o600
    tokens = {one.token for one in found.annotators()} | {found.about.owner}
    assert len(tokens) == 3
    assert all(len(token) >= 32 for token in tokens)
    found.invite(["anna", "carla"])
    assert tokens < {one.token for one in found.annotators()} | {found.about.owner}


def test_a_study_is_not_made_twice_and_not_empty(tmp_path: Path) -> None:
    found = study(tmp_path)
    found.record(vote(found, 0))
    with pytest.raises(UserError, match="there is a study already"):
        study(tmp_path)
    assert len(found.votes()) == 1
    with pytest.raises(UserError, match="no two different answers"):
        Study.create(tmp_path / "other.sqlite", found.about, [])
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {"study.sqlite"}


def test_what_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such study"):
        Study(tmp_path / "none.sqlite")
    (tmp_path / "text.sqlite").write_text("not a database, but long enough to be read as one" * 9)
    with pytest.raises(UserError, match="not a readable study"):
        Study(tmp_path / "text.sqlite")
    sqlite3.connect(tmp_path / "empty.sqlite").execute("CREATE TABLE t (x)")
    with pytest.raises(UserError, match="not a readable study"):
        Study(tmp_path / "empty.sqlite")


def test_votes_from_elsewhere_are_added_all_or_none(tmp_path: Path) -> None:
    found = study(tmp_path)
    found.record(vote(found, 0, "A"))
    fresh = [replace(vote(found, n, "B", "carla"), revision=1) for n in (0, 1)]
    assert found.add([*fresh, vote(found, 0, "A")]) == 2
    assert found.add(fresh) == 0
    assert "carla" in [one.name for one in found.annotators()]
    clash = [replace(vote(found, 2, "B", "carla"), revision=1), vote(found, 0, "B")]
    with pytest.raises(UserError, match=r"anna's vote on item .* is a, and b in the import"):
        found.add(clash)
    assert len(found.votes()) == 3
