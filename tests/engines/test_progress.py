"""The state in a run's last checkpoint, as it would be if the run went on."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from rlhf_exp.engines.native.progress import Progress, passes


@pytest.mark.parametrize(
    ("step", "before", "expected"),
    [(4, 0, True), (4, 4, False), (7, 4, False), (9, 4, True), (0, -1, True), (8, 5, True)],
)
def test_multiples_of_four(step: int, before: int, expected: bool) -> None:
    assert passes(step, before, 4) is expected


BEFORE: dict[str, Any] = {
    "step": 6,
    "last_eval": 4,
    "last_checkpoint": 4,
    "best_step": 4,
    "best_objective": 0.5,
    "best_of_checkpoints": [4],
    "published_metrics": {"eval/objective": 0.5},
    "kept": [4],
}
"""Step 6 is done, and nothing after it."""
AFTER = BEFORE | {
    "last_eval": 6,
    "last_checkpoint": 6,
    "best_step": 6,
    "best_objective": 0.75,
    "best_of_checkpoints": [4, 6],
    "published_metrics": {"eval/objective": 0.75},
    "kept": [4, 6],
}
"""The end was evaluated, its weights are the best so far, and they were kept."""


@pytest.mark.parametrize(
    ("eval_every", "keep_every", "stays"),
    [
        # Neither is due at 6 after 4: what a longer run would not have done is undone.
        (4, 4, set()),
        (4, None, set()),
        # An evaluation every 3 steps is due at 6.
        (3, 4, {"last_eval", "best_step", "best_objective", "published_metrics"}),
        (4, 3, {"kept"}),
        (2, 6, {"last_eval", "best_step", "best_objective", "published_metrics", "kept"}),
    ],
)
def test_what_only_the_end_called_for_is_undone(
    eval_every: int, keep_every: int | None, stays: set[str]
) -> None:
    found = Progress(**AFTER).going_on(Progress(**BEFORE), eval_every, keep_every)
    always = {"last_checkpoint", "best_of_checkpoints"}
    expected = BEFORE | {name: AFTER[name] for name in stays | always}
    assert asdict(found) == expected


def test_a_checkpoint_is_read_as_the_length_of_the_run_says() -> None:
    ended, going_on = Progress(**AFTER), Progress(**BEFORE)
    state = json.loads(json.dumps({"step": 6, **ended.state(going_on)}))
    assert Progress.of(state, 6) == ended, "the same run, killed before its result was whole"
    assert Progress.of(state, 8) == going_on
    halfway = {"step": 6, **ended.state(None)}
    assert Progress.of(halfway, 8) == ended


def test_a_copy_is_not_reached_by_later_changes() -> None:
    progress = Progress(kept=[4], published_metrics={"a": 1.0})
    copied = progress.copy()
    progress.kept.append(8)
    progress.published_metrics["a"] = 0.0
    assert (copied.kept, copied.published_metrics) == ([4], {"a": 1.0})
