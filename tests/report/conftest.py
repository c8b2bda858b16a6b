"""The comparison that the report's tests draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from rlhf_exp.evaluation.comparison import ModelComparison, compare_models

Compare = Callable[..., ModelComparison]


@pytest.fixture
def compare() -> Compare:
    """Make a comparison with a given outcome; the baseline's rewards alternate between -1 and 1."""

    def make(
        wins: int = 30,
        ties: int = 54,
        losses: int = 16,
        *,
        name_a: str = "SFT",
        name_b: str = "PPO",
        prompts: Sequence[str] | None = None,
        answers: Sequence[str] | None = None,
    ) -> ModelComparison:
        count = wins + ties + losses
        base = np.where(np.arange(count) % 2, 1.0, -1.0)
        gain = np.array([2.0] * wins + [0.0] * ties + [-2.0] * losses)
        prompts = prompts or [f"\n\nHuman: Question {n}?\n\nAssistant:" for n in range(count)]
        answers = answers or [f" Answer {n}." for n in range(count)]
        kl = np.full(count, 3.0)
        return compare_models(
            prompts, answers, answers, base, base + gain, kl, name_a=name_a, name_b=name_b
        )

    return make
