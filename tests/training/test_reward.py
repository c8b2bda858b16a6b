"""The reward model's task: every pair is scored, however they fall into micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_exp.config.training import RewardConfig
from rlhf_exp.data.tokenized import RaggedArray, TokenizedPreferences
from rlhf_exp.distributed.world import world_of
from rlhf_exp.training.reward import pair_scores


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_pair_keeps_its_own_scores(size: int) -> None:
    """Also where the last micro-batch is one pair, which numpy would take for a plain number."""
    sides = [[5], [5, 6], [5, 6, 7]]
    pairs = TokenizedPreferences(
        RaggedArray.of([[1]] * 3), RaggedArray.of(sides), RaggedArray.of(sides), 0, 0
    )

    def score(
        pairs: TokenizedPreferences, rows: np.ndarray, weights: np.ndarray
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert rows.shape == weights.shape
        found = torch.tensor([float(len(pairs.chosen[row])) for row in rows])
        return found, -found, torch.from_numpy(weights)

    with world_of("float32", threads=1) as world:
        chosen, rejected = pair_scores(score, pairs, RewardConfig(batch=8, micro_batch=size), world)
    assert chosen.tolist() == [1.0, 2.0, 3.0]
    assert rejected.tolist() == [-1.0, -2.0, -3.0]
