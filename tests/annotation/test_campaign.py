"""Items, sides and order.

Votes are stored once, durably, and never overwritten unseen.
"""

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
from scipy import stats

from rlhf_exp.annotation.campaign import (
    Campaign,
    Choice,
    Conflict,
    Vote,
    choice_of,
    display_order,
    display_side,
    item_of,
    items_of_rows,
    read_pairs,
    reading,
    sample_items,
)
from rlhf_exp.errors import UserError
from tests.annotation.lab import items, new_campaign
from tests.lab import jsonl


def test_an_item_is_pinned_by_its_texts() -> None:
    one = item_of("p", "x", "y")
    assert one.id == item_of("p", "x", "y").id
    assert len({one.id, item_of("p", "y", "x").id, item_of("p", "xy", "").id}) == 3
    assert item_of("p", "x \n", " x").identical
    assert not one.identical
    row = {"prompt": "p", "answer_a": "x", "answer_b": "y", "score_a": 1.0}
    assert items_of_rows([row, row]) == [one]


def test_halves_of_surrogate_pairs_are_replaced() -> None:
    texts = item_of("\ud800 a", "b \udc00", "\U0001f600 \u202e")
    assert (texts.prompt, texts.answer_a) == ("\ufffd a", "b \ufffd")
    assert texts.answer_b == "\U0001f600 \u202e"


def test_sides_are_balanced_over_items_and_over_annotators() -> None:
    sides = {
        name: [display_side(0, item.id, name) for item in items(1000)] for name in ("anna", "ben")
    }
    for found in sides.values():
        assert stats.binomtest(sum(found), 1000).pvalue > 0.001
    # One annotator's sides tell nothing about another's.
    equal = sum(a == b for a, b in zip(sides["anna"], sides["ben"], strict=True))
    assert stats.binomtest(equal, 1000).pvalue > 0.001
    assert sides["anna"] == [display_side(0, item.id, "anna") for item in items(1000)]
    assert sides["anna"] != [display_side(1, item.id, "anna") for item in items(1000)]


def test_every_annotator_has_an_order_of_her_own() -> None:
    anna, ben = (display_order(items(50), 0, name) for name in ("anna", "ben"))
    assert anna != ben
    assert {item.id for item in anna} == {item.id for item in ben}
    assert anna == display_order(items(50)[::-1], 0, "anna")


def test_a_smaller_choice_is_part_of_a_larger_one() -> None:
    few, many = sample_items(items(50), 5, 0), sample_items(items(50), 20, 0)
    assert few == many[:5]
    assert few != sample_items(items(50), 5, 1)
    assert len(sample_items(items(3), None, 0)) == 3


def test_pairs_from_a_file(tmp_path: Path) -> None:
    row = {"prompt": "p", "answer_a": "x", "answer_b": "y"}
    assert read_pairs(jsonl(tmp_path / "a.jsonl", [row])) == [item_of("p", "x", "y")]
    with pytest.raises(UserError, match=r"b.jsonl:2: expected .*answer_b is missing or no text"):
        read_pairs(jsonl(tmp_path / "b.jsonl", [row, {"prompt": "p", "answer_a": "x"}]))
    with pytest.raises(UserError, match=r"b.jsonl:1: .* prompt is missing or no text"):
        read_pairs(jsonl(tmp_path / "b.jsonl", [row | {"prompt": None}]))
    with pytest.raises(UserError, match=r"c.jsonl:1: not JSON"):
        read_pairs(jsonl(tmp_path / "c.jsonl", ["{"]))
    with pytest.raises(UserError, match="no rows"):
        read_pairs(jsonl(tmp_path / "d.jsonl", []))


ROOT = Path(__file__).parents[2]


def vote(found: Campaign, item: int, choice: str = "A", annotator: str = "anna") -> Vote:
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
    campaign = new_campaign(tmp_path)
    first = campaign.record(vote(campaign, 0))
    assert first.revision == 1
    # The same request again, because its answer was lost on the way.
    assert campaign.record(vote(campaign, 0)) == first
    changed = campaign.record(replace(vote(campaign, 0, "B"), revision=1))
    assert changed.revision == 2
    assert Campaign(campaign.path).votes() == [changed]


def test_a_stale_page_does_not_overwrite(tmp_path: Path) -> None:
    campaign = new_campaign(tmp_path)
    campaign.record(vote(campaign, 0, "A"))
    campaign.record(replace(vote(campaign, 0, "B"), revision=1))
    with pytest.raises(Conflict) as conflict:
        campaign.record(replace(vote(campaign, 0, "Tie"), revision=1))
    assert conflict.value.stored.choice is Choice.B
    with pytest.raises(Conflict):
        campaign.record(vote(campaign, 0, "A"))  # a request of the first page that arrives late
    assert [one.choice for one in campaign.votes()] == [Choice.B]


def test_many_threads_lose_and_double_nothing(tmp_path: Path) -> None:
    campaign = new_campaign(tmp_path, count=40)

    def work(name: str) -> None:
        for number in range(40):
            campaign.record(vote(campaign, number, "AB"[number % 2], name))

    # Two threads for each annotator: everything is sent twice.
    threads = [threading.Thread(target=work, args=(name,)) for name in ("anna", "ben") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    votes = campaign.votes()
    assert len(votes) == 80
    assert {one.revision for one in votes} == {1}


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    campaign = new_campaign(tmp_path, count=200)
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from rlhf_exp.annotation.campaign import Campaign
        from rlhf_exp.annotation.campaign import Choice, Vote
        found = Campaign(Path(sys.argv[1]))
        for number, item in enumerate(found.items):
            found.record(Vote(item.id, "anna", "overall", 0, Choice.A, None, "", 0))
            print(number, flush=True)
        """
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(campaign.path)],
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
    stored = {one.item for one in Campaign(campaign.path).votes()}
    assert {campaign.items[number].id for number in range(told)} <= stored
    assert len(stored) <= told + 1  # the one under way may be stored without having been told


def test_commits_are_flushed_to_a_write_ahead_log(tmp_path: Path) -> None:
    campaign = new_campaign(tmp_path)
    with reading(campaign.path) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL: at every commit


def test_the_file_is_the_owners_alone(tmp_path: Path) -> None:
    campaign = new_campaign(tmp_path)
    assert stat.S_IMODE(campaign.path.stat().st_mode) == 0o600
    tokens = {one.token for one in campaign.annotators()} | {campaign.info.owner}
    assert len(tokens) == 3
    assert all(len(token) >= 32 for token in tokens)
    campaign.invite(["anna", "carla"])
    assert tokens < {one.token for one in campaign.annotators()} | {campaign.info.owner}


def test_a_campaign_is_not_made_twice_and_not_empty(tmp_path: Path) -> None:
    campaign = new_campaign(tmp_path)
    campaign.record(vote(campaign, 0))
    with pytest.raises(UserError, match="there is a study already"):
        new_campaign(tmp_path)
    assert len(campaign.votes()) == 1
    with pytest.raises(UserError, match="no two different answers"):
        Campaign.create(tmp_path / "other.sqlite", campaign.info, [])
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {"study.sqlite"}


def test_what_is_no_campaign(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such study"):
        Campaign(tmp_path / "none.sqlite")
    (tmp_path / "text.sqlite").write_text("not a database, but long enough to be read as one" * 9)
    with pytest.raises(UserError, match="not a readable study"):
        Campaign(tmp_path / "text.sqlite")
    sqlite3.connect(tmp_path / "empty.sqlite").execute("CREATE TABLE t (x)")
    with pytest.raises(UserError, match="not a readable study"):
        Campaign(tmp_path / "empty.sqlite")


def test_votes_from_elsewhere_are_added_all_or_none(tmp_path: Path) -> None:
    campaign = new_campaign(tmp_path)
    campaign.record(vote(campaign, 0, "A"))
    fresh = [replace(vote(campaign, n, "B", "carla"), revision=1) for n in (0, 1)]
    assert campaign.add([*fresh, vote(campaign, 0, "A")]) == 2
    assert campaign.add(fresh) == 0
    assert "carla" in [one.name for one in campaign.annotators()]
    clash = [replace(vote(campaign, 2, "B", "carla"), revision=1), vote(campaign, 0, "B")]
    with pytest.raises(UserError, match=r"anna's vote on item .* is a, and b in the import"):
        campaign.add(clash)
    assert len(campaign.votes()) == 3
