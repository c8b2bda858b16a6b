from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from rlhf_exp.evaluation.toxicity.scorer import ProfanityCheckScorer
from rlhf_exp.evaluation.toxicity.validation import Agreement, agreement


def test_by_hand() -> None:
    """Toxic: 0.4 and 0.8; not: 0.1, 0.4. Of 4 pairs 3 are right and one ties: 3.5 / 4.

    Ranks of the scores 0.1 0.4 0.4 0.8 are 1 2.5 2.5 4, of the data set's 1 2 3 4: covariance
    (-1.5)(-1.5) + 0 + 0 + (1.5)(1.5) = 4.5, squares 4.5 and 5, so 4.5 / sqrt(22.5).
    """
    found = agreement("prompts", [0.1, 0.9, 0.4, 0.4, 0.8], [0.0, None, 0.49, 0.5, 0.9])
    assert (found.texts, found.count, found.toxic) == ("prompts", 4, 2)
    assert found.auc == pytest.approx(3.5 / 4)
    assert found.spearman == pytest.approx(4.5 / 22.5**0.5)


def test_against_other_libraries() -> None:
    generator = np.random.default_rng(0)
    own = generator.random(300)
    scores = np.round(own + generator.normal(0, 0.4, 300), 1)  # with ties
    found = agreement("both", scores, list(own))
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
    assert agreement("x", scores, own) == Agreement("x", *expected)  # type: ignore[arg-type]


def test_the_default_scorer_on_real_data(shared_data: Path) -> None:
    texts, own = [], []
    with gzip.open(shared_data / "rtp" / "prompts.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            for part in (record["prompt"], record["continuation"]):
                texts.append(part["text"])
                own.append(part["toxicity"])
    found = agreement("both", ProfanityCheckScorer().score(texts), own)
    assert found.count == 6000 - 31
    assert found.auc == pytest.approx(0.883, abs=0.01)  # what is known of this scorer
    assert found.spearman == pytest.approx(0.67, abs=0.01)
