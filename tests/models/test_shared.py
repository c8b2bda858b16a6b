"""A reward model over the policy's trunk: the same scores, the trunk held once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_exp.models.families import decoder_parts
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.reward_model import RewardModel
from rlhf_exp.models.shared import adopt_trunk, read_scores

Build = Callable[..., PreTrainedModel]
Batch = dict[str, Tensor]


def trained_reward(model: PreTrainedModel, blocks: int) -> RewardModel:
    """A reward model whose last blocks and final norm have moved away from `model`'s."""
    reward = RewardModel(model, train_blocks=blocks, seed=3)
    with torch.no_grad():
        for parameter in reward.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.3)
    reward.set_normalisation(0.7, 1.0)
    return reward.eval()


@pytest.mark.parametrize("reward_blocks", [1, 2])
def test_scores_over_the_policys_states_are_the_reward_models_own(
    tiny: Build, family: str, rows: Batch, reward_blocks: int
) -> None:
    policy = Policy(tiny(family), train_blocks=2)
    lengths = rows["prompt_lengths"] + rows["response_lengths"]
    expected = trained_reward(tiny(family), reward_blocks).scores(rows["tokens"], lengths)
    shared = trained_reward(tiny(family), reward_blocks)
    branch = adopt_trunk(shared, policy)
    assert branch is not None
    states = policy.trunk_states(rows["tokens"])
    found = read_scores(shared, branch, states, lengths - 1)
    assert (found - expected).abs().max() < 2e-5
    # Token ids still go the whole way, through the policy's blocks.
    assert (shared.scores(rows["tokens"], lengths) - expected).abs().max() < 2e-5
    held = {id(p) for p in policy.parameters()}
    own = [p for p in shared.parameters() if id(p) not in held]
    parts = decoder_parts(tiny(family))
    above = sum(p.numel() for block in parts.blocks[2:] for p in block.parameters())
    above += sum(p.numel() for p in parts.norm.parameters()) + 32  # the head
    assert sum(p.numel() for p in own) == above


def test_what_is_not_the_same_is_not_shared(tiny: Build, family: str) -> None:
    def adopted(reward: RewardModel, blocks: int | None = 2) -> bool:
        before = [id(module) for module in reward.modules()]
        branch = adopt_trunk(reward, Policy(tiny(family), train_blocks=blocks))
        assert (branch is None) == (before == [id(module) for module in reward.modules()])
        return branch is not None

    assert adopted(trained_reward(tiny(family), 2))
    assert not adopted(trained_reward(tiny(family), 2), None), "nothing of the policy is frozen"
    assert not adopted(trained_reward(tiny(family), 2), 4), "no block of the policy is frozen"
    assert not adopted(trained_reward(tiny(family), 3)), "it trained a block of the policy's trunk"
    assert not adopted(trained_reward(tiny(family, seed=1), 2)), "another model"
    half = RewardModel(tiny(family).to(torch.bfloat16), train_blocks=2)
    assert not adopted(half), "another number format"
    other = trained_reward(tiny(family), 2)
    with torch.no_grad():
        decoder_parts(other.trunk).embedding.weight[5, 3] += 1e-6
    assert not adopted(other), "one number differs"
    wider = trained_reward(tiny(family, context=64), 2)
    assert not adopted(wider), "another config"
