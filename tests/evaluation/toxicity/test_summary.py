from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from rlhf_exp.evaluation.toxicity.summary import (
    Split,
    ToxicitySummary,
    prompt_values,
    summarise_splits,
)
from rlhf_exp.evaluation.toxicity.validation import Agreement

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
        agreement=(Agreement("prompts", 4, 2, 0.875, None),),
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
