"""What is reported of one iteration's experience.

B rollouts of this process, T response tokens.
"""

from __future__ import annotations

import math

from torch import Tensor

from rlhf_exp.algo.kl import k1, k3, sequence_kl
from rlhf_exp.batch import Finish, Samples
from rlhf_exp.distributed.world import World
from rlhf_exp.engines.native.meters import Meters


def report_scores(raw: Tensor, weights: Tensor, meters: Meters) -> None:
    """Report the raw scores [B]."""
    meters.add("reward/mean", (raw * weights).sum(), weights.sum())
    meters.spread("reward/std", raw, weights)
    meters.keep("reward/histogram", raw, weights)
    without = weights == 0  # perhaps all rows of this process
    meters.extreme("reward/min", raw.masked_fill(without, math.inf).min(), largest=False)
    meters.extreme("reward/max", raw.masked_fill(without, -math.inf).max(), largest=True)


def report_kl(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    entropy: Tensor,
    mask: Tensor,
    weights: Tensor,
    meters: Meters,
) -> None:
    """Report divergence and entropy of one iteration."""
    tokens = mask.sum()
    for name, estimator in (("kl/k1", k1), ("kl/k3", k3)):
        values = estimator(logprobs, ref_logprobs)
        meters.add(name, (values * mask).sum(), tokens)
    whole = sequence_kl(logprobs, ref_logprobs, mask)
    meters.keep("kl/histogram", whole, weights)
    meters.add("kl/sequence", (whole * weights).sum(), weights.sum())
    meters.add("policy/entropy", (entropy * mask).sum(), tokens)


def report_values(
    values: Tensor, returns: Tensor, mask: Tensor, meters: Meters, world: World
) -> None:
    """Report mean and explained variance of the values [B, T]."""
    meters.add("value/mean", (values * mask).sum(), mask.sum())
    residual = moments(returns - values, mask, world)[1].square()
    total = moments(returns, mask, world)[1].square()
    meters.add("value/explained_variance", 1.0 - residual / total.clamp_min(1e-8), 1.0)


def report_responses(samples: Samples, weights: Tensor, meters: Meters) -> None:
    """Report lengths and how responses ended."""
    count = weights.sum()
    lengths = (samples.response_lengths * weights).sum()
    meters.add("response/length_mean", lengths, count)
    for name, reason in (("eos", Finish.EOS), ("stop", Finish.STOP)):
        ended = ((samples.finish == reason) * weights).sum()
        meters.add(f"response/{name}_fraction", ended, count)


def moments(values: Tensor, mask: Tensor, world: World) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of masked values over all processes."""
    count = world.sum(mask.sum().double())
    mean = world.sum((values.double() * mask).sum()) / count
    variance = world.sum(((values.double() - mean).square() * mask).sum()) / count
    return mean.float(), variance.sqrt().float()
