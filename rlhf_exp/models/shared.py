"""A reward model over the policy's frozen trunk.

A reward model that began as the SFT policy and trained only its top blocks has, below them, the
weights that the policy has below its own. They need to be held once, and the states that the policy
computes while it samples serve the reward model, too: scoring then costs the top blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_exp.models.branch import Branch
from rlhf_exp.models.families import DecoderParts, decoder_parts
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.reward_model import RewardModel

# Of a config: what says nothing about how hidden states are computed.
_ASIDE = frozenset(
    (
        *("architectures", "_name_or_path", "transformers_version", "dtype", "torch_dtype"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "use_cache"),
        *("id2label", "label2id", "problem_type"),
    )
)


def adopt_trunk(reward: RewardModel, policy: Policy) -> Branch | None:
    """Put the policy's frozen blocks in the place of `reward`'s, if they are the same.

    Args:
        reward: A model of its own; changed in place.
        policy: With a frozen trunk, or without.

    Returns:
        What of `reward` is above the policy's trunk; `None` where it cannot be shared.
    """
    if not policy.cut:
        return None
    ours, theirs = decoder_parts(reward.trunk), decoder_parts(policy.model)
    count = len(ours.blocks)
    if _computed(ours.base) != _computed(theirs.base) or not _same(ours, theirs, policy.cut):
        return None
    for number in range(policy.cut):
        ours.blocks[number] = theirs.blocks[number]
    ours.base.set_input_embeddings(theirs.embedding)
    if ours.positions is not None:
        setattr(ours.base, ours.positions, getattr(theirs.base, ours.positions))
    return Branch.of(reward.trunk, count - policy.cut, share=True)


def read_scores(reward: RewardModel, branch: Branch, states: Tensor, last: Tensor) -> Tensor:
    """Return scores [B] float32 from states that enter the branch.

    Args:
        reward: The reward model.
        branch: Its top blocks.
        states: [B, S, D], right-padded.
        last: [B] int64, where the score is read.
    """
    if branch.reads:
        return reward.score_of(branch.read(states, last.unsqueeze(1))[:, 0])
    return reward.score_of(branch(states)[torch.arange(len(last), device=last.device), last])


def _computed(base: PreTrainedModel) -> dict[str, Any]:
    return {name: value for name, value in base.config.to_dict().items() if name not in _ASIDE}


def _same(ours: DecoderParts, theirs: DecoderParts, cut: int) -> bool:
    pairs: list[tuple[nn.Module, nn.Module]] = [(ours.embedding, theirs.embedding)]
    pairs += zip(ours.blocks[:cut], theirs.blocks[:cut], strict=True)
    if ours.positions is not None:
        pairs.append((getattr(ours.base, ours.positions), getattr(theirs.base, ours.positions)))
    return all(_equal(one, other) for one, other in pairs)


def _equal(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two modules hold the same values in the same number format."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        value.dtype == second[name].dtype and torch.equal(value.cpu(), second[name].cpu())
        for name, value in first.items()
    )
