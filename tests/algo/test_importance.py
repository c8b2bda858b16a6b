"""Importance weights by hand, and by enumeration of a small vocabulary."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlhf_exp.algo.importance import (
    effective_share,
    importance_gap,
    sampler_kl,
    truncated_weights,
)

POLICY, SAMPLER = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.3, 0.2])


def test_the_gap_is_of_response_tokens_only() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, math.nan]])
    sampler = torch.tensor([[-1.5, -1.0, 0.0]])
    mask = torch.tensor([[True, True, False]])
    # The policy finds the first token likelier by half a nat, the second less likely by one.
    assert importance_gap(logprobs, sampler, mask).tolist() == [[0.5, -1.0, 0.0]]


def test_weights_make_expectations_those_of_the_policy() -> None:
    advantages = np.array([1.0, -2.0, 5.0])
    gap = torch.tensor(np.log(POLICY / SAMPLER))
    weighted = (SAMPLER * truncated_weights(gap, 10.0).numpy() * advantages).sum()
    # 0.7 * 1 - 0.2 * 2 + 0.1 * 5 under the policy; the sampler's own mean is 0.9.
    assert weighted == pytest.approx(0.8)


def test_weights_are_cut_at_the_limit_from_above_only() -> None:
    # e^log 1.4 = 1.4; log 3 is cut; e^-3 = 0.0498 is not; e^200 overflows float32.
    gap = torch.tensor([math.log(1.4), math.log(3.0), -3.0, 200.0])
    assert truncated_weights(gap, 2.0).tolist() == pytest.approx([1.4, 2.0, math.exp(-3.0), 2.0])


def test_a_limit_below_1_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"0\.5 is below 1"):
        truncated_weights(torch.zeros(1), 0.5)


def test_the_divergence_of_sampler_and_policy() -> None:
    exact = float((SAMPLER * np.log(SAMPLER / POLICY)).sum())
    logprobs, sampler = torch.tensor(np.log([POLICY, SAMPLER]))
    values = sampler_kl(logprobs, sampler, torch.ones(3, dtype=torch.bool))
    assert float((values * torch.tensor(SAMPLER)).sum()) == pytest.approx(exact)
    # The other direction is another number: 0.7 ln 1.4 + 0.2 ln 2/3 + 0.1 ln 1/2 = 0.0851.
    assert exact == pytest.approx(0.0920, abs=1e-4)
    # For the first token, g = ln 1.4: 1.4 - 1 - 0.3365.
    assert float(values[0]) == pytest.approx(0.0635, abs=1e-4)


def test_effective_sample_size() -> None:
    # (1 + 1 + 2)^2 / (3 * (1 + 1 + 4)) = 16 / 18; one weight alone counts for one of three.
    def share(*weights: float) -> float:
        values = torch.tensor(weights)
        sums = (values.sum(), values.square().sum(), torch.tensor(float(len(weights))))
        return float(effective_share(*sums))

    assert share(1.0, 1.0, 2.0) == pytest.approx(16 / 18)
    assert share(0.0, 0.0, 7.0) == pytest.approx(1 / 3)
    assert share(0.3, 0.3) == pytest.approx(1.0)
