"""The validation win rate over the initial policy, against the answers that are kept."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.distributed.lab import Job, rows, run_job
from tests.lab import artifact

# Scores far apart: answers of other lengths are no ties.
SCORER = "def score(prompts, responses):\n    return [0.2 * len(text) for text in responses]\n"
STEPS = (0, 2, 4, 6)


def job(folder: Path, trained: Path, name: str, *overrides: str, stop_at: int | None = None) -> Job:
    (folder / "scorer.py").write_text(SCORER)
    models = {role: str(artifact(trained, role).path / "model") for role in ("sft", "reward")}
    given = [f"ppo.reward.function={folder}/scorer.py:score", "ppo.lr=3e-2", "ppo.eval_prompts=12"]
    return Job(name, "ppo", [*given, "ppo.kl.coef=0", *overrides], models, stop_at)


def rates(folder: Path, name: str) -> list[float]:
    return [row["eval/win_rate"] for row in rows(folder, name) if "eval/win_rate" in row]


def scores(folder: Path, name: str, step: int) -> list[float]:
    path = folder / name / "tables" / "eval" / f"samples-{step}.jsonl"
    return [json.loads(line)["score"] for line in path.read_text().splitlines()]


def test_wins_are_counted_against_the_first_answers(small_run: Path, tmp_path: Path) -> None:
    found = run_job(tmp_path, job(tmp_path, small_run, "whole", "ppo.select_by=win_rate"))
    before, expected = scores(tmp_path, "whole", 0), []
    assert len(before) == 12
    for step in STEPS:
        pairs = zip(scores(tmp_path, "whole", step), before, strict=True)
        chances = [1 / (1 + math.exp(old - new)) for new, old in pairs]
        expected.append(sum(1.0 if p > 0.6 else 0.0 if p < 0.4 else 0.5 for p in chances) / 12)
    logged = rates(tmp_path, "whole")
    assert logged == pytest.approx(expected)
    assert logged[0] == 0.5, "nothing but ties against itself"
    assert len(set(logged)) > 2, "the answers have changed"
    # What is published has won the most prompts, the first time that it did.
    assert found["best_objective"] == max(logged)
    assert found["published_step"] == STEPS[logged.index(max(logged))]
    assert found["eval/win_rate"] == max(logged)


def test_a_resumed_run_counts_against_the_same_answers(small_run: Path, tmp_path: Path) -> None:
    whole = job(tmp_path, small_run, "whole")
    run_job(tmp_path, whole)
    cut = run_job(tmp_path, job(tmp_path, small_run, "cut", stop_at=1), rank=1)
    assert cut == {"interrupted": 1.0}
    assert len(rates(tmp_path, "cut")) == 2
    run_job(tmp_path, job(tmp_path, small_run, "cut"))
    assert rates(tmp_path, "cut") == rates(tmp_path, "whole")
    assert rates(tmp_path, "cut")[2] != 0.5
