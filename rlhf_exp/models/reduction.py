"""What gradients take in memory, with what it takes to reduce them and to fetch weights."""

from __future__ import annotations

from typing import NamedTuple

from rlhf_exp.models.workload import Precision, Sharding

BUCKET = 200_000_000
"""Most gradients that DeepSpeed is told to reduce at a time; it keeps a buffer of this size."""

PREFETCH = 50_000_000
"""Most weights that DeepSpeed's ZeRO 3 fetches at a time: its default."""


class Reduction(NamedTuple):
    """Bytes of gradients and of what reducing them takes.

    Attributes:
        held: through the backward pass.
        copies: for a moment beside them.
        at_the_end: whether that moment is outside of forward and backward pass.
        host: of host memory.
    """

    held: int
    copies: int = 0
    at_the_end: bool = True
    host: int = 0


def reduction_of(
    trained: int,
    stored: int,
    live: int,
    precision: Precision,
    sharding: Sharding,
    accumulates: bool,
) -> Reduction:
    """Return what gradients take, and fetching weights in ZeRO 3.

    Seen in DeepSpeed 0.19, tensor by tensor: it copies each gradient into a bucket. A full bucket,
    or what there is at the end, is copied once more (`torch.cat`) and reduced; what this process
    steps is added to its part.
    """
    divided = sharding.gradients or sharding.weights
    # Parts of gradients are added up in float32, whatever they are reduced in.
    part = share_of(trained, sharding, divided) * (4 if divided else precision.gradient)
    if not sharding.bucket:
        fetched = min(live, trained) * precision.gradient if sharding.blocks else 0
        return Reduction(part + fetched)
    bucket = min(BUCKET, trained) * precision.gradient
    here, away = (0, part) if sharding.offload else (part, 0)
    if not divided:
        # ZeRO 1 fills the bucket after the backward pass, from gradients that are all there.
        return Reduction(part, bucket, host=away // sharding.processes)
    if sharding.weights:
        # Weights arrive in one flat buffer, and are copied out of it. When they are stepped, the
        # gradients of the part are copied into one tensor. Offloaded, both are there for good.
        arriving = min(PREFETCH, stored) * precision.gathered
        copies = max(bucket, arriving, here)
        at_the_end = trained <= BUCKET and stored <= PREFETCH
        return Reduction(bucket + here, copies, at_the_end, host=2 * away)
    if trained > BUCKET or accumulates:
        return Reduction(bucket + here, max(bucket, here), trained <= BUCKET, host=away)
    # One bucket: the part comes into being when it is reduced, in float32 after the copy is gone.
    copies = max(bucket, here) if precision.gradient == 4 else bucket + here
    return Reduction(bucket, copies, host=away)


def share_of(parameters: int, sharding: Sharding, divided: bool) -> int:
    """Return how many of some parameters one process has, if they are divided at all."""
    return -(-parameters // sharding.processes) if divided or sharding.weights else parameters
