"""Answers to validation prompts by the policy as it is, with their KL to the reference.

The same prompts are answered with the same noise each time, so that two evaluations differ by the
policy alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_exp.batch import FinishReason, Samples
from rlhf_exp.config.training import GenerationConfig
from rlhf_exp.data.batching import prompts_batch
from rlhf_exp.data.tokenized import TokenizedPrompts
from rlhf_exp.distributed.world import World
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.reference import Reference, sampled_kl
from rlhf_exp.rollout.sampler import Sampler
from rlhf_exp.training.metrics import MetricAccumulator


class SampledAnswers(NamedTuple):
    """This process's answers.

    Attributes:
        samples: B answers, filled up to the number of the other processes'.
        rows: [B] int64, numbers of their prompts.
        weights: [B] float32, 0 for an answer that only fills up.
        kl: [B] float32, sum of log pi - log pi_ref over each answer, in nats.
    """

    samples: Samples
    rows: np.ndarray
    weights: Tensor
    kl: Tensor


@torch.no_grad()
def sample_answers(
    policy: Policy,
    reference: Reference,
    sampler: Sampler,
    prompts: TokenizedPrompts,
    count: int,
    section: GenerationConfig,
    world: World,
    meters: MetricAccumulator,
) -> SampledAnswers:
    """Answer the first prompts, and report KL, lengths and how many answers ended.

    Args:
        policy: Who answers.
        reference: The frozen reference.
        sampler: Samples from the policy.
        prompts: The validation prompts.
        count: Number of prompts, over all processes.
        section: Sampling.
        world: The processes.
        meters: For the metrics.
    """
    share = world.share(count)
    batch = prompts_batch(prompts, share.rows, np.asarray(share.rows))
    samples = sampler(batch.to(world.device))
    weights = torch.from_numpy(share.weights).to(world.device)
    kl = sampled_kl(policy, reference, samples, section.temperature, section.batch, world.autocast)
    total = weights.sum()
    meters.add("eval/kl_sequence", (kl * weights).sum(), total)
    meters.add("eval/length_mean", (samples.response_lengths * weights).sum(), total)
    ended = (samples.finish != FinishReason.LENGTH) * weights
    meters.add("eval/ended_fraction", ended.sum(), total)
    return SampledAnswers(samples, share.rows, weights, kl)
