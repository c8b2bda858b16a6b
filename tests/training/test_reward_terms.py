"""Several rewards added up, and ensembles: sums and spreads worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf_exp.config.training import Combine, PpoRewardConfig, RewardTermConfig
from rlhf_exp.training.reward_scorer import Scorer
from rlhf_exp.training.reward_terms import (
    EnsembleScorer,
    LengthScorer,
    MixedScorer,
    combine_scores,
)

# Two prompts of three tokens, with contents of 1 and of 4 tokens.
ROWS = (torch.zeros(2, 8, dtype=torch.long), torch.tensor([3, 3]), torch.tensor([1, 4]))


def constant(*values: float) -> Scorer:
    def score(tokens: Tensor, prompt_lengths: Tensor, content_lengths: Tensor) -> Tensor:
        return torch.tensor(values)

    return score


def test_a_length_is_scored_by_its_distance_in_targets() -> None:
    # |1 - 4| / 4 and |4 - 4| / 4.
    assert LengthScorer(4)(*ROWS).tolist() == [-0.75, 0.0]


@pytest.mark.parametrize(
    ("combine", "coef", "expected"),
    [
        (Combine.mean, 1.0, [2.0, 2.0]),
        (Combine.min, 1.0, [1.0, 2.0]),
        # The deviation of 1 and 3 is 1, not sqrt(2): the models are the ensemble, no sample of it.
        (Combine.uncertainty, 0.5, [1.5, 2.0]),
    ],
)
def test_what_an_ensemble_says(combine: Combine, coef: float, expected: list[float]) -> None:
    scores, spread = combine_scores(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), combine, coef)
    assert scores.tolist() == expected
    assert spread.tolist() == [1.0, 0.0]


def test_terms_are_added_up_by_weight_and_kept_without() -> None:
    ensemble = EnsembleScorer([constant(1.0, 2.0), constant(3.0, 2.0)], Combine.mean, 1.0)
    other = EnsembleScorer([constant(0.0, 0.0), constant(0.0, 4.0)], Combine.min, 1.0)
    mixed = MixedScorer(
        {
            "models": (2.0, ensemble),
            "worst": (1.0, other),
            "length": (-0.5, LengthScorer(4)),
        }
    )
    found = mixed.judge(*ROWS)
    # 2 * 2 + 0 - 0.5 * -0.75 and 2 * 2 + 0 - 0.
    assert found.total.tolist() == [4.375, 4.0]
    assert {name: values.tolist() for name, values in found.terms.items()} == {
        "models": [2.0, 2.0],
        "worst": [0.0, 0.0],
        "length": [-0.75, 0.0],
    }
    assert found.spread is not None
    assert found.spread.tolist() == [1.0, 2.0], "the larger of each response's two"
    assert mixed(*ROWS).tolist() == [4.375, 4.0]


def test_names_of_terms_are_unique_and_fit_for_metrics() -> None:
    terms = [
        RewardTermConfig(model="default"),
        RewardTermConfig(model="other"),
        RewardTermConfig(models=["default", "third", "other"]),
        RewardTermConfig(url="http://a", name="a reward/2"),
    ]
    section = PpoRewardConfig(terms=terms)
    assert section.term_names == ["model", "model_2", "ensemble", "a_reward_2"]
    assert section.term_models == {"reward_1": "other", "reward_2": "third"}
    assert section.model_scores
