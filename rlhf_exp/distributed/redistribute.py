"""Redistribution of rows between processes: each gets an equal share of any selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, distributed
from torch.nn.functional import pad

from rlhf_exp.batch import Batch, Rollouts, to_device
from rlhf_exp.distributed.world import World

BatchT = TypeVar("BatchT", bound=Batch)


def redistribute(batch: BatchT, shares: np.ndarray, world: World) -> BatchT:
    """Return this process's share of a global batch.

    Args:
        batch: [B] rows of this process: rows `rank * B` to `rank * B + B - 1` of the global batch.
            All processes have as many, and tensors of the same widths.
        shares: [processes, n] int64 row numbers in the global batch, those that each process gets;
            the same in every process.
        world: The processes.
    """
    if world.processes == 1:
        return batch.select(to_device(torch.from_numpy(shares[0].copy()), world.device))
    rows_each, rank = len(batch), world.rank
    # Rows that this process sends, by receiver; processes that send, by row of this one's share.
    sent = [rows[rows // rows_each == rank] - rank * rows_each for rows in shares]
    senders = shares[rank] // rows_each
    received_sizes = np.bincount(senders, minlength=world.processes).tolist()
    sent_sizes = [len(rows) for rows in sent]
    # Rows arrive sorted by sender, and the share is in another order.
    order = np.argsort(np.argsort(senders, kind="stable"), kind="stable")
    numbers = to_device(torch.from_numpy(np.concatenate([order, *sent])), world.device)
    order_index, sent_rows = numbers[: len(order)], numbers[len(order) :]

    def move(values: Tensor) -> Tensor:
        plain = values.view(torch.uint8) if values.dtype == torch.bool else values
        arrived = plain.new_empty(len(senders), *plain.shape[1:])
        outgoing = plain.index_select(0, sent_rows)
        distributed.all_to_all_single(arrived, outgoing, received_sizes, sent_sizes)
        return arrived.index_select(0, order_index).view(values.dtype)

    return batch.map(move)


def pad_to_common_widths(rollouts: Rollouts, world: World) -> Rollouts:
    """Pad rollouts to the longest sequence and the longest response of all processes, with 0."""
    widths = world.all_gather_object((rollouts.tokens.shape[1], rollouts.mask.shape[1]))
    tokens, responses = (max(column) for column in zip(*widths, strict=True))

    def widen(values: Tensor) -> Tensor:
        if values.ndim == 1:
            return values
        over_sequence = values is rollouts.tokens or values is rollouts.states
        missing = (tokens if over_sequence else responses) - values.shape[1]
        return pad(values, (0, 0) * (values.ndim - 2) + (0, missing)) if missing else values

    return rollouts.map(widen)


@dataclass(frozen=True)
class HostLengths:
    """Lengths of rows on the host, which then need not wait for the device to plan with them.

    Attributes:
        prompts: [N] int64.
        responses: [N] int64.
    """

    prompts: np.ndarray
    responses: np.ndarray

    @property
    def whole(self) -> np.ndarray:
        """Tokens of prompt and response [N]."""
        return self.prompts + self.responses

    def __getitem__(self, rows: np.ndarray | slice) -> HostLengths:
        """Return the lengths of some rows."""
        return HostLengths(self.prompts[rows], self.responses[rows])


def host_lengths(rollouts: Rollouts, world: World) -> HostLengths:
    """Return the lengths of all processes' rollouts."""
    own = torch.stack([rollouts.prompt_lengths, rollouts.response_lengths]).cpu().numpy()
    return HostLengths(*np.concatenate(world.all_gather_object(own), axis=1))
