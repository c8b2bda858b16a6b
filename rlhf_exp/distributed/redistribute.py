"""Trading rows between processes, so that each has an equal part of any selection of them."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, distributed
from torch.nn.functional import pad

from rlhf_exp.batch import Rollouts, Rows
from rlhf_exp.distributed.world import World

Batch = TypeVar("Batch", bound=Rows)


def same_widths(rollouts: Rollouts, world: World) -> Rollouts:
    """Pad an iteration's rollouts to the widest of all processes; what is added means nothing."""
    widths = world.all_gather_object((rollouts.tokens.shape[1], rollouts.mask.shape[1]))
    tokens, responses = (max(column) for column in zip(*widths, strict=True))

    def widen(values: Tensor) -> Tensor:
        if values.ndim == 1:
            return values
        whole = values is rollouts.tokens or values is rollouts.states
        missing = (tokens if whole else responses) - values.shape[1]
        return pad(values, (0, 0) * (values.ndim - 2) + (0, missing)) if missing else values

    return rollouts.map(widen)


def redistribute(batch: Batch, chosen: np.ndarray, world: World) -> Batch:
    """Return this process's share of the rows `chosen` of a global batch, as `World.share` deals.

    Args:
        batch: [B] rows of this process: `rank * B` and on of the global batch. All processes have
            as many, and tensors of the same widths.
        chosen: [M] int64 numbers of rows of the global batch, the same in every process.
        world: The processes.
    """
    if world.processes == 1:
        return batch.select(torch.from_numpy(chosen.copy()))
    each, rank = len(batch), world.rank
    wanted = [chosen[world.share(len(chosen), of).rows] for of in range(world.processes)]
    given = [rows[rows // each == rank] - rank * each for rows in wanted]
    holders = wanted[rank] // each
    came = np.bincount(holders, minlength=world.processes).tolist()
    # What comes is sorted by who sent it; the share is not.
    places = torch.from_numpy(np.argsort(np.argsort(holders, kind="stable"), kind="stable"))
    leaving = torch.from_numpy(np.concatenate(given))

    def move(values: Tensor) -> Tensor:
        plain = values.view(torch.uint8) if values.dtype == torch.bool else values
        arrived = plain.new_empty(len(holders), *plain.shape[1:])
        sizes = [len(rows) for rows in given]
        distributed.all_to_all_single(arrived, plain[leaving].contiguous(), came, sizes)
        return arrived[places].view(values.dtype)

    return batch.map(move)
