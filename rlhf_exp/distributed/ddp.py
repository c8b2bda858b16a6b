"""The strategies that keep the full module in every process: one process alone, and DDP."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from rlhf_exp.distributed.strategy import (
    FULL_LAYOUT,
    OptimizerState,
    check_parameter_names,
    clip_and_step,
    full_states,
    load_state_by_name,
    state_by_name,
    trainable,
)


class SingleProcess:
    """Training in one process, without a wrapper."""

    layout = FULL_LAYOUT

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
        """See `Strategy`."""

    def backward(self, loss: Tensor) -> None:
        """See `Strategy`."""
        loss.backward()

    def step(self) -> float:
        """See `Strategy`."""
        return clip_and_step(self._trainable, self.optimizer, self._grad_norm)

    def gathered(self) -> AbstractContextManager[None]:
        """See `Strategy`: the parameters are always full."""
        return nullcontext()

    def weights(self) -> dict[str, Tensor]:
        """See `Strategy`."""
        if not self.main:
            return {}
        return {name: p.detach().cpu().clone() for name, p in trainable(self.module).items()}

    def state(self) -> dict[str, Any]:
        """See `Strategy`."""
        return {"parameters": state_by_name(self.module, self.optimizer)} if self.main else {}

    def load(self, weights: Mapping[str, Tensor], saved: OptimizerState) -> None:
        """See `Strategy`; any number of processes may have written it."""
        load_state_by_name(self.module, self.optimizer, full_states(saved))
        self._copy_weights(weights)

    def release(self, weights: Mapping[str, Tensor] | None, everywhere: bool) -> None:
        """See `Strategy`."""
        if weights is not None:
            self._copy_weights(weights)

    @torch.no_grad()
    def _copy_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name, target in check_parameter_names(self.module, weights).items():
            target.copy_(weights[name])


class _WithUnused(nn.Module):
    """A module beside a parameter that nothing reads.

    With `find_unused_parameters`, DDP warns in every process if all parameters are used.
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
        # Buffers are not synchronised: none changes in training, and a forward pass without
        # gradients then needs no communication. The option's name is newer than torch 2.11.
        options = inspect.signature(DistributedDataParallel).parameters
        newer = "forward_sync_buffers" in options
        unsynchronised: dict[str, Any] = {
            "forward_sync_buffers" if newer else "broadcast_buffers": False
        }
        self._ddp = DistributedDataParallel(
            _WithUnused(module).to(device),
            device_ids=None if device.type == "cpu" else [device],
            **unsynchronised,
            gradient_as_bucket_view=True,
            # Otherwise DDP rebuilds its buckets after the first backward pass, which changes the
            # order in which the gradients of three or more processes are added up: a resumed run
            # would differ in its last bits from one that was not interrupted.
            find_unused_parameters=True,
        )
        self.wrapped = self._ddp

    def begin(self, last: bool) -> None:
        """See `Strategy`."""
        self._ddp.require_backward_grad_sync = last  # as DDP's `no_sync` does
