"""The native rollout engine: `sampler.sample`, in this process, on the policy's device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_exp.batch import Prompts, Samples
from rlhf_exp.models.frozen_trunk import decoder_parts
from rlhf_exp.models.lora import lora_layers, merged_state
from rlhf_exp.models.policy import Policy
from rlhf_exp.rollout.engine import RolloutRequest
from rlhf_exp.rollout.sampler import sample


class NativeEngine:
    """Samples from the policy itself, or from a copy of its weights.

    A copy in bfloat16 spares decoding what mixed precision does at every token: casting each weight
    once more. A copy also stays as it is while the policy trains.

    Args:
        policy: who answers.
        copy_dtype: number format of a copy that is refreshed; None: the policy's own weights
            answer.
        autocast: makes the context of mixed precision, for the policy's own weights.
    """

    def __init__(
        self,
        policy: Policy,
        copy_dtype: torch.dtype | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._policy, self._autocast = policy, autocast
        self._copy = None if copy_dtype is None else RolloutCopy(policy.model, copy_dtype)
        self._version: int | None = None

    def refresh(self, version: int) -> None:
        """See `RolloutEngine`."""
        if self._copy is not None and version != self._version:
            self._copy.refresh()
        self._version = version

    def answer(self, prompts: Prompts, request: RolloutRequest) -> Samples:
        """See `RolloutEngine`."""
        if self._copy is not None:
            assert self._version is not None, "a copy is refreshed before it answers"
            return self._sample(self._copy.model, prompts, request)
        with self._autocast():
            return self._sample(self._policy.model, prompts, request)

    def _sample(self, model: PreTrainedModel, prompts: Prompts, request: RolloutRequest) -> Samples:
        block: nn.Module | None = None
        if request.capture and self._policy.frozen_blocks is not None:
            block = decoder_parts(model).blocks[self._policy.frozen_blocks]
        return sample(
            model,
            prompts,
            request.params,
            request.seed,
            request.stopper,
            block,
            request.close,
            request.on_ended,
            request.on_row,
        )

    def release(self) -> None:
        """See `RolloutEngine`: the copy's weights stay at their addresses, for the next time."""

    def close(self) -> None:
        """See `RolloutEngine`."""


class RolloutCopy:
    """A copy of a causal language model for sampling, an adapter merged into its weights.

    Weights that are frozen and in the copy's number format already are not copied.

    Args:
        source: the model, which may train; an adapter has been added before.
        dtype: the copy's number format. Buffers keep theirs: rotary tables need it.

    Attributes:
        model: the copy, to sample from; its weights keep their addresses.
    """

    def __init__(self, source: PreTrainedModel, dtype: torch.dtype) -> None:
        self._source = source
        adapted = {id(layer.base_layer.weight) for _, layer in lora_layers(source)}
        # `deepcopy` takes what its memo holds instead of making a copy.
        shared: dict[int, Any] = {
            id(weight): weight
            for weight in source.parameters()
            if not weight.requires_grad and weight.dtype == dtype and id(weight) not in adapted
        }
        self.model: PreTrainedModel = copy.deepcopy(source, shared).eval()
        for name, layer in lora_layers(self.model):
            self.model.set_submodule(name, layer.base_layer)
        self._own = {
            name: weight
            for name, weight in self.model.named_parameters()
            if id(weight) not in shared
        }
        for weight in self._own.values():
            weight.requires_grad_(False)
            weight.data = weight.data.to(dtype)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the source's weights as they are now."""
        source = self._source
        state: dict[str, Tensor] = (
            merged_state(source) if lora_layers(source) else dict(source.named_parameters())
        )
        for name, weight in self._own.items():
            weight.copy_(state[name])
