"""Advantages by hand and by their definition as a double sum; whitening by numpy.

Reward shaping by hand, and running moments against numpy over everything at once.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlhf_exp.algo.advantages import (
    RewardScaler,
    RunningMoments,
    ScaleMode,
    clip_scores,
    gae,
    group_relative,
    leave_one_out,
    rewards_to_go,
    shape_rewards,
    subtract_original_scores,
    whiten,
)

MASK = torch.tensor([[True, True, True], [True, True, False]])


def test_gae_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 2.0], [0.0, 4.0, 99.0]])
    values = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, math.nan]])
    advantages, returns = gae(rewards, values, MASK, gamma=0.5, lam=0.5)
    # Row 0: delta_2 = 2 - 3 = -1;            A_2 = -1
    #        delta_1 = 0 + 0.5 * 3 - 2 = -0.5; A_1 = -0.5 + 0.25 * -1 = -0.75
    #        delta_0 = 1 + 0.5 * 2 - 1 = 1;    A_0 = 1 + 0.25 * -0.75 = 0.8125
    # Row 1: delta_1 = 4 - 2 = 2 (nothing follows), A_1 = 2
    #        delta_0 = 0 + 0.5 * 2 - 1 = 0;    A_0 = 0 + 0.25 * 2 = 0.5
    assert advantages.tolist() == [[0.8125, -0.75, -1.0], [0.5, 2.0, 0.0]]
    assert returns.tolist() == [[1.8125, 1.25, 2.0], [1.5, 4.0, 0.0]]


def test_gae_is_the_double_sum_of_its_definition() -> None:
    generator = np.random.default_rng(0)
    rows, columns, gamma, lam = 4, 9, 0.97, 0.9
    rewards, values = generator.normal(size=(2, rows, columns))
    lengths = [9, 1, 4, 7]
    expected = np.zeros((rows, columns))
    for row, length in enumerate(lengths):
        for start in range(length):
            for later in range(start, length):
                following = values[row, later + 1] if later + 1 < length else 0.0
                surprise = rewards[row, later] + gamma * following - values[row, later]
                expected[row, start] += (gamma * lam) ** (later - start) * surprise
    mask = torch.arange(columns) < torch.tensor(lengths).unsqueeze(1)
    advantages, returns = gae(torch.from_numpy(rewards), torch.from_numpy(values), mask, gamma, lam)
    np.testing.assert_allclose(advantages, expected, atol=1e-5)
    np.testing.assert_allclose(returns, expected + values * mask.numpy(), atol=1e-5)


def test_without_discount_and_with_lambda_one_returns_are_sums_of_rewards() -> None:
    rewards = torch.tensor([[-1.0, -2.0, 10.0], [5.0, 1.0, 0.0]])
    values = torch.tensor([[3.0, 1.0, 4.0], [2.0, 7.0, 0.0]])
    _, returns = gae(rewards, values, MASK, gamma=1.0, lam=1.0)
    assert returns.tolist() == [[7.0, 8.0, 10.0], [6.0, 1.0, 0.0]]


def test_whitening_goes_by_the_mask() -> None:
    x = torch.tensor([[1.0, 2.0, 6.0], [7.0, 4.0, math.nan]])
    white = whiten(x, MASK)
    # 1, 2, 6, 7, 4: mean 4, squared distances 9 + 4 + 4 + 9 + 0 = 26, std sqrt(26 / 5).
    expected = torch.tensor([[-3.0, -2.0, 2.0], [3.0, 0.0, 0.0]]) / math.sqrt(26 / 5)
    torch.testing.assert_close(white, expected)


def test_whitening_with_the_moments_of_all_ranks() -> None:
    x = torch.tensor([[1.0, 2.0, 6.0], [7.0, 4.0, 0.0]])
    white = whiten(x, MASK, mean=2.0, std=4.0)
    expected = torch.tensor([[-0.25, 0.0, 1.0], [1.25, 0.5, 0.0]])
    torch.testing.assert_close(white, expected)


def test_whitening_of_equal_advantages_is_zero() -> None:
    assert whiten(torch.full((2, 3), 5.0), MASK).abs().max().item() == pytest.approx(0.0)


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


@pytest.mark.parametrize("mode", ["running", "reference"])
def test_scores_that_differ_by_rounding_are_not_divided(mode: ScaleMode) -> None:
    scaler = RewardScaler(mode)
    # A sum of a tenth in another order: neighbours in float32, 7e-9 apart.
    scores = torch.tensor([0.1, 0.1, 0.1]).nextafter(torch.tensor([0.1, 0.0, 1.0]))
    assert 0 < scores.std().item() < 1e-8
    assert torch.equal(scaler.scale(scores), scores)
    assert (scaler.divisor, scaler.all_equal) == (1.0, True)
    # The same small deviation of small scores is one of the answers.
    scaler = RewardScaler(mode)
    assert scaler.scale((scores - 0.1) * 3).std().item() == pytest.approx(1.0)
    assert not scaler.all_equal


def test_differences_are_rounded_as_their_terms_are() -> None:
    differences = torch.tensor([2e-6, -1e-6, -1e-6])  # of scores of 8 or so
    scaler = RewardScaler("running")
    assert torch.equal(scaler.scale(differences, largest=8.0), differences)
    resumed = RewardScaler("running")
    resumed.load_state_dict(scaler.state_dict())
    assert torch.equal(resumed.scale(differences), differences)
    assert resumed.all_equal
    # 1e-6, 2e-6 and 3e-6 from their mean: without the terms the deviation counts.
    assert RewardScaler("running").scale(differences).std().item() == pytest.approx(1.0)


def test_scores_are_divided_again_once_they_differ() -> None:
    scaler = RewardScaler("running")
    scaler.scale(torch.tensor([5.0, 5.0]))
    assert scaler.all_equal
    # 5, 5, 5, 9: mean 6, squared distances 1 + 1 + 1 + 9 = 12, std sqrt(12 / 3) = 2.
    assert scaler.scale(torch.tensor([5.0, 9.0])).tolist() == [2.5, 4.5]
    assert not scaler.all_equal


def test_whitening_does_not_magnify_rounding() -> None:
    x = torch.full((2, 3), 5.0)
    x[0, 0], x[1, 1] = 5.0000005, 4.9999995
    assert whiten(x, MASK).abs().max().item() < 0.1


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
    all_scores = torch.tensor([0.0, 4.0, 8.0])  # mean 4, squared distances 32, std sqrt(32 / 2) = 4
    assert scaler.scale(torch.tensor([4.0]), all_scores).tolist() == [1.0]
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
    assert subtract_original_scores(
        torch.tensor([3.0, 1.0]), torch.tensor([1.0, 4.0])
    ).tolist() == [2.0, -3.0]
    assert clip_scores(torch.tensor([12.0, -12.0, 3.0]), 10.0).tolist() == [10.0, -10.0, 3.0]


def test_score_lands_on_the_last_response_token() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, math.nan], [-1.0, 9.0, 9.0], [1.0, 1.0, 1.0]])
    ref_logprobs = torch.tensor([[-3.0, -1.0, 0.0], [-1.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    scores = torch.tensor([10.0, -5.0, math.nan])  # the last row only fills up the batch
    rewards = shape_rewards(scores, logprobs, ref_logprobs, mask, beta=0.5)
    # Row 0: k1 = 2, -1 -> -1, 0.5 + 10. Row 1: k1 = 0.5 -> -0.25 - 5.
    assert rewards.tolist() == [[-1.0, 10.5, 0.0], [-5.25, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_leave_one_out_by_hand() -> None:
    # Group 1, 2, 6: the others' means are 4, 3.5, 1.5. Group 5, 5, 5: nothing to tell them apart.
    advantages = leave_one_out(torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0]), size=3)
    assert advantages.tolist() == [-3.0, -1.5, 4.5, 0.0, 0.0, 0.0]


def test_group_relative_by_hand() -> None:
    rewards = torch.tensor([1.0, 3.0, 10.0, 10.0])
    # Group 1, 3: mean 2, distances -1 and 1, standard deviation sqrt(2). Group 10, 10: 0 / 1e-4.
    expected = torch.tensor([-1.0, 1.0, 0.0, 0.0]) / (math.sqrt(2) + 1e-4)
    torch.testing.assert_close(group_relative(rewards, size=2, divide=True), expected)
    assert group_relative(rewards, size=2, divide=False).tolist() == [-1.0, 1.0, 0.0, 0.0]


def test_rewards_that_differ_by_rounding_give_no_group_an_advantage() -> None:
    rewards = torch.tensor([0.3, 0.3 + 3e-8, 0.3 - 3e-8, 0.3])
    assert group_relative(rewards, size=4, divide=True).abs().max() < 1e-3


def test_rewards_to_go_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 99.0]])
    # 4; 2 + 4 / 2 = 4; 1 + 4 / 2 = 3. The second row has two tokens: 16; 8 + 16 / 2 = 16.
    assert rewards_to_go(rewards, MASK, gamma=0.5).tolist() == [[3.0, 4.0, 4.0], [16.0, 16.0, 0.0]]


def test_a_penalty_by_another_estimator() -> None:
    logprobs, ref_logprobs = torch.tensor([[-1.0, -3.0]]), torch.tensor([[-2.0, -1.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    # d = 1, -2: d^2 / 2 = 0.5, 2.
    rewards = shape_rewards(torch.tensor([10.0]), logprobs, ref_logprobs, mask, 0.5, "k2")
    assert rewards.tolist() == [[-0.25, 9.0]]
