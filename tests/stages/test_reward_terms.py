"""A sum of rewards in a whole run: an ensemble of two seeds, a function and a length."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.comparison import ModelComparison
from rlhf_exp.report.run.gather import RESULT
from rlhf_exp.store.store import Store
from tests import lab

SOURCE = "def score(prompts, responses):\n    return [float(len(text)) for text in responses]\n"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reward models of two seeds, over one SFT model."""
    folder = tmp_path_factory.mktemp("terms")
    (folder / "mine.py").write_text(SOURCE)
    for seed in (1, 2):
        lab.run(folder / "outputs", "stage=reward", f"reward.seed={seed}", f"name=seed{seed}")
    return folder / "outputs"


def terms(outputs: Path, mine: str = "mine") -> str:
    return (
        "ppo.reward.terms=[{models: [seed1, seed2], combine: uncertainty, coef: 0.5, weight: 2.0},"
        f" {{function: '{outputs.parent / mine}.py:score', weight: 0.1}},"
        " {length: {target: 4}, weight: 0.5}]"
    )


def test_terms_are_logged_shown_and_add_up(outputs: Path) -> None:
    lab.run(outputs, terms(outputs), "ppo.reward.delta=false", "name=mixed")
    ppo, evaluation = (lab.artifact(outputs, stage) for stage in ("ppo", "eval"))
    assert not {"reward"} & ppo.manifest.parents.keys(), "no term asks for the run's own"
    rewards = {a.key for a in Store(outputs / "store").find("reward/")}
    assert {ppo.manifest.parents["reward_1"], ppo.manifest.parents["reward_2"]} == rewards
    rows = [json.loads(line) for line in (ppo.path / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "reward/mean" in row]
    assert trained
    for row in trained:
        parts = {
            name: row[f"reward/term/{name}/mean"] for name in ("ensemble", "function", "length")
        }
        total = 2.0 * parts["ensemble"] + 0.1 * parts["function"] + 0.5 * parts["length"]
        assert row["reward/mean"] == pytest.approx(total, abs=1e-4)
        assert row["reward/ensemble_std"] > 0
        assert math.isfinite(row["reward/term/length/std"])
    assert any("eval/reward/term/ensemble/mean" in row for row in rows)
    result = ModelComparison.from_json(evaluation.json(RESULT))
    for shown in result.rows:
        assert shown.terms_b["function"] == len(shown.answer_b)
        total = 2.0 * shown.terms_b["ensemble"] + 0.1 * shown.terms_b["function"]
        assert shown.score_b == pytest.approx(total + 0.5 * shown.terms_b["length"], abs=1e-4)
    text = (outputs / "reports" / f"eval-{evaluation.key}.html").read_text()
    for name in ("ensemble", "function", "length"):
        assert f"Reward term {name}, raw" in text
    assert "Ensemble: standard deviation" in text
    metric = result.metric("term/function")
    assert metric is not None
    assert metric.b is not None
    lengths = [len(row.answer_b) for row in result.rows]
    assert metric.b.mean == pytest.approx(sum(lengths) / len(lengths))


def test_disagreement_stops_a_run(outputs: Path) -> None:
    with pytest.raises(UserError, match=r"reward/ensemble_std is .*, above ppo\.reward\.ensemble_"):
        lab.run(outputs, terms(outputs), "ppo.reward.ensemble_stop=1e-6", "stage=ppo", "ppo.seed=5")


def test_content_counts_in_the_key_and_names_of_runs_do_not(outputs: Path) -> None:
    from rlhf_exp.pipeline.plan import plan

    def key(*overrides: str) -> str:
        config = lab.small_config(outputs, "stage=ppo", *overrides)
        return {step.stage: step.key for step in plan(config)}["ppo"]

    same = outputs.parent / "same.py"
    same.write_text(SOURCE)
    other = outputs.parent / "other.py"
    other.write_text(SOURCE.replace("len(text)", "-len(text)"))
    by_key = terms(outputs)
    for number in (1, 2):
        (artifact,) = [
            a
            for a in Store(outputs / "store").find("reward/")
            if a.manifest.config["reward"]["seed"] == number
        ]
        by_key = by_key.replace(f"seed{number}", artifact.key)
    before = key(terms(outputs))
    assert key(by_key) == before
    assert key(terms(outputs, "same")) == before
    changed = {
        key(terms(outputs, "other")),
        key(terms(outputs).replace("coef: 0.5", "coef: 0.6")),
        key(terms(outputs).replace("target: 4", "target: 5")),
        key(terms(outputs).replace("weight: 0.1", "weight: 0.2")),
        key(terms(outputs).replace("seed2", "default")),
    }
    assert len(changed | {before}) == 6
