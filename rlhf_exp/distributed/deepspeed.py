"""DeepSpeed's ZeRO: optimizer state (1), gradients (2) and weights (3) sharded over the processes.

Source: Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054. With bfloat16 the weights of the
forward pass are bfloat16 and the optimizer's are float32.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn

from rlhf_exp.distributed.strategy import (
    ModuleSnapshot,
    OptimizerState,
    blocks_of,
    check_layout,
    check_parameter_names,
    released,
    take_from_main,
    trainable,
)
from rlhf_exp.errors import UserError

PERSISTENCE_THRESHOLD = 100_000
"""Parameters of fewer elements are not sharded: gathering them would cost more than it saves."""


class Zero:
    """DeepSpeed's ZeRO stage 1 or 2: each process has all weights and a part of the optimizer."""

    def __init__(
        self,
        module: nn.Module,
        build_optimizer: Callable[[], torch.optim.Optimizer],
        grad_norm: float,
        device: torch.device,
        bf16: bool,
        offload: bool,
        stage: int,
    ) -> None:
        self.module = module
        self.layout = f"zero{stage}"
        self.bf16 = bf16
        self._device = device
        self._main = distributed.get_rank() == 0
        self._snapshot = ModuleSnapshot(module)
        self._frozen_float32 = _frozen_float32(module) if bf16 else {}
        settings = {
            "gradient_clipping": grad_norm,
            "bf16": {"enabled": bf16},
            "zero_optimization": self.zero_settings(stage, offload),
        }
        if bf16:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
        self.engine, self.optimizer = build_engine(module, build_optimizer, settings, device)
        self.wrapped: nn.Module = self.engine

    def zero_settings(self, stage: int, offload: bool) -> dict[str, Any]:
        """Return the section `zero_optimization` of DeepSpeed's config."""
        offloading = {"offload_optimizer": {"device": "cpu"}} if offload else {}
        # Gradients are reduced in a stream of their own while the backward pass goes on. A CPU has
        # no streams.
        return {"stage": stage, "overlap_comm": self._device.type == "cuda", **offloading}

    def begin(self, last: bool) -> None:
        """See `Strategy`."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)

    def backward(self, loss: Tensor) -> None:
        """See `Strategy`."""
        self.engine.backward(loss)

    def step(self) -> float:
        """See `Strategy`."""
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        return norm if norm >= 0.0 else math.nan  # DeepSpeed's -1: not finite

    def gathered(self) -> AbstractContextManager[None]:
        """See `Strategy`: the parameters are always full."""
        return nullcontext()

    def weights(self) -> dict[str, Tensor]:
        """See `Strategy`."""
        full = {name: self.full_trained(p) for name, p in trainable(self.module).items()}
        return {name: value.cpu().clone() for name, value in full.items()} if self._main else {}

    def full_trained(self, parameter: nn.Parameter) -> Tensor:
        """Return the full value that the optimizer has of a trained parameter; in every process."""
        return _full_float32(parameter) if self.bf16 else parameter.detach()

    def full_frozen(self, parameter: nn.Parameter) -> Tensor:
        """Return the full value of a frozen parameter; in every process."""
        return parameter.detach()

    def master_weights(self) -> list[Tensor]:
        """Return this process's part of the weights that the optimizer steps, float32."""
        return [part for group in self.optimizer.param_groups for part in group["params"]]

    def state(self) -> dict[str, Any]:
        """See `Strategy`."""
        masters = [master.detach().cpu() for master in self.master_weights()]
        return {"masters": masters, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], saved: OptimizerState) -> None:
        """See `Strategy`; as many processes of the same strategy must have written it."""
        check_layout(saved, self.layout)
        state = saved.read(distributed.get_rank())
        for master, value in zip(self.master_weights(), state["masters"], strict=True):
            master.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        for name, target in check_parameter_names(self.module, weights).items():
            target.copy_(weights[name])

    def release(self, weights: Mapping[str, Tensor] | None, everywhere: bool) -> None:
        """See `Strategy`: every process has all weights anyway."""
        new = {**self._frozen_float32, **(weights or {})}
        values = {
            name: (new[name] if name in new else self._lasting_value(parameter)).to(self._device)
            for name, parameter in self.module.named_parameters()
        }
        self.engine.destroy()
        self._snapshot.restore(values)

    def _lasting_value(self, parameter: nn.Parameter) -> Tensor:
        """Return a parameter's full value, a copy if it would not outlive the engine."""
        if not parameter.requires_grad:
            return self.full_frozen(parameter)
        value = self.full_trained(parameter)
        # Trained weights are views of one tensor, which is the engine's.
        return value.clone() if value.data_ptr() == parameter.data_ptr() else value


class Zero3(Zero):
    """DeepSpeed's ZeRO stage 3: each process has a part of weights, gradients and optimizer."""

    def zero_settings(self, stage: int, offload: bool) -> dict[str, Any]:
        """See `Zero`."""
        offloading = {"offload_param": {"device": "cpu"}} if offload else {}
        section = super().zero_settings(stage, offload)
        return section | offloading | {"stage3_param_persistence_threshold": PERSISTENCE_THRESHOLD}

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """See `Strategy`.

        The hooks that gather and free a submodule's parameters are off meanwhile.
        """
        import deepspeed

        parameters = list(self.module.parameters())
        with deepspeed.zero.GatheredParameters(parameters), self._snapshot.without_hooks():
            yield

    def release(self, weights: Mapping[str, Tensor] | None, everywhere: bool) -> None:
        """See `Strategy`."""
        new, values = weights or {}, {}
        for name, parameter in self.module.named_parameters():
            if name in new:
                full = new[name]
            else:
                full = self._lasting_value(parameter)
                if name in self._frozen_float32:  # of the main process; not rounded
                    full = self._from_main(self._frozen_float32[name], everywhere)
            values[name] = released(full, self._device, everywhere)
        self.engine.destroy()
        self._snapshot.restore(values)

    def _from_main(self, value: Tensor, everywhere: bool) -> Tensor:
        """Return the main process's value, in every process if it is needed there."""
        if everywhere:
            value = (
                value.to(self._device)
                if self._main
                else torch.empty_like(value, device=self._device)
            )
            distributed.broadcast(value, 0)
        return value

    def full_trained(self, parameter: nn.Parameter) -> Tensor:
        """See `Zero`."""
        return _full_float32(parameter)

    def full_frozen(self, parameter: nn.Parameter) -> Tensor:
        """See `Zero`."""
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def master_weights(self) -> list[Tensor]:
        """See `Zero`."""
        return self.engine.optimizer.fp32_partitioned_groups_flat

    def state(self) -> dict[str, Any]:
        """See `Strategy`."""
        masters = self.master_weights()
        states = [self.optimizer.state[master] for master in masters]
        return {"masters": [master.detach().cpu() for master in masters], "optimizer": states}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], saved: OptimizerState) -> None:
        """See `Strategy`; as many processes of the same strategy must have written it."""
        import deepspeed

        check_layout(saved, self.layout)
        state = saved.read(distributed.get_rank())
        parts = zip(self.master_weights(), state["masters"], state["optimizer"], strict=True)
        for master, value, moments in parts:
            master.copy_(value)
            self.optimizer.state[master] = {
                key: moment.to(master.device) for key, moment in moments.items()
            }
        for name, target in check_parameter_names(self.module, weights).items():
            with deepspeed.zero.GatheredParameters([target], modifier_rank=0):
                if self._main:
                    target.copy_(weights[name])


def _full_float32(parameter: nn.Parameter) -> Tensor:
    """Return the full float32 value that the optimizer has of a parameter."""
    from deepspeed.utils import safe_get_full_fp32_param

    value = safe_get_full_fp32_param(parameter)
    assert value is not None, "a parameter that the optimizer does not have"
    return value


def _frozen_float32(module: nn.Module) -> dict[str, Tensor]:
    """Return the frozen weights that bfloat16 would round, by name, in host memory.

    What a process has without weights, on the meta device, stays there.
    """
    return {
        name: p.detach() if p.is_meta else p.detach().cpu()
        for name, p in module.named_parameters()
        if not p.requires_grad and p.dtype == torch.float32
    }


BUCKET = 200_000_000
"""Most gradients that DeepSpeed is told to reduce at a time; it keeps a buffer of this size."""


def build_engine(
    module: nn.Module,
    build_optimizer: Callable[[], torch.optim.Optimizer],
    settings: dict[str, Any],
    device: torch.device,
) -> tuple[Any, torch.optim.Optimizer]:
    """Return DeepSpeed's engine, after checking its ZeRO stage and processes, and its optimizer.

    Args:
        module: With stage 3, processes but the main one may have no weights, on the meta device.
        build_optimizer: Makes the optimizer of the trainable parameters.
        settings: The part of DeepSpeed's config that does not follow from the module.
        device: Device of this process.
    """
    deepspeed = import_deepspeed()
    elements = sum(p.numel() for p in module.parameters() if p.requires_grad)
    zero = {"reduce_bucket_size": min(BUCKET, elements), **settings["zero_optimization"]}
    config = {
        # `begin` says before each forward pass whether a step is due; DeepSpeed does not count.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 62,
        **settings,
        "zero_optimization": zero,
    }
    _forget_last_group(deepspeed)
    backend = distributed.get_backend()
    deepspeed.init_distributed(dist_backend=backend, dist_init_required=False, verbose=False)
    with _device_number(device):
        if zero["stage"] == 3:
            _divide(module, device, config)
        module.to(device)
        optimizer = build_optimizer()
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )
    actual = (engine.zero_optimization_stage(), engine.dp_world_size)
    expected = (zero["stage"], distributed.get_world_size())
    assert actual == expected, f"DeepSpeed: (stage, processes) are {actual}, not {expected}"
    return engine, optimizer


@torch.no_grad()
def _divide(module: nn.Module, device: torch.device, config: dict[str, Any]) -> None:
    """Leave each process its part of every parameter, block by block.

    A device never has more than the parts so far and the whole of one block. DeepSpeed's engine
    would have all of them first.
    """
    import deepspeed

    half = config["bf16"]["enabled"]
    for part in (*blocks_of(module), module):
        take_from_main(part, device)
        for parameter in part.parameters():
            if half and not hasattr(parameter, "ds_id"):
                parameter.data = parameter.data.bfloat16()
        deepspeed.zero.Init(module=part, config_dict_or_path=config)


@contextmanager
def _device_number(device: torch.device) -> Iterator[None]:
    """Name this process's GPU to DeepSpeed, which takes the variable LOCAL_RANK for its number.

    It is another where a process sees GPUs of its own (`processes.environment.own_gpu`).
    """
    before = os.environ["LOCAL_RANK"]
    os.environ["LOCAL_RANK"] = before if device.type == "cpu" else str(device.index)
    try:
        yield
    finally:
        os.environ["LOCAL_RANK"] = before


def import_deepspeed() -> Any:  # noqa: ANN401 - an untyped library
    """Import deepspeed without the extensions that it would compile on first use.

    Raises:
        UserError: It is not installed.
    """
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise UserError(
            f"distributed=zero*: deepspeed cannot be imported ({error}); install it: "
            "`pip install --no-build-isolation deepspeed` (extra `deepspeed`)"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls functions of torch by their old names, and torch warns each time.
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    # A communication kernel for CPUs of one host: half a minute of compiling, and a lock file that
    # a killed build leaves behind for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _forget_last_group(deepspeed: Any) -> None:  # noqa: ANN401 - an untyped library
    """Make DeepSpeed use the process group of this stage: it caches the first one it has seen."""
    from deepspeed.utils import groups

    deepspeed.comm.comm.cdb = None
    groups._release_process_group_references(group=None)
