from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from rlhf_exp.evaluation.toxicity.scorers import ProfanityCheckScorer
from rlhf_exp.evaluation.toxicity.summary import (
    ScorerAgreement,
    Split,
    ToxicitySummary,
    prompt_values,
    scorer_agreement,
    summarise_splits,
)

SFT = np.array([[0.1, 0.6], [0.2, 0.2], [0.9, 0.5], [0.0, 0.4]])
PPO = np.array([[0.1, 0.2], [0.2, 0.2], [0.5, 0.1], [0.0, 0.0]])
OWN = [0.3, None, 0.5, 0.49]


def splits() -> dict[str, Split]:
    found = summarise_splits({"SFT": SFT, "PPO": PPO}, OWN, seed=0)
    return {split.name: split for split in found}


def test_by_hand() -> None:
    """SFT's prompts have means .35 .2 .7 .2, maxima .6 .2 .9 .4: toxic are the first and third.

    PPO's have means .15 .2 .3 0, maxima .2 .2 .5 0: toxic is the third.
    """
    found = splits()
    assert {name: one.prompts for name, one in found.items()} == {
        "all": 4,
        "non_toxic": 2,
        "toxic": 1,
        "unknown": 1,
    }
    sft, ppo = (found["all"].models[name] for name in ("SFT", "PPO"))
    assert {name: one.value.mean for name, one in sft.items()} == pytest.approx(
        {"mean": 1.45 / 4, "expected_max": 2.1 / 4, "probability": 0.5}
    )
    assert {name: one.difference.mean for name, one in ppo.items() if one.difference} == (
        pytest.approx({"mean": -0.8 / 4, "expected_max": -1.2 / 4, "probability": -0.25})
    )
    assert all(one.difference is None for one in sft.values())
    few = found["non_toxic"].models["PPO"]
    assert few["mean"].value.mean == pytest.approx((0.15 + 0.0) / 2)
    assert few["probability"].difference is not None
    assert few["probability"].difference.mean == -0.5


def test_intervals_are_over_prompts() -> None:
    """Copies of a prompt's score among its continuations make no interval narrower."""
    column = np.random.default_rng(1).random((60, 1))
    narrow, wide = (
        summarise_splits({"a": np.repeat(column, k, axis=1)}, [None] * 60, seed=0)[0]
        for k in (20, 2)
    )
    assert narrow.models == wide.models
    value = wide.models["a"]["mean"].value
    expected = stats.bootstrap((column[:, 0],), np.mean, method="percentile", rng=5)
    ends = expected.confidence_interval
    assert (value.low, value.high) == pytest.approx((ends.low, ends.high), abs=0.004)


def test_the_interval_of_a_share_is_exact() -> None:
    """0 of 20: the upper end is 1 - 0.025 ** (1 / 20)."""
    found = summarise_splits({"a": np.zeros((20, 3))}, [None] * 20, seed=0)
    share = found[0].models["a"]["probability"].value
    assert (share.mean, share.low) == (0, 0)
    assert share.high == pytest.approx(1 - 0.025 ** (1 / 20))


def test_one_continuation_has_no_maximum() -> None:
    assert prompt_values(SFT[:, :1]).keys() == {"mean", "probability"}


def test_all_prompts_of_one_kind_are_no_split() -> None:
    assert [one.name for one in summarise_splits({"a": SFT}, [None] * 4, seed=0)] == ["all"]


def test_models_with_other_prompts() -> None:
    with pytest.raises(ValueError, match=r"4 prompts, but scores of shapes \[\(3, 2\), \(4, 2\)\]"):
        summarise_splits({"a": SFT, "b": PPO[:3]}, OWN, seed=0)


def summary() -> ToxicitySummary:
    return ToxicitySummary(
        scorer="some",
        lexical=True,
        data="org/set",
        generations=2,
        max_new_tokens=20,
        temperature=1.0,
        format="raw",
        level=0.95,
        seed=0,
        models=("SFT", "PPO"),
        splits=tuple(splits().values()),
        agreement=(ScorerAgreement("prompts", 4, 2, 0.875, None),),
    )


def test_json_and_back() -> None:
    text = json.dumps(summary().to_json(), allow_nan=False)
    # A split of one prompt has no interval: JSON has no infinity, and it comes back.
    assert ToxicitySummary.from_json(json.loads(text)) == summary()


def test_flat_names() -> None:
    found = summary().scalars()
    assert found["toxicity/SFT/mean"] == pytest.approx(1.45 / 4)
    assert found["toxicity/PPO/mean_difference"] == pytest.approx(-0.2)
    assert found["toxicity/PPO/toxic/expected_max"] == 0.5
    assert found["toxicity/scorer/prompts_auc"] == 0.875
    assert "toxicity/scorer/prompts_spearman" not in found
    assert "toxicity/SFT/mean_difference" not in found


def test_validation_by_hand() -> None:
    """Toxic: 0.4 and 0.8; not: 0.1, 0.4. Of 4 pairs 3 are right and one ties: 3.5 / 4.

    Ranks of the scores 0.1 0.4 0.4 0.8 are 1 2.5 2.5 4, of the data set's 1 2 3 4: covariance
    (-1.5)(-1.5) + 0 + 0 + (1.5)(1.5) = 4.5, squares 4.5 and 5, so 4.5 / sqrt(22.5).
    """
    found = scorer_agreement("prompts", [0.1, 0.9, 0.4, 0.4, 0.8], [0.0, None, 0.49, 0.5, 0.9])
    assert (found.texts, found.count, found.toxic) == ("prompts", 4, 2)
    assert found.auc == pytest.approx(3.5 / 4)
    assert found.spearman == pytest.approx(4.5 / 22.5**0.5)


def test_against_other_libraries() -> None:
    generator = np.random.default_rng(0)
    own = generator.random(300)
    scores = np.round(own + generator.normal(0, 0.4, 300), 1)  # with ties
    found = scorer_agreement("both", scores, list(own))
    assert found.auc == pytest.approx(roc_auc_score(own >= 0.5, scores), abs=1e-12)
    assert found.spearman == pytest.approx(stats.spearmanr(scores, own).statistic, abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "own", "expected"),
    [
        ([], [], (0, 0, None, None)),
        ([0.5, 0.1], [None, 0.6], (1, 1, None, None)),
        ([0.1, 0.1], [0.2, 0.3], (2, 0, None, None)),
        ([0.5, 0.5], [0.2, 0.7], (2, 1, 0.5, None)),
    ],
)
def test_where_there_is_nothing_to_say(
    scores: list[float], own: list[float | None], expected: tuple[int, int, object, object]
) -> None:
    assert scorer_agreement("x", scores, own) == ScorerAgreement("x", *expected)  # type: ignore[arg-type]


def test_the_default_scorer_on_real_data(shared_data: Path) -> None:
    texts, own = [], []
    with gzip.open(shared_data / "rtp" / "prompts.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            for part in (record["prompt"], record["continuation"]):
                texts.append(part["text"])
                own.append(part["toxicity"])
    found = scorer_agreement("both", ProfanityCheckScorer().score(texts), own)
    assert found.count == 6000 - 31
    assert found.auc == pytest.approx(0.883, abs=0.01)  # what is known of this scorer
    assert found.spearman == pytest.approx(0.67, abs=0.01)
