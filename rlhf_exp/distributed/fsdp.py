"""PyTorch's fully sharded data parallel (FSDP2): each process keeps a part of every tensor.

Each decoder block is a unit: its parameters are gathered only while it computes. With bfloat16,
blocks are gathered in bfloat16; the parts that a process keeps, and the reduced gradients, are
float32. Source: Zhao et al. 2023, https://arxiv.org/abs/2304.11277.
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
    ROW_LAYOUT,
    ModuleSnapshot,
    OptimizerState,
    check_parameter_names,
    clip_and_step,
    full_states,
    load_state_by_name,
    state_by_name,
    trainable,
)
from rlhf_exp.models.frozen_trunk import decoder_parts


class FullySharded:
    """FSDP2 over the decoder blocks and, around them, the rest."""

    layout = ROW_LAYOUT

    def __init__(
        self,
        module: nn.Module,
        build_optimizer: Callable[[], torch.optim.Optimizer],
        grad_norm: float,
        device: torch.device,
        bf16: bool,
        offload: bool,
    ) -> None:
        self.module = self.wrapped = module.to(device)
        self._grad_norm, self._device = grad_norm, device
        self._rank, self._processes = distributed.get_rank(), distributed.get_world_size()
        for parameter in module.parameters():
            distributed.broadcast(parameter.data, 0)
        self._snapshot = ModuleSnapshot(module)
        self._units = _shard(module, device, bf16, offload)
        self.optimizer = build_optimizer()
        sharded = [isinstance(p, DTensor) for p in module.parameters()]
        assert all(sharded), f"FSDP sharded {sum(sharded)} of {len(sharded)} parameters"
        # Parameters may be gathered before the first forward pass, in which FSDP finds its root
        # module. A forward method without effect makes it do so now.
        root: Any = module
        register_fsdp_forward_method(root, "extra_repr")
        with torch.no_grad():
            root.extra_repr()
        del root.extra_repr
        root.reshard()

    def begin(self, last: bool) -> None:
        """See `Strategy`: gradients are added up and sharded after each micro-batch."""

    def backward(self, loss: Tensor) -> None:
        """See `Strategy`."""
        loss.backward()

    def step(self) -> float:
        """See `Strategy`."""
        return clip_and_step(trainable(self.module).values(), self.optimizer, self._grad_norm)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """See `Strategy`."""
        for unit in self._units:
            unit.unshard()
        try:
            with self._snapshot.without_hooks():
                yield
        finally:
            self._reshard()

    def _reshard(self) -> None:
        """Free gathered parameters: a forward pass without a backward pass leaves the root's."""
        for unit in self._units:
            unit.reshard()

    def weights(self) -> dict[str, Tensor]:
        """See `Strategy`."""
        self._reshard()
        weights = {}
        for name, parameter in trainable(self.module).items():
            full = self._full(parameter)  # one at a time, for memory
            if self._rank == 0:
                weights[name] = full.cpu().clone()
        return weights

    def state(self) -> dict[str, Any]:
        """See `Strategy`."""
        self._reshard()
        states = state_by_name(self.module, self.optimizer)
        for state in states.values():
            for key, value in state.items():
                local = value.to_local() if isinstance(value, DTensor) else value
                state[key] = local.cpu().clone()
        return {"parameters": states}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], saved: OptimizerState) -> None:
        """See `Strategy`; any number of processes may have written it."""
        same_parts = (saved.layout, saved.processes) == (ROW_LAYOUT, self._processes)
        states = saved.read(self._rank)["parameters"] if same_parts else full_states(saved)
        for name, target in check_parameter_names(self.module, weights).items():
            assert isinstance(target, DTensor)
            target.to_local().copy_(self._own_rows(weights[name]))
            for key, value in states.get(name, {}).items():
                if value.ndim:
                    part = value if same_parts else self._own_rows(value)
                    states[name][key] = self._sharded_like(target, part)
        load_state_by_name(self.module, self.optimizer, states)

    def release(self, weights: Mapping[str, Tensor] | None) -> None:
        """See `Strategy`."""
        self._reshard()
        new = weights or {}
        values = {
            name: new[name].to(self._device) if name in new else self._full(parameter).clone()
            for name, parameter in self.module.named_parameters()
        }
        self._snapshot.restore(values)

    def _full(self, parameter: nn.Parameter) -> Tensor:
        """Return the full value of a parameter, from the parts of all processes."""
        sharded = parameter.detach().to(self._device)
        assert isinstance(sharded, DTensor)
        return sharded.full_tensor()

    def _own_rows(self, full: Tensor) -> Tensor:
        """Return this process's rows of a tensor, perhaps none, as FSDP cuts it."""
        parts = full.chunk(self._processes)
        return parts[self._rank] if self._rank < len(parts) else full[:0]

    def _sharded_like(self, target: DTensor, local: Tensor) -> DTensor:
        """Return a tensor that is sharded as `target` is, of which this process has `local`."""
        return DTensor.from_local(
            local.to(target.to_local().device),
            target.device_mesh,
            target.placements,
            run_check=False,
            shape=target.shape,
            stride=target.stride(),
        )


def _shard(module: nn.Module, device: torch.device, bf16: bool, offload: bool) -> list[FSDPModule]:
    """Shard each decoder block and then the rest; return the units, the root first."""
    precision = MixedPrecisionPolicy(cast_forward_inputs=False)
    if bf16:
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    # On a CPU everything lives in host memory anyway.
    offload_policy = CPUOffloadPolicy() if offload and device.type != "cpu" else OffloadPolicy()
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    blocks = [
        block
        for child in module.children()
        if isinstance(child, PreTrainedModel)
        for block in decoder_parts(child).blocks
    ]
    for part in (*blocks, module):
        fully_shard(part, mesh=mesh, mp_policy=precision, offload_policy=offload_policy)
    units: list[FSDPModule] = [part for part in module.modules() if isinstance(part, FSDPModule)]
    assert len(units) == len(blocks) + 1, f"FSDP made {len(units)} units of {len(blocks)} blocks"
    return units
