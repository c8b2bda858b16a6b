"""Sampling while a stage trains: the config's `generation` section, the codec's stop rules."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from rlhf_exp.batch import Prompts, Samples
from rlhf_exp.config.experiment import Config, Dtype
from rlhf_exp.config.training import CORRECTION_AUTO, CORRECTION_LIMIT, GenerationConfig
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.distributed.world import World
from rlhf_exp.models.frozen_trunk import decoder_parts
from rlhf_exp.models.policy import Policy
from rlhf_exp.rollout.sampler import SamplingParams, sample
from rlhf_exp.rollout.transcript import Stopper
from rlhf_exp.stages.setup import cache_of


def sampler_for(
    config: Config,
    policy: Policy,
    codec: Codec,
    world: World,
    seed: int,
    capture: bool,
    close: bool = False,
    section: GenerationConfig | None = None,
) -> Callable[[Prompts], Samples]:
    """Return a function that answers prompts as a `generation` section says.

    Args:
        config: The experiment.
        policy: Who answers.
        codec: Of the policy.
        world: Device and precision.
        seed: Of the noise.
        capture: Whether to keep the states entering the first training block, where these are
            exact enough to train on.
        close: Whether to keep the state of an end-of-sequence token after each answer, too, where a
            reward model over the policy's trunk reads its score.
        section: The section; PPO's by default.
    """
    section = section or config.ppo.generation
    settings = SamplingParams(
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature,
        batch=section.batch,
        eos_id=codec.eos_id,
        end_ids=codec.end_ids,
        pad_id=codec.pad_id,
        cache=cache_of(config),
    )
    stopper = Stopper(codec.tokenizer, codec.stop_strings)
    block: nn.Module | None = None
    if capture and exact(config) and policy.frozen_blocks is not None:
        block = decoder_parts(policy.model).blocks[policy.frozen_blocks]

    end = codec.eos_id if close else None

    def answer(prompts: Prompts) -> Samples:
        with world.autocast():
            return sample(policy.model, prompts, settings, seed, stopper, block, end)

    return answer


def exact(config: Config) -> bool:
    """Whether decoding and a full forward agree: to 1e-4 in fp32, but to 0.02 nats in bf16."""
    return config.computes_in is Dtype.float32


def correction_of(config: Config) -> float | None:
    """Return the largest importance weight of a token in PPO; `None`: all are 1.

    By default weights make up for whatever is more than rounding between sampler and policy.
    """
    section = config.ppo.generation
    if section.correction != CORRECTION_AUTO:
        return section.correction_limit
    return None if exact(config) else CORRECTION_LIMIT
