"""What was sampled is scored alike from the sampler's states and from its token ids."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from rlhf_exp.batch import Finish, Prompts, Samples
from rlhf_exp.data.codec import Codec
from rlhf_exp.distributed.world import world_of
from rlhf_exp.engines.native.sample_scores import SharedTrunkScorer, score_samples
from rlhf_exp.engines.native.scoring import ModelScorer
from rlhf_exp.models.architecture import Architecture
from rlhf_exp.models.families import decoder_parts
from rlhf_exp.models.load import build_causal_lm
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.reward_model import RewardModel
from rlhf_exp.models.shared import adopt_trunk
from rlhf_exp.rollout.sampler import Sampling, sample

EOS = 23  # which half of the rows say
CODEC = cast(Codec, SimpleNamespace(eos_id=EOS))
SHAPE = Architecture("gpt_neox", 4, 32, 4, 64, 40, 48)


def model() -> Any:
    found = build_causal_lm(SHAPE, seed=0, eos_id=EOS, pad_id=EOS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return found


def reward_model() -> RewardModel:
    reward = RewardModel(model(), train_blocks=1)
    with torch.no_grad():
        for parameter in reward.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    return reward


def sampled(policy: Policy) -> Samples:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([5, 2, 9, 1, 7, 3])
    tokens = torch.randint(8, 40, (6, 9), generator=generator)
    numbers = torch.arange(6)
    block = decoder_parts(policy.model).blocks[2]
    return sample(
        policy.model,
        Prompts(tokens, lengths, index=numbers, rollout=numbers),
        Sampling(max_new_tokens=12, temperature=1.0, batch=4, eos_id=EOS, pad_id=EOS),
        seed=2,
        capture=block,
        close=EOS,
    )


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_states_and_token_ids_give_the_same_scores(batch: int) -> None:
    policy = Policy(model(), train_blocks=2)
    samples = sampled(policy)
    assert {Finish.EOS, Finish.LENGTH} <= set(samples.finish.tolist())
    with world_of("float32", threads=1) as world:
        expected = score_samples(ModelScorer(reward_model(), CODEC, None, world, 3, 48), samples)
        reward = reward_model()
        branch = adopt_trunk(reward, policy)
        assert branch is not None
        scorer = SharedTrunkScorer(reward, branch, CODEC, world, batch, 48)
        # No forward pass over token ids: they would not be what is tested.
        reward.trunk = cast(Any, None)
        found = score_samples(scorer, samples)
    assert expected.std() > 0.01
    assert (found - expected).abs().max() < 1e-5


def test_rows_that_lose_their_start_are_scored_from_token_ids() -> None:
    policy = Policy(model(), train_blocks=2)
    samples = sampled(policy)
    longest = int((samples.prompt_lengths + samples.content_lengths).max())
    with world_of("float32", threads=1) as world:
        for room in (longest, longest + 1):
            plain = ModelScorer(reward_model(), CODEC, None, world, 3, room)
            reward = reward_model()
            branch = adopt_trunk(reward, policy)
            assert branch is not None
            scorer = SharedTrunkScorer(reward, branch, CODEC, world, 3, room)
            found, expected = score_samples(scorer, samples), score_samples(plain, samples)
            assert (found - expected).abs().max() < 1e-5
