"""Sampling in a stage: the rollout engine that the config asks for, and requests to it."""

from __future__ import annotations

import torch

from rlhf_exp.config.experiment import Config, Dtype
from rlhf_exp.config.training import CORRECTION_AUTO, CORRECTION_LIMIT, GenerationConfig
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.distributed.world import World
from rlhf_exp.models.policy import Policy
from rlhf_exp.rollout.engine import RolloutEngine, RolloutRequest
from rlhf_exp.rollout.native_engine import NativeEngine
from rlhf_exp.rollout.sampler import SamplingParams
from rlhf_exp.rollout.transcript import Stopper
from rlhf_exp.stages.setup import cache_of


def rollout_engine(policy: Policy, world: World) -> RolloutEngine:
    """Return the engine that samples from `policy` while it trains.

    Args:
        policy: Who answers; its frozen weights in the number format that they compute in.
        world: Device and precision.
    """
    replicated = world.setup.strategy in ("single", "ddp")
    half = world.setup.precision == "bfloat16" and replicated
    return NativeEngine(policy, torch.bfloat16 if half else None, world.autocast)


def rollout_request(
    config: Config,
    codec: Codec,
    seed: int,
    section: GenerationConfig | None = None,
    capture: bool = False,
    close: bool = False,
) -> RolloutRequest:
    """Return a request for answers as a `generation` section says.

    Args:
        config: The experiment.
        codec: Of the policy.
        seed: Of the noise.
        section: The section; PPO's by default.
        capture: Whether to keep the states entering the first training block, where these are
            exact enough to train on.
        close: Whether to keep the state of an end-of-sequence token after each answer, too, where a
            reward model over the policy's trunk reads its score.
    """
    section = section or config.ppo.generation
    params = SamplingParams(
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature,
        batch=section.batch,
        eos_id=codec.eos_id,
        end_ids=codec.end_ids,
        pad_id=codec.pad_id,
        cache=cache_of(config),
    )
    return RolloutRequest(
        params,
        seed,
        Stopper(codec.tokenizer, codec.stop_strings),
        capture=capture and exact(config),
        close=codec.eos_id if close else None,
    )


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
