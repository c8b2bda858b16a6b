"""DeepSpeed's ZeRO 1 and 2: every process steps a part of the optimizer, and holds all weights.

Source: Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054. In bfloat16 the weights of the
forward pass are bfloat16 and the optimizer's are float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn

from rlhf_exp.distributed.deep import engine_for
from rlhf_exp.distributed.plain import Before
from rlhf_exp.distributed.strategy import Saved, check_names, refuse_layout, trainable


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
        """See `Strategy`."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)

    def backward(self, loss: Tensor) -> None:
        """See `Strategy`."""
        self.engine.backward(loss)

    def step(self) -> float:
        """See `Strategy`."""
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        return norm if norm >= 0.0 else math.nan  # DeepSpeed's -1 says: not finite

    def gathered(self) -> AbstractContextManager[None]:
        """See `Strategy`: they always are."""
        return nullcontext()

    def weights(self) -> dict[str, Tensor]:
        """See `Strategy`."""
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
        """See `Strategy`."""
        masters = [one.detach().cpu() for one in self.masters()]
        return {"masters": masters, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], saved: Saved) -> None:
        """See `Strategy`; as many processes of the same strategy must have written it."""
        refuse_layout(saved, self.layout)
        state = saved.read(distributed.get_rank())
        for master, value in zip(self.masters(), state["masters"], strict=True):
            master.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        for name, target in check_names(self.module, weights).items():
            target.copy_(weights[name])

    def release(self, weights: Mapping[str, Tensor] | None) -> None:
        """See `Strategy`."""
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
