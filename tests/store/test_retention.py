from __future__ import annotations

import pytest

from rlhf_exp.errors import UserError
from rlhf_exp.store.records import Records, RunRecord, Status
from rlhf_exp.store.retention import Rule, kept_keys, seconds_of


def point(key: str, objective: float | None, status: Status = Status.done) -> RunRecord:
    """Return a point begun at the second that its key ends with."""
    keys = {"sft": "shared", "ppo": key}
    created = f"2026-01-01T00:00:0{key[-1]}.000+00:00"
    return RunRecord(
        "kl", "ppo", keys, objective=objective, status=status, created=created, error=None
    )


POINTS = [
    point("a1", 0.5),
    point("b2", 0.9),
    point("c3", float("nan")),
    point("d4", None),
    point("e5", 2.0, Status.failed),
    point("f6", 3.0, Status.pruned),
    point("g7", -1.0),
    point("h8", None, Status.running),
    point("i9", 0.1, Status.interrupted),
    point("j0", None, Status.requeued),
]


@pytest.mark.parametrize(
    ("rule", "stays"),
    [
        # 0.9 and 0.5 are the highest of those that are done; what has not ended stays.
        ("best:2", "a1 b2 h8 i9 j0"),
        ("best:0", "h8 i9 j0"),
        ("best:9", "a1 b2 g7 h8 i9 j0"),
        # The ended ones were begun at 1 to 7.
        ("last:2", "f6 g7 h8 i9 j0"),
        ("last:99", "a1 b2 c3 d4 e5 f6 g7 h8 i9 j0"),
    ],
)
def test_which_runs_stay(rule: str, stays: str) -> None:
    gone = {one.key for one in Rule.parse("kl", rule).forgets(POINTS)}
    assert {one.key for one in POINTS} - gone == set(stays.split())


def test_other_names_keep_what_they_share(tmp_path: object) -> None:
    records = Records(tmp_path)  # type: ignore[arg-type]
    for one in POINTS:
        records.write(one)
    records.write(RunRecord("other", "ppo", {"sft": "shared", "ppo": "b2"}))
    assert kept_keys(records, Rule.parse("kl", "best:0")) == {"shared", "b2", "h8", "i9", "j0"}
    assert kept_keys(records) == {"shared", *(one.key for one in POINTS)}
    with pytest.raises(UserError, match="near it: kl"):
        kept_keys(records, Rule.parse("k", "best:0"))


@pytest.mark.parametrize("text", ["best", "best:", "best:-1", "best:x", "worst:1", "last:1.5", ""])
def test_what_is_no_rule(text: str) -> None:
    with pytest.raises(UserError, match=r"expected best:N or last:N"):
        Rule.parse("kl", text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("90", 90),
        ("90s", 90),
        ("30m", 1800),
        ("1.5h", 5400),
        ("7d", 604800),
        ("2w", 1209600),
    ],
)
def test_spans(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "d", "7 days", "-1d", "1y"])
def test_what_is_no_span(text: str) -> None:
    with pytest.raises(UserError, match="expected a span"):
        seconds_of(text)
