"""Masks by length and masked statistics, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_exp.algo.masks import masked_mean, masked_sum, masked_var, response_mask


def test_response_mask_is_a_prefix() -> None:
    mask = response_mask(torch.tensor([2, 0, 3]), 3)
    assert mask.tolist() == [[True, True, False], [False, False, False], [True, True, True]]


def test_statistics_ignore_what_is_masked_out_even_nan() -> None:
    x = torch.tensor([[1.0, 2.0, math.nan], [6.0, math.inf, 100.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    # 1, 2, 6: sum 9, mean 3, squared distances 4 + 1 + 9 = 14.
    assert masked_sum(x, mask).item() == 9.0
    assert masked_mean(x, mask).item() == 3.0
    assert masked_var(x, mask).item() == pytest.approx(14 / 3)
    assert masked_var(x, mask, unbiased=True).item() == pytest.approx(14 / 2)


def test_weights_count_as_often_as_they_say() -> None:
    x = torch.tensor([1.0, 4.0, 9.0])
    weights = torch.tensor([1.0, 0.5, 0.0])
    assert masked_sum(x, weights).item() == 3.0  # 1 + 0.5 * 4
    assert masked_mean(x, weights).item() == 2.0  # 3 / 1.5


def test_an_empty_mask_gives_zero() -> None:
    x, mask = torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool)
    assert masked_mean(x, mask).item() == 0.0
    assert masked_var(x, mask).item() == 0.0
    assert masked_var(x, mask, unbiased=True).item() == 0.0
