"""Groups of runs side by side."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from rlhf_exp.cli import main
from tests.report.sweep.lab import Lab, swept


def told(capsys: pytest.CaptureFixture[str], lab: Lab, *arguments: str) -> str:
    capsys.readouterr()
    assert main(["--outputs", str(lab.folder), "compare", *arguments]) == 0
    return capsys.readouterr().out


def both(lab: Lab) -> tuple[list[list[float]], list[list[float]]]:
    """Give every run of two groups of three seeds an evaluation on four prompts."""
    generator = np.random.default_rng(3)
    sides: tuple[list[list[float]], list[list[float]]] = ([], [])
    for number, (name, lr) in enumerate((("low", 1e-4), ("high", 1e-3))):
        for seed in range(3):
            scores = generator.normal(number, 1.0, 4).round(3).tolist()
            sides[number].append(scores)
            key = f"{name}{seed}"
            lab.evaluate(f"e{key}", key, scores)
            more = [f"ppo.lr={lr}", f"ppo.seed={seed}"]
            lab.point(key, float(seed + number), more, name=name, keys={"eval": f"e{key}"})
    return sides


def test_groups_are_compared_over_seeds_and_prompts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = Lab(tmp_path)
    lab.publish("sft", "shared", metrics={"eval/loss": 2.0})
    a, b = both(lab)
    found = json.loads(told(capsys, lab, "low", "high", "--json"))
    metrics = {row["name"]: row for row in found["metrics"]}
    objective = metrics["ppo eval/objective"]
    assert objective["a"]["values"] == [0.0, 1.0, 2.0]
    assert objective["difference"]["mean"] == 1.0
    # Deviation 1 of three runs on both sides: error sqrt(2/3), and Student's t of four degrees of
    # freedom is 2.7764, so 1 +- 2.2670.
    assert objective["difference"]["low"] == pytest.approx(-1.2670, abs=1e-3)
    assert objective["difference"]["high"] == pytest.approx(3.2670, abs=1e-3)
    paired = found["prompts"]["differences"]["Reward, raw"]
    assert found["prompts"]["count"] == 4
    differences = np.array(b).mean(axis=0) - np.array(a).mean(axis=0)
    assert paired["mean"] == pytest.approx(differences.mean())
    theirs = stats.bootstrap(
        (differences,), np.mean, method="percentile", n_resamples=20_000, random_state=1
    ).confidence_interval
    assert paired["low"] == pytest.approx(theirs.low, abs=0.05)
    assert any("nothing of other seeds" in note for note in found["notes"])
    text = told(capsys, lab, "low", "high")
    (shared,) = (line for line in text.splitlines() if line.startswith("sft eval/loss"))
    assert shared.endswith("the same results")


def test_mixed_and_unfinished_sides_are_said_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = swept(tmp_path)
    text = told(capsys, lab, "kl", "kl:ppo.lr=1e-3")
    assert "kl holds runs that differ in more than seeds (ppo.lr)" in text
    assert "kl: 1 runs are not done and are left out." in text
    assert "needs 3 runs of each" in text
    rows = list(csv.DictReader(io.StringIO(told(capsys, lab, "kl", "kl:ppo.lr=1e-3", "--csv"))))
    config = {row["name"]: (row["a"], row["b"]) for row in rows if row["kind"] == "config"}
    assert config["ppo.lr"] == ("0.0001, 0.001", "0.001")
    (metric,) = (row for row in rows if row["name"] == "ppo eval/objective")
    # By hand: (1 + 2 + 6 + 4 + 5) / 5 and (4 + 5) / 2.
    assert [float(metric[name]) for name in ("a", "b")] == pytest.approx([3.6, 4.5])
    assert (metric["n_a"], metric["n_b"], metric["low"]) == ("5", "2", "")


def test_a_group_without_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab = Lab(tmp_path)
    for seed in range(2):
        lab.fail(f"f{seed}", [f"ppo.seed={seed}"], "out of memory")
    assert main(["--outputs", str(tmp_path), "compare", "kl", "kl"]) == 2
    assert "none of its 2 runs is done" in capsys.readouterr().err
