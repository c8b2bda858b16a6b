"""DeepSpeed's ZeRO 3: every process keeps a part of all weights, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from rlhf_exp.distributed.strategy import Saved, check_names, refuse_layout
from rlhf_exp.distributed.zero import Zero

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
        """See `Strategy`.

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
        """See `Strategy`."""
        masters = self.masters()
        states = [self.optimizer.state[master] for master in masters]
        return {"masters": [one.detach().cpu() for one in masters], "optimizer": states}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], saved: Saved) -> None:
        """See `Strategy`; as many processes of the same strategy must have written it."""
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
