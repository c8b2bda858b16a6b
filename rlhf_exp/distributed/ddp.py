"""The strategies that keep a whole module in every process: one process alone, and DDP."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from rlhf_exp.distributed.strategy import (
    WHOLE,
    OptimizerState,
    check_names,
    clip_and_step,
    load_state_by_name,
    state_by_name,
    trainable,
    whole_states,
)


class SingleProcess:
    """One process, without any wrapper."""

    layout = WHOLE

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        grad_norm: float,
        device: torch.device,
    ) -> None:
        self.module, self.optimizer = module.to(device), optimizer
        self.wrapped = self.module
        self.main = True
        self._grad_norm = grad_norm
        self._trainable = list(trainable(module).values())

    def begin(self, last: bool) -> None:
        """See `StrategyName`."""

    def backward(self, loss: Tensor) -> None:
        """See `StrategyName`."""
        loss.backward()

    def step(self) -> float:
        """See `StrategyName`."""
        return clip_and_step(self._trainable, self.optimizer, self._grad_norm)

    def gathered(self) -> AbstractContextManager[None]:
        """See `StrategyName`: they always are."""
        return nullcontext()

    def weights(self) -> dict[str, Tensor]:
        """See `StrategyName`."""
        if not self.main:
            return {}
        return {name: p.detach().cpu().clone() for name, p in trainable(self.module).items()}

    def state(self) -> dict[str, Any]:
        """See `StrategyName`."""
        return {"parameters": state_by_name(self.module, self.optimizer)} if self.main else {}

    def load(self, weights: Mapping[str, Tensor], saved: OptimizerState) -> None:
        """See `StrategyName`; any number of processes may have written it."""
        load_state_by_name(self.module, self.optimizer, whole_states(saved))
        self._put(weights)

    def release(self, weights: Mapping[str, Tensor] | None) -> None:
        """See `StrategyName`."""
        if weights is not None:
            self._put(weights)

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, target in check_names(self.module, weights).items():
            target.copy_(weights[name])


class _WithUnused(nn.Module):
    """A module beside a parameter that nothing reads.

    Told to expect unused parameters, DDP warns in every process if there are none.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the module's
        """Call the module."""
        return self.module(*args, **kwargs)


class DataParallel(SingleProcess):
    """PyTorch's DDP: gradients are averaged while the backward pass runs."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        grad_norm: float,
        device: torch.device,
    ) -> None:
        super().__init__(module, optimizer, grad_norm, device)
        self.main = distributed.get_rank() == 0
        # No buffers are sent around: none changes in training, and a forward pass without gradients
        # is then free of communication.
        self._ddp = DistributedDataParallel(
            _WithUnused(module).to(device),
            device_ids=None if device.type == "cpu" else [device],
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
            # Otherwise the buckets are arranged anew after the first backward pass, and with them
            # the order in which the gradients of three or more processes are added up: a resumed
            # run would differ in its last bits from one that was not interrupted.
            find_unused_parameters=True,
        )
        self.wrapped = self._ddp

    def begin(self, last: bool) -> None:
        """See `StrategyName`."""
        self._ddp.require_backward_grad_sync = last  # what its `no_sync` sets
