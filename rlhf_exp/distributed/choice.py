"""From a strategy's name to the strategy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from rlhf_exp.distributed.strategy import Strategy


@dataclass(frozen=True)
class Setup:
    """How what trains is spread over the processes.

    Attributes:
        strategy: `single`, `ddp`, `zero1`, `zero2`, `zero3` or `fsdp`.
        precision: `float32` or `bfloat16`, of matrix products.
        offload: Whether optimizer state and parameters live in host memory.
    """

    strategy: str
    precision: str
    offload: bool = False

    @property
    def deepspeed(self) -> bool:
        """Whether DeepSpeed does it."""
        return self.strategy.startswith("zero")

    @property
    def half_weights(self) -> bool:
        """Whether forward passes see bfloat16 weights, with float32 ones behind them."""
        return self.precision == "bfloat16" and self.strategy not in ("single", "ddp")


def strategy_for(
    setup: Setup,
    module: nn.Module,
    build: Callable[[], torch.optim.Optimizer],
    grad_norm: float,
    device: torch.device,
) -> Strategy:
    """Return the strategy that `setup` names, over `module` and the optimizer that `build` makes.

    Libraries are imported only where they are asked for.
    """
    if setup.strategy in ("single", "ddp"):
        from rlhf_exp.distributed.whole import DataParallel, Single

        whole = Single if setup.strategy == "single" else DataParallel
        return whole(module, build(), grad_norm, device)
    if setup.strategy == "fsdp":
        from rlhf_exp.distributed.fsdp import FullySharded

        return FullySharded(module, build, grad_norm, device, setup.half_weights, setup.offload)
    from rlhf_exp.distributed.zero import Zero
    from rlhf_exp.distributed.zero3 import Zero3

    stage = int(setup.strategy.removeprefix("zero"))
    kind = Zero3 if stage == 3 else Zero
    return kind(module, build(), grad_norm, device, setup.half_weights, setup.offload, stage)
