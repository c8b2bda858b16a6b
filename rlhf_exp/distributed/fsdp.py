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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from rlhf_exp.distributed.strategy import (
    ROW_LAYOUT,
    ModuleSnapshot,
    OptimizerState,
    blocks_of,
    check_parameter_names,
    clip_and_step,
    decoders_of,
    full_states,
    load_state_by_name,
    released,
    state_by_name,
    take_from_main,
    trainable,
)
from rlhf_exp.models.frozen_trunk import decoder_parts


class FullySharded:
    """FSDP2 over the decoder blocks and, around them, the rest.

    Args:
        module: The module; the main process has its weights, the others need none.
        build_optimizer: Makes the optimizer of the module's trainable parameters.
        grad_norm: L2 norm that gradients are clipped to.
        device: Device of this process.
        bf16: Whether blocks are gathered in bfloat16.
        offload: Whether parts and optimizer state live in host memory.
        shards: Neighbouring processes over which a copy of the weights is divided; `None`: all.
    """

    layout = ROW_LAYOUT

    def __init__(
        self,
        module: nn.Module,
        build_optimizer: Callable[[], torch.optim.Optimizer],
        grad_norm: float,
        device: torch.device,
        bf16: bool,
        offload: bool,
        shards: int | None = None,
    ) -> None:
        self.module = self.wrapped = module
        self._grad_norm, self._device = grad_norm, device
        mesh = _mesh(device, shards)
        self._main = distributed.get_rank() == 0
        self._shards, self._part = mesh[_SHARD].size(), mesh[_SHARD].get_local_rank()
        self._first_copy = distributed.get_rank() < self._shards
        self._snapshot = ModuleSnapshot(module)
        self._units = _shard(module, device, mesh, bf16, offload)
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
            if self._main:
                weights[name] = full.cpu().clone()
        return weights

    def state(self) -> dict[str, Any]:
        """See `Strategy`; of several copies the first one's parts are enough."""
        self._reshard()
        states = state_by_name(self.module, self.optimizer) if self._first_copy else {}
        for state in states.values():
            for key, value in state.items():
                local = value.to_local() if isinstance(value, DTensor) else value
                state[key] = local.cpu().clone()
        return {"parameters": states, "shards": self._shards}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], saved: OptimizerState) -> None:
        """See `Strategy`; any number of processes may have written it."""
        part: dict[str, Any] = {}
        if saved.layout == ROW_LAYOUT and self._part < saved.processes:
            part = saved.read(self._part)
            part.setdefault("shards", saved.processes)  # one copy over all, before there were more
        same_parts = part.get("shards") == self._shards
        states = part["parameters"] if same_parts else full_states(saved)
        for name, target in check_parameter_names(self.module, weights).items():
            assert isinstance(target, DTensor)
            target.to_local().copy_(self._own_rows(weights[name]))
            for key, value in states.get(name, {}).items():
                if value.ndim:
                    rows = value if same_parts else self._own_rows(value)
                    states[name][key] = self._sharded_like(target, rows)
        load_state_by_name(self.module, self.optimizer, states)

    def release(self, weights: Mapping[str, Tensor] | None, everywhere: bool) -> None:
        """See `Strategy`."""
        self._reshard()
        new = weights or {}
        values = {}
        for name, parameter in self.module.named_parameters():
            full = new[name] if name in new else self._full(parameter).clone()
            values[name] = released(full, self._device, everywhere)
        self._snapshot.restore(values)

    def _full(self, parameter: Tensor) -> Tensor:
        """Return the full value of a parameter, from the parts of all processes."""
        value = parameter.detach().to(self._device)
        return value.full_tensor() if isinstance(value, DTensor) else value

    def _own_rows(self, full: Tensor) -> Tensor:
        """Return this process's rows of a tensor, perhaps none, as FSDP cuts it."""
        parts = full.chunk(self._shards)
        return parts[self._part] if self._part < len(parts) else full[:0]

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


_SHARD = "shard"


def _mesh(device: torch.device, shards: int | None) -> DeviceMesh:
    """Return the processes as the copies of the weights, and within each the parts."""
    processes = distributed.get_world_size()
    if shards is None or shards == processes:
        return init_device_mesh(device.type, (processes,), mesh_dim_names=(_SHARD,))
    shape = (processes // shards, shards)
    return init_device_mesh(device.type, shape, mesh_dim_names=("copy", _SHARD))


def _shard(
    module: nn.Module, device: torch.device, mesh: DeviceMesh, bf16: bool, offload: bool
) -> list[FSDPModule]:
    """Shard each decoder block and then the rest; return the units, the root first.

    A device never has more than the parts so far and the whole of one unit.
    """
    precision = MixedPrecisionPolicy(cast_forward_inputs=False)
    if bf16:
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    blocks = blocks_of(module)
    for part in (*blocks, module):
        take_from_main(part, device)
        fully_shard(
            part, mesh=mesh, mp_policy=precision, offload_policy=_offloading(device, offload)
        )
    units: list[FSDPModule] = [part for part in module.modules() if isinstance(part, FSDPModule)]
    assert len(units) == len(blocks) + 1, f"FSDP made {len(units)} units of {len(blocks)} blocks"
    return units


def _offloading(device: torch.device, offload: bool) -> OffloadPolicy:
    """Return where parts live. On a CPU everything lives in host memory anyway."""
    return CPUOffloadPolicy() if offload and device.type != "cpu" else OffloadPolicy()


def place_frozen(
    module: nn.Module, device: torch.device, offload: bool, shards: int | None = None
) -> None:
    """Put a frozen module on the devices, each process with a part of every decoder block.

    A block is gathered while it computes, so all processes must call the module equally often.
    What is no block (embeddings, norm, heads) is whole in every process.

    Args:
        module: The main process has its weights, the others need none.
        device: Device of this process.
        offload: Whether the parts live in host memory.
        shards: As for `FullySharded`.
    """
    mesh = _mesh(device, shards)
    for model in decoders_of(module):
        for block in decoder_parts(model).blocks:
            take_from_main(block, device)
            fully_shard(block, mesh=mesh, offload_policy=_offloading(device, offload))
    take_from_main(module, device)
    for model in decoders_of(module):
        # A root over the blocks lets one be gathered while another computes.
        base = decoder_parts(model).base
        rest = {p for p in base.parameters() if not isinstance(p, DTensor)}
        fully_shard(base, mesh=mesh, ignored_params=rest, reshard_after_forward=True)
