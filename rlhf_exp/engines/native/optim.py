"""AdamW with weight decay on matrices only, and the learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rlhf_exp.algo.schedules import Schedule, lr_multiplier


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
