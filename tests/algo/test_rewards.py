"""Reward shaping by hand, and running moments against numpy over everything at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlhf_exp.algo.rewards import RewardScaler, RunningMoments, clip, delta, shape_rewards


def test_running_moments_equal_those_of_all_values_at_once() -> None:
    generator = np.random.default_rng(0)
    batches = [generator.normal(1000.0, 0.01, size) for size in (1, 7, 0, 40, 2)]
    moments = RunningMoments()
    for batch in batches:
        moments.update(torch.from_numpy(batch))
    everything = np.concatenate(batches)
    assert moments.count == 50
    assert moments.mean == pytest.approx(everything.mean(), rel=1e-14)
    assert moments.std == pytest.approx(everything.std(ddof=1), rel=1e-9)


def test_std_is_one_until_it_means_something() -> None:
    moments = RunningMoments()
    assert moments.std == 1.0
    moments.update(torch.tensor([3.0]))
    assert moments.std == 1.0
    moments.update(torch.tensor([3.0, 3.0]))
    assert moments.std == 1.0


def test_running_scaler_by_hand() -> None:
    scaler = RewardScaler("running")
    # 1, 3: std sqrt(2). The mean is not subtracted.
    first = scaler.scale(torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(first, torch.tensor([1.0, 3.0]) / math.sqrt(2))
    # 1, 3, 5, 7: mean 4, squared distances 9 + 1 + 1 + 9 = 20, std sqrt(20 / 3).
    second = scaler.scale(torch.tensor([5.0, 7.0]))
    torch.testing.assert_close(second, torch.tensor([5.0, 7.0]) / math.sqrt(20 / 3))


def test_reference_scaler_learns_from_the_first_iteration_of_all_ranks_only() -> None:
    scaler = RewardScaler("reference")
    everyone = torch.tensor([0.0, 4.0, 8.0])  # mean 4, squared distances 32, std sqrt(32 / 2) = 4
    assert scaler.scale(torch.tensor([4.0]), everyone).tolist() == [1.0]
    assert scaler.scale(torch.tensor([400.0, 0.0])).tolist() == [100.0, 0.0]


def test_scaler_continues_from_its_state() -> None:
    first, second = RewardScaler("running"), RewardScaler("running")
    first.scale(torch.tensor([1.0, 3.0]))
    second.load_state_dict(first.state_dict())
    scores = torch.tensor([5.0, 7.0])
    torch.testing.assert_close(second.scale(scores), scores / math.sqrt(20 / 3))


def test_no_scaling_and_unknown_mode() -> None:
    scores = torch.tensor([5.0, 7.0])
    assert RewardScaler("none").scale(scores) is scores
    with pytest.raises(ValueError, match="none, running, reference"):
        RewardScaler("ref")  # type: ignore[arg-type]


def test_delta_and_clip() -> None:
    assert delta(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 4.0])).tolist() == [2.0, -3.0]
    assert clip(torch.tensor([12.0, -12.0, 3.0]), 10.0).tolist() == [10.0, -10.0, 3.0]


def test_score_lands_on_the_last_response_token() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, math.nan], [-1.0, 9.0, 9.0], [1.0, 1.0, 1.0]])
    ref_logprobs = torch.tensor([[-3.0, -1.0, 0.0], [-1.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    scores = torch.tensor([10.0, -5.0, math.nan])  # the last row only fills up the batch
    rewards = shape_rewards(scores, logprobs, ref_logprobs, mask, beta=0.5)
    # Row 0: k1 = 2, -1 -> -1, 0.5 + 10. Row 1: k1 = 0.5 -> -0.25 - 5.
    assert rewards.tolist() == [[-1.0, 10.5, 0.0], [-5.25, 0.0, 0.0], [0.0, 0.0, 0.0]]
