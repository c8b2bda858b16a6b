from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from rlhf_exp.data.toy.gold_judge import gold_score
from rlhf_exp.errors import UserError
from tests.lab import artifact, run
from tests.stages.test_eval import newest, samples

QUALITY = ("stage=eval", "eval=reward_quality", "eval.reward_quality.best_of=4")


def found_in(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "reward_quality.json").read_text())
    return content


def test_held_out_pairs(run_copy: Path) -> None:
    run(run_copy, *QUALITY)
    found = newest(run_copy)
    quality = found_in(found)
    model, gold = quality["pairs"]
    assert (model["judge"], gold["judge"]) == ("reward model", "gold judge")
    # The reward stage counts the same pairs with its own forward passes.
    measured = artifact(run_copy, "reward").manifest.metrics
    assert model["accuracy"]["total"] == measured["test/pairs"] == 12
    assert model["accuracy"]["count"] / 12 == pytest.approx(measured["test/accuracy"])
    assert model["calibration"]["error"] == pytest.approx(
        measured["test/calibration_error"], abs=1e-5
    )
    assert sum(one["right"]["total"] for one in model["margin_bins"]) == 12
    lines = [line for line in samples(found) if line["part"] == "reward_quality/pairs"]
    sides = {
        kind: [line for line in lines if line["model"] == kind] for kind in ("chosen", "rejected")
    }
    golden = [
        [gold_score(line["prompt"], line["text"]).total for line in sides[side]] for side in sides
    ]
    assert gold["accuracy"]["count"] == sum(a > b for a, b in zip(*golden, strict=True))
    scores = [line["score"] for side in sides.values() for line in side]
    tokens = [line["tokens"] for side in sides.values() for line in side]
    assert model["length"]["spearman"] == pytest.approx(stats.spearmanr(scores, tokens).statistic)


def test_gains_against_kl(run_copy: Path) -> None:
    run(run_copy, *QUALITY)
    found = newest(run_copy)
    quality = found_in(found)
    best, policy = quality["paths"]
    assert [point["label"] for point in best["points"]] == ["best of 2", "best of 4"]
    assert best["points"][1]["kl"] == pytest.approx(math.log(4) - 3 / 4)
    lines = [line for line in samples(found) if line["part"] == "reward_quality"]
    start = np.array([line["score"] for line in lines if line["model"] == "SFT"]).reshape(8, 4)
    gain = (start.max(axis=1) - start.mean(axis=1)).mean() / start.std()
    assert best["points"][1]["gains"]["reward model"]["mean"] == pytest.approx(gain)
    ppo = [line for line in lines if line["model"] == "PPO"]
    (point,) = policy["points"]
    assert point["kl"] == pytest.approx(max(0.0, np.mean([line["kl"] for line in ppo])))
    gold = [gold_score(line["prompt"], line["text"]).total for line in ppo]
    gold_start = [
        gold_score(line["prompt"], line["text"]).total for line in lines if line["model"] == "SFT"
    ]
    if np.ptp(gold_start) > 0:
        wanted = (np.mean(gold) - np.mean(gold_start)) / np.std(gold_start)
        assert point["gains"]["gold judge"]["mean"] == pytest.approx(wanted)


def test_snapshots_are_points_of_the_path(run_copy: Path) -> None:
    run(run_copy, "stage=ppo", "ppo.keep_every=2", "ppo.seed=1")
    ppo = max((run_copy / "store" / "ppo").iterdir(), key=lambda path: path.stat().st_mtime)
    kept = len(list((ppo / "snapshots").glob("step-*")))
    assert kept
    run(run_copy, *QUALITY, "ppo.seed=1")
    first = newest(run_copy)
    (_, policy) = found_in(first)["paths"]
    assert len(policy["points"]) == 1 + kept
    labels = {point["label"] for point in policy["points"]}
    assert "PPO" in labels
    assert all(label.startswith("PPO, step ") for label in labels - {"PPO"})
    # From the stored answers alone, the same numbers.
    run(run_copy, *QUALITY, f"eval.samples={first.name}")
    assert newest(run_copy) != first
    assert found_in(newest(run_copy)) == found_in(first)


def test_a_referee(run_copy: Path) -> None:
    run(run_copy, "stage=reward", "reward.seed=1", "reward.part=2/2", "name=referee")
    run(run_copy, *QUALITY, "eval.reward_quality.referee=referee")
    found = newest(run_copy)
    quality = found_in(found)
    assert quality["judges"] == ["reward model", "referee", "gold judge"]
    about = quality["referee"]
    # It was trained on half of the pairs, all of which the reward model was trained on too.
    assert (about["seed"], about["part"]) == (1, "2/2")
    assert 0.2 < about["shared"] < 0.8
    lines = [line for line in samples(found) if line["part"] == "reward_quality/pairs"]
    sides = [[line for line in lines if line["model"] == kind] for kind in ("chosen", "rejected")]
    right = sum(a["referee"] > b["referee"] for a, b in zip(*sides, strict=True))
    assert quality["pairs"][1]["accuracy"]["count"] == right
    same = sum(
        (a["referee"] > b["referee"]) == (a["score"] > b["score"])
        for a, b in zip(*sides, strict=True)
    )
    assert quality["agreement"]["referee"]["count"] == same
    manifest = json.loads((found / "manifest.json").read_text())
    assert manifest["parents"]["referee"] == next(
        path.name
        for path in (run_copy / "store" / "reward").iterdir()
        if path.name != manifest["parents"]["reward"]
    )


def test_reward_against_kl_is_of_whole_distributions(run_copy: Path) -> None:
    """A KL of answers cut to the most probable tokens would be none."""
    run(run_copy, *QUALITY)
    whole = samples(newest(run_copy))
    run(run_copy, *QUALITY, "eval.top_p=0.5", "eval.top_k=2")
    assert samples(newest(run_copy)) == whole
    assert {line["sampling"].get("top_p") for line in whole} == {1.0, None}  # pairs: none


def test_the_reward_model_is_no_referee_of_itself(run_copy: Path, tmp_path: Path) -> None:
    own = artifact(run_copy, "reward")
    for same in (own.key, str(own.path)):
        with pytest.raises(
            UserError, match=r"referee=.*that is the reward model that PPO maximised"
        ):
            run(run_copy, *QUALITY, f"eval.reward_quality.referee={same}")


def test_a_part_of_the_pairs(run_copy: Path) -> None:
    counts = []
    for part in ("1/2", "2/2"):
        run(run_copy, "stage=reward", f"reward.part={part}")
        made = max((run_copy / "store" / "reward").iterdir(), key=lambda path: path.stat().st_mtime)
        counts.append(json.loads((made / "facts.json").read_text())["pairs"])
    assert sum(counts) == 60
    assert min(counts) > 0


def test_a_reward_function_is_judged_too(run_copy: Path, tmp_path: Path) -> None:
    file = tmp_path / "long.py"
    file.write_text("def score(prompts, responses):\n    return [len(r) for r in responses]\n")
    run(run_copy, "stage=ppo", f"ppo.reward.function={file}:score", "ppo.reward.delta=false")
    run(run_copy, *QUALITY, f"ppo.reward.function={file}:score", "ppo.reward.delta=false")
    quality = found_in(newest(run_copy))
    (function, _) = quality["pairs"]
    assert function["judge"] == "reward function"
    assert function["chosen_over_blank"]["count"] == 12
