"""PyTorch's fully sharded data parallel (FSDP2): each process keeps a part of every tensor.

Each decoder block is a unit: its parameters are whole only while it computes. Source: Zhao et al.
2023, https://arxiv.org/abs/2304.11277. In bfloat16 blocks are gathered in bfloat16; what a process
keeps, and gradients once they are added up, are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from rlhf_exp.distributed.strategy import (
    ROWS,
    Before,
    OptimizerState,
    check_names,
    clip_and_step,
    load_state_by_name,
    state_by_name,
    trainable,
    whole_states,
)
from rlhf_exp.models.frozen_trunk import decoder_parts


class FullySharded:
    """FSDP2 over the decoder blocks and, around them, the rest."""

    layout = ROWS

    def __init__(
        self,
        module: nn.Module,
        build: Callable[[], torch.optim.Optimizer],
        grad_norm: float,
        device: torch.device,
        half: bool,
        offload: bool,
    ) -> None:
        self.module = self.wrapped = module.to(device)
        self._grad_norm, self._device = grad_norm, device
        self._rank, self._processes = distributed.get_rank(), distributed.get_world_size()
        for parameter in module.parameters():
            distributed.broadcast(parameter.data, 0)
        self._before = Before(module)
        self._units = _shard(module, device, half, offload)
        self.optimizer = build()
        sharded = [isinstance(p, DTensor) for p in module.parameters()]
        assert all(sharded), f"FSDP sharded {sum(sharded)} of {len(sharded)} parameters"
        # Parameters may be gathered before the first forward pass, so the root has to know itself.
        root: Any = module
        register_fsdp_forward_method(root, "extra_repr")
        with torch.no_grad():
            root.extra_repr()
        del root.extra_repr
        root.reshard()

    def begin(self, last: bool) -> None:
        """See `StrategyName`: gradients are added up and sharded after each micro-batch."""

    def backward(self, loss: Tensor) -> None:
        """See `StrategyName`."""
        loss.backward()

    def step(self) -> float:
        """See `StrategyName`."""
        return clip_and_step(trainable(self.module).values(), self.optimizer, self._grad_norm)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """See `StrategyName`."""
        for unit in self._units:
            unit.unshard()
        try:
            with self._before.without_hooks():
                yield
        finally:
            self._reshard()

    def _reshard(self) -> None:
        """Let the module hold parts: the root stays whole after a forward pass without backward."""
        for unit in self._units:
            unit.reshard()

    def weights(self) -> dict[str, Tensor]:
        """See `StrategyName`."""
        self._reshard()
        found = {}
        for name, parameter in trainable(self.module).items():
            whole = self._whole(parameter)  # one at a time
            if self._rank == 0:
                found[name] = whole.cpu().clone()
        return found

    def state(self) -> dict[str, Any]:
        """See `StrategyName`."""
        self._reshard()
        states = state_by_name(self.module, self.optimizer)
        for state in states.values():
            for key, value in state.items():
                local = value.to_local() if isinstance(value, DTensor) else value
                state[key] = local.cpu().clone()
        return {"parameters": states}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], saved: OptimizerState) -> None:
        """See `StrategyName`; any number of processes may have written it."""
        mine = (saved.layout, saved.processes) == (ROWS, self._processes)
        states = saved.read(self._rank)["parameters"] if mine else whole_states(saved)
        for name, target in check_names(self.module, weights).items():
            assert isinstance(target, DTensor)
            target.to_local().copy_(self._part(weights[name]))
            for key, value in states.get(name, {}).items():
                if value.ndim:
                    part = value if mine else self._part(value)
                    states[name][key] = self._like(target, part)
        load_state_by_name(self.module, self.optimizer, states)

    def release(self, weights: Mapping[str, Tensor] | None) -> None:
        """See `StrategyName`."""
        self._reshard()
        given = weights or {}
        values = {
            name: given[name].to(self._device) if name in given else self._whole(parameter).clone()
            for name, parameter in self.module.named_parameters()
        }
        self._before.restore(values)

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        sharded = parameter.detach().to(self._device)
        assert isinstance(sharded, DTensor)
        return sharded.full_tensor()

    def _part(self, whole: Tensor) -> Tensor:
        """Return this process's rows of a tensor, perhaps none, as FSDP cuts it."""
        parts = whole.chunk(self._processes)
        return parts[self._rank] if self._rank < len(parts) else whole[:0]

    def _like(self, target: DTensor, local: Tensor) -> DTensor:
        return DTensor.from_local(
            local.to(target.to_local().device),
            target.device_mesh,
            target.placements,
            run_check=False,
            shape=target.shape,
            stride=target.stride(),
        )


def _shard(module: nn.Module, device: torch.device, half: bool, offload: bool) -> list[FSDPModule]:
    """Shard each decoder block and then the rest; return the units, the root first."""
    precision = MixedPrecisionPolicy(cast_forward_inputs=False)
    if half:
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    # On a CPU everything lives in host memory anyway.
    where = CPUOffloadPolicy() if offload and device.type != "cpu" else OffloadPolicy()
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    blocks = [
        block
        for child in module.children()
        if isinstance(child, PreTrainedModel)
        for block in decoder_parts(child).blocks
    ]
    for part in (*blocks, module):
        fully_shard(part, mesh=mesh, mp_policy=precision, offload_policy=where)
    units: list[FSDPModule] = [part for part in module.modules() if isinstance(part, FSDPModule)]
    assert len(units) == len(blocks) + 1, f"FSDP made {len(units)} units of {len(blocks)} blocks"
    return units
