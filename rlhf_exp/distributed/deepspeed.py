"""DeepSpeed's ZeRO 1 and 2: every process steps a part of the optimizer, and holds all weights.

Source: Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054. In bfloat16 the weights of the
forward pass are bfloat16 and the optimizer's are float32.

DeepSpeed's ZeRO 3: every process keeps a part of all weights, gradients and optimizer state.

DeepSpeed, set up so that it is what was asked for.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn

from rlhf_exp.distributed.strategy import (
    Before,
    OptimizerState,
    check_names,
    refuse_layout,
    trainable,
)
from rlhf_exp.errors import UserError
from rlhf_exp.models.memory_estimate import BUCKET


class Zero:
    """DeepSpeed's ZeRO stage 1 or 2."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        grad_norm: float,
        device: torch.device,
        half: bool,
        offload: bool,
        stage: int,
    ) -> None:
        self.module, self.optimizer = module, optimizer
        self.layout = f"zero{stage}"
        self.half = half
        self._main = distributed.get_rank() == 0
        self._before = Before(module)
        self._exact = _wider(module) if half else {}
        settings = {
            "gradient_clipping": grad_norm,
            "bf16": {"enabled": half},
            "zero_optimization": self.zero_settings(stage, offload),
        }
        if half:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
        self.engine = engine_for(module.to(device), optimizer, settings)
        self.wrapped: nn.Module = self.engine

    def zero_settings(self, stage: int, offload: bool) -> dict[str, Any]:
        """Return the section `zero_optimization` of DeepSpeed's config."""
        where = {"offload_optimizer": {"device": "cpu"}} if offload else {}
        return {"stage": stage, "overlap_comm": False, **where}

    def begin(self, last: bool) -> None:
        """See `StrategyName`."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)

    def backward(self, loss: Tensor) -> None:
        """See `StrategyName`."""
        self.engine.backward(loss)

    def step(self) -> float:
        """See `StrategyName`."""
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        return norm if norm >= 0.0 else math.nan  # DeepSpeed's -1 says: not finite

    def gathered(self) -> AbstractContextManager[None]:
        """See `StrategyName`: they always are."""
        return nullcontext()

    def weights(self) -> dict[str, Tensor]:
        """See `StrategyName`."""
        found = {name: self.whole(parameter) for name, parameter in trainable(self.module).items()}
        return {name: one.cpu().clone() for name, one in found.items()} if self._main else {}

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """Return a trained parameter as the optimizer has it; in every process."""
        if not self.half:
            return parameter.detach()
        from deepspeed.utils import safe_get_full_fp32_param

        found = safe_get_full_fp32_param(parameter)
        assert found is not None, "a parameter that the optimizer does not have"
        return found

    def frozen(self, parameter: nn.Parameter) -> Tensor:
        """Return a frozen parameter; in every process."""
        return parameter.detach()

    def masters(self) -> list[Tensor]:
        """Return this process's part of what the optimizer steps, float32."""
        return [one for group in self.optimizer.param_groups for one in group["params"]]

    def state(self) -> dict[str, Any]:
        """See `StrategyName`."""
        masters = [one.detach().cpu() for one in self.masters()]
        return {"masters": masters, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], saved: OptimizerState) -> None:
        """See `StrategyName`; as many processes of the same strategy must have written it."""
        refuse_layout(saved, self.layout)
        state = saved.read(distributed.get_rank())
        for master, value in zip(self.masters(), state["masters"], strict=True):
            master.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        for name, target in check_names(self.module, weights).items():
            target.copy_(weights[name])

    def release(self, weights: Mapping[str, Tensor] | None) -> None:
        """See `StrategyName`."""
        device = next(self.module.parameters()).device
        given = {**self._exact, **(weights or {})}
        values = {
            name: (given[name] if name in given else self._kept(parameter)).to(device)
            for name, parameter in self.module.named_parameters()
        }
        self.engine.destroy()
        self._before.restore(values)

    def _kept(self, parameter: nn.Parameter) -> Tensor:
        """Return a parameter's value that outlives the engine, copied only where it must be."""
        if not parameter.requires_grad:
            return self.frozen(parameter)
        found = self.whole(parameter)
        # Trained weights are pieces of one tensor, which is the engine's.
        return found.clone() if found.data_ptr() == parameter.data_ptr() else found


def _wider(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of the frozen weights that bfloat16 would round, by name."""
    return {
        name: p.detach().cpu().clone()
        for name, p in module.named_parameters()
        if not p.requires_grad and p.dtype == torch.float32
    }


WHOLE_BELOW = 100_000
"""Parameters of fewer elements stay whole: fetching them would cost more than it saves."""


class Zero3(Zero):
    """DeepSpeed's ZeRO stage 3, with everything in host memory where it is offloaded."""

    def zero_settings(self, stage: int, offload: bool) -> dict[str, Any]:
        """See `Zero`."""
        where = {"offload_param": {"device": "cpu"}} if offload else {}
        section = super().zero_settings(stage, offload)
        return section | where | {"stage3_param_persistence_threshold": WHOLE_BELOW}

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """See `StrategyName`.

        The hooks that fetch a part's parameters and drop them again are off meanwhile.
        """
        import deepspeed

        parameters = list(self.module.parameters())
        with deepspeed.zero.GatheredParameters(parameters), self._before.without_hooks():
            yield

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """See `Zero`."""
        from deepspeed.utils import safe_get_full_fp32_param

        found = safe_get_full_fp32_param(parameter)
        assert found is not None, "a parameter that the optimizer does not have"
        return found

    def frozen(self, parameter: nn.Parameter) -> Tensor:
        """See `Zero`."""
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def masters(self) -> list[Tensor]:
        """See `Zero`."""
        return self.engine.optimizer.fp32_partitioned_groups_flat

    def state(self) -> dict[str, Any]:
        """See `StrategyName`."""
        masters = self.masters()
        states = [self.optimizer.state[master] for master in masters]
        return {"masters": [one.detach().cpu() for one in masters], "optimizer": states}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], saved: OptimizerState) -> None:
        """See `StrategyName`; as many processes of the same strategy must have written it."""
        import deepspeed

        refuse_layout(saved, self.layout)
        state = saved.read(distributed.get_rank())
        kept = zip(self.masters(), state["masters"], state["optimizer"], strict=True)
        for master, value, moments in kept:
            master.copy_(value)
            self.optimizer.state[master] = {
                key: one.to(master.device) for key, one in moments.items()
            }
        for name, target in check_names(self.module, weights).items():
            with deepspeed.zero.GatheredParameters([target], modifier_rank=0):
                if self._main:
                    target.copy_(weights[name])


def deepspeed_module() -> Any:  # noqa: ANN401 - an untyped library
    """Import deepspeed, without what it would compile on first use.

    Raises:
        UserError: It is not installed.
    """
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise UserError(
            f"distributed=zero*: deepspeed cannot be imported ({error}); install it with "
            "`pip install --no-build-isolation 'rlhf-exp[deepspeed]'`"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls functions of torch by their old names, which says so each time.
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    # A communication kernel for CPUs of one host: half a minute of compiling, and a lock file that
    # a killed build leaves behind for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def engine_for(
    module: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> Any:  # noqa: ANN401 - an untyped library
    """Return DeepSpeed's engine over `module`, after seeing that it shards as asked.

    Args:
        module: On this process's device.
        optimizer: Of what trains.
        settings: DeepSpeed's config: what does not follow from the module.
    """
    deepspeed = deepspeed_module()
    elements = sum(p.numel() for p in module.parameters() if p.requires_grad)
    zero = {"reduce_bucket_size": min(BUCKET, elements), **settings["zero_optimization"]}
    config = {
        # Whether a step is due is said before each forward pass, not counted.
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
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, dist_init_required=False
    )
    found = (engine.zero_optimization_stage(), engine.dp_world_size)
    expected = (zero["stage"], distributed.get_world_size())
    assert found == expected, f"DeepSpeed: (stage, processes) are {found}, not {expected}"
    return engine


def _forget_last_group(deepspeed: Any) -> None:  # noqa: ANN401 - an untyped library
    """Let DeepSpeed find the process group of this stage: it keeps the first one it has seen."""
    from deepspeed.utils import groups

    deepspeed.comm.comm.cdb = None
    groups._release_process_group_references(group=None)
