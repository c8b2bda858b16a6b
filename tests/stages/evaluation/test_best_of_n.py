from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_exp.batch import Prompts, Samples
from rlhf_exp.data.toy.gold_judge import gold_score
from rlhf_exp.rollout.engine import RolloutRequest
from rlhf_exp.rollout.native_engine import NativeEngine
from tests.lab import artifact, run
from tests.stages.test_eval import newest, samples

BEST = ("stage=eval", "eval.best_of=[1,4]")


def found_in(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "best_of.json").read_text())
    return content


def test_the_best_of_what_was_sampled_once(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled: list[int] = []
    answer = NativeEngine.answer

    def counted(self: NativeEngine, prompts: Prompts, request: RolloutRequest) -> Samples:
        sampled.append(len(prompts))
        return answer(self, prompts, request)

    monkeypatch.setattr(NativeEngine, "answer", counted)
    run(run_copy, *BEST)
    first = newest(run_copy)
    assert sorted(sampled) == [8, 8, 8 * 4]
    _check_curve(first)
    _check_policy(run_copy, first)

    # The answers are kept for another evaluation, which starts from the same tokens.
    run(run_copy, *BEST, "eval.tie_low=0.45")
    assert newest(run_copy) != first
    assert sorted(sampled[3:]) == [8, 8]
    assert found_in(newest(run_copy)) == found_in(first)
    assert samples(newest(run_copy)) == samples(first)

    # From the stored answers alone, the same numbers.
    run(run_copy, *BEST, f"eval.samples={first.name}")
    assert found_in(newest(run_copy)) == found_in(first)
    assert len(sampled) == 5


def _check_curve(folder: Path) -> None:
    found = found_in(folder)
    lines = [line for line in samples(folder) if line["part"] == "best_of"]
    reward = np.array([line["score"] for line in lines]).reshape(8, 4)
    gold = np.array([gold_score(line["prompt"], line["text"]).total for line in lines])
    one, four = found["points"]
    assert four["kl"] == pytest.approx(math.log(4) - 3 / 4)
    assert one["values"]["reward"]["mean"] == pytest.approx(reward.mean())
    assert four["values"]["reward"]["mean"] == pytest.approx(reward.max(axis=1).mean())
    gain = (reward.max(axis=1) - reward.mean(axis=1)).mean()
    assert four["gains"]["reward"]["mean"] == pytest.approx(gain)
    chosen = gold.reshape(8, 4)[np.arange(8), reward.argmax(axis=1)]
    assert four["values"]["gold"]["mean"] == pytest.approx(chosen.mean())
    (model,) = found["models"]
    ppo = [line for line in samples(folder) if line["model"] == "PPO"]
    assert model["values"]["reward"]["mean"] == pytest.approx(np.mean([a["score"] for a in ppo]))
    assert model["kl"]["mean"] == pytest.approx(np.mean([a["kl"] for a in ppo]))
    # The noise is not that of the preference part, so no answer is there by being the same one.
    (seed,) = {line["seed"] for line in lines}
    assert seed != ppo[0]["seed"]


def _check_policy(outputs: Path, folder: Path) -> None:
    """The best answers stand beside the models' wherever these are compared."""
    comparisons = json.loads((folder / "comparisons.json").read_text())
    assert [(one["name_a"], one["name_b"]) for one in comparisons] == [
        ("SFT", "PPO"),
        ("SFT", "best-of-4"),
    ]
    best = comparisons[1]
    lines = [line for line in samples(folder) if line["part"] == "best_of"]
    for row, compared in enumerate(best["rows"]):
        group = lines[4 * row : 4 * row + 4]
        assert compared["score_b"] == max(line["score"] for line in group)
        assert compared["answer_b"] in {line["text"] for line in group}
        assert compared["kl_b"] == pytest.approx(math.log(4) - 3 / 4)
    metrics = artifact_metrics(folder)
    mean = np.mean([row["score_b"] for row in best["rows"]])
    assert metrics["eval/best-of-4/reward/b"] == pytest.approx(mean)
    assert metrics["best_of/4/reward"] == pytest.approx(mean)


def artifact_metrics(folder: Path) -> dict[str, float]:
    metrics: dict[str, float] = json.loads((folder / "manifest.json").read_text())["metrics"]
    return metrics


def test_without_a_trained_policy_and_from_a_cut_distribution(run_copy: Path) -> None:
    """Best-of-n needs no training; without a whole distribution there is no KL beside it."""
    run(run_copy, *BEST, "eval.models=[sft]", "eval.top_k=5")
    folder = newest(run_copy)
    assert json.loads((folder / "result.json").read_text())["name_b"] == "best-of-4"
    metrics = artifact_metrics(folder)
    assert "eval/kl_sequence/b" not in metrics
    assert metrics["eval/reward/b"] == pytest.approx(metrics["best_of/4/reward"])
    assert found_in(folder)["models"] == []
    # Stored answers say themselves how they were sampled.
    run(run_copy, *BEST, f"eval.samples={folder.name}")
    assert newest(run_copy) != folder
    assert "eval/kl_sequence/b" not in artifact_metrics(newest(run_copy))
    assert artifact(run_copy, "sft").key in str(
        json.loads((folder / "manifest.json").read_text())["parents"]
    )
