"""The reference: the policy as it was before training, for the KL divergence.

Build it before trained weights are loaded into the policy. B rows, S tokens, T response tokens, D
width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_exp.algo.kl import sequence_kl
from rlhf_exp.algo.masks import response_mask
from rlhf_exp.batch import Demonstrations, Samples, to_device
from rlhf_exp.data.batching import length_sorted_micro_batches
from rlhf_exp.models.frozen_trunk import Branch, decoder_parts
from rlhf_exp.models.logit_transform import logit_transform
from rlhf_exp.models.lora import adapter_off
from rlhf_exp.models.packing import packed_inputs
from rlhf_exp.models.policy import (
    Lengths,
    Policy,
    ResponseIndex,
    ResponseOutputs,
    response_logprobs,
    target_logprobs,
)

Module = TypeVar("Module", bound=nn.Module)


class Reference(Protocol):
    """Log-probabilities of responses under the frozen model."""

    def logprobs(
        self,
        tokens: Tensor,
        prompt_lengths: Lengths,
        response_lengths: Lengths,
        temperature: float,
        states: Tensor | None = None,
        width: int | None = None,
    ) -> Tensor:
        """Return [B, T] float32 without gradient; arguments as in `Policy.response_outputs`."""
        ...

    def target_logprobs(self, batch: Demonstrations) -> Tensor:
        """Return those of packed rows [N] float32 without gradient, as `Policy` does."""
        ...


def build_reference(
    policy: Policy,
    dtype: torch.dtype | None = None,
    place: Callable[[nn.Module], object] = lambda module: None,
) -> Reference:
    """Return the cheapest reference that is right for an untrained `policy`.

    Args:
        policy: Not yet trained, its weights in the number formats that they train in.
        dtype: Number format of a copy's weights; by default the policy's. A policy that computes
            with bfloat16 weights needs a reference that does, or rounding would count as
            divergence.
        place: Puts a frozen copy where it computes, if it is not there; perhaps divided over the
            processes (`World.place`).
    """
    if policy.uses_lora:
        return LoraReference(policy)
    if policy.frozen_blocks is not None:
        reference = SharedTrunkReference(policy, dtype)
        for module in reference.copies:
            place(module)
        return reference
    model = _copy(policy.model, dtype)
    full = FullReference(model)
    place(model)
    return full


class SharedTrunkReference:
    """A frozen copy of the training blocks, over the states of the policy's own trunk.

    Attributes:
        copies: The modules that are its own.
    """

    def __init__(self, policy: Policy, dtype: torch.dtype | None = None) -> None:
        """Copy the trainable blocks of an untrained `policy`, in `dtype` if given."""
        assert policy.train_blocks is not None, "no trunk to share: everything trains"
        assert not policy.uses_lora, "the adapter off is the cheaper reference"
        parts = decoder_parts(policy.model)
        self._policy = policy
        self._branch = Branch.of(policy.model, policy.train_blocks, share=False)
        self.copies: list[nn.Module] = [_cast(self._branch.module, dtype)]
        # A tied head is frozen, so it needs no copy.
        self._head = policy.head
        if not parts.tied:
            self._head = _cast(copy.deepcopy(policy.head).requires_grad_(False), dtype)
            self.copies.append(self._head)

    @torch.no_grad()
    def logprobs(
        self,
        tokens: Tensor,
        prompt_lengths: Lengths,
        response_lengths: Lengths,
        temperature: float,
        states: Tensor | None = None,
        width: int | None = None,
    ) -> Tensor:
        """See `Reference`; the trunk is run only if `states` are not given."""
        index = ResponseIndex.of(tokens, prompt_lengths, response_lengths, width)
        if states is None:
            states = self._policy.trunk_states(tokens)
        hidden = index.run_branch(self._branch, states, self._policy.run_all_positions)
        transform = self._policy.logit_transform
        return response_logprobs(hidden, self._head, transform, index, temperature)[0]

    @torch.no_grad()
    def target_logprobs(self, batch: Demonstrations) -> Tensor:
        """See `Reference`."""
        packed = packed_inputs(self._policy.model, batch)
        hidden = self._branch(self._policy.trunk_states(batch.tokens, **packed), **packed)
        return target_logprobs(hidden, self._head, self._policy.logit_transform, batch)


class LoraReference:
    """The policy with its adapter off."""

    def __init__(self, policy: Policy) -> None:
        """Use `policy` itself; nothing is copied."""
        assert policy.uses_lora, "a policy without LoRA has no adapter to turn off"
        self._policy = policy

    @torch.no_grad()
    def logprobs(
        self,
        tokens: Tensor,
        prompt_lengths: Lengths,
        response_lengths: Lengths,
        temperature: float,
        states: Tensor | None = None,
        width: int | None = None,
    ) -> Tensor:
        """See `Reference`."""
        index = ResponseIndex.of(tokens, prompt_lengths, response_lengths, width)
        with adapter_off(self._policy.model):
            hidden = self._policy.predicting_states(index, tokens, states)
        policy = self._policy
        return response_logprobs(hidden, policy.head, policy.logit_transform, index, temperature)[0]

    @torch.no_grad()
    def target_logprobs(self, batch: Demonstrations) -> Tensor:
        """See `Reference`."""
        with adapter_off(self._policy.model):
            return self._policy.target_logprobs(batch)


class FullReference:
    """A frozen model of its own: for a policy that trains as a whole."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Freeze `model`, which must not be the policy's own."""
        self._model = model.requires_grad_(False).eval()
        self._transform = logit_transform(model)

    @torch.no_grad()
    def logprobs(
        self,
        tokens: Tensor,
        prompt_lengths: Lengths,
        response_lengths: Lengths,
        temperature: float,
        states: Tensor | None = None,
        width: int | None = None,
    ) -> Tensor:
        """See `Reference`; `states` are ignored."""
        index = ResponseIndex.of(tokens, prompt_lengths, response_lengths, width)
        hidden = self._model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        head = self._model.get_output_embeddings()
        return response_logprobs(index.select(hidden), head, self._transform, index, temperature)[0]

    @torch.no_grad()
    def target_logprobs(self, batch: Demonstrations) -> Tensor:
        """See `Reference`."""
        packed = packed_inputs(self._model, batch)
        outputs = self._model.base_model(input_ids=batch.tokens, use_cache=False, **packed)
        head = self._model.get_output_embeddings()
        return target_logprobs(outputs.last_hidden_state, head, self._transform, batch)


def _copy(model: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """Return a copy of a model with parameters in `dtype`, made without one in the old format."""
    parameters: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to(dtype or p.dtype, copy=True), requires_grad=False)
        for p in model.parameters()
    }
    return copy.deepcopy(model, parameters)


def _cast(module: Module, dtype: torch.dtype | None) -> Module:
    """Return the module with its parameters in `dtype`; buffers (rotary tables) keep theirs."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype or parameter.dtype)
    return module


class ReferenceComparison(NamedTuple):
    """Outputs of policy and reference for one micro-batch of b responses.

    Attributes:
        rows: [b] int64, the rows' indices in the batch.
        policy: Outputs of the policy, [b, T] each.
        ref_logprobs: [b, T] float32 of the reference.
        states: [b, S', D] that entered the policy's training blocks, or `None`.
    """

    rows: Tensor
    policy: ResponseOutputs
    ref_logprobs: Tensor
    states: Tensor | None


@torch.no_grad()
def compare_with_reference(
    policy: Policy,
    reference: Reference,
    samples: Samples,
    temperature: float,
    batch: int,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    states: Tensor | None = None,
    with_entropy: bool = False,
    width: int | None = None,
) -> Iterator[ReferenceComparison]:
    """Yield the outputs of policy and reference for micro-batches of rows of similar length.

    Args:
        policy: The policy; its frozen trunk is run once for both.
        reference: The reference.
        samples: B responses with their prompts, on the policy's device.
        temperature: Divides the logits.
        batch: Rows of a micro-batch.
        autocast: Makes the context of mixed precision.
        states: [B, S, D] that enter the training blocks, if they are known already.
        with_entropy: Whether to compute the policy's entropy.
        width: Columns of the results; by default those of a micro-batch's longest response.
    """
    spans = torch.stack([samples.prompt_lengths, samples.response_lengths]).cpu()
    lengths = spans.sum(0)
    device = samples.tokens.device
    for chosen in length_sorted_micro_batches(lengths, batch):
        rows = to_device(chosen, device)
        longest = int(lengths[chosen].max())
        tokens = samples.tokens[rows, :longest]
        prompts, responses = spans[:, chosen].numpy()
        with autocast():
            entering = None if states is None else states[rows, :longest].to(device)
            if entering is None and policy.frozen_blocks is not None:
                entering = policy.trunk_states(tokens)
            outputs = policy.response_outputs(
                *(tokens, prompts, responses, temperature),
                states=entering,
                with_entropy=with_entropy,
                width=width,
            )
            ref_logprobs = reference.logprobs(
                *(tokens, prompts, responses, temperature), states=entering, width=width
            )
        yield ReferenceComparison(rows, outputs, ref_logprobs, entering)


@torch.no_grad()
def sampled_kl(
    policy: Policy,
    reference: Reference,
    samples: Samples,
    temperature: float,
    batch: int,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """Return the sum of log pi - log pi_ref over each response [B] float32, in nats.

    Its mean over responses that the policy sampled estimates KL(pi || pi_ref). The arguments are
    those of `compare_with_reference`.
    """
    kl = torch.zeros(len(samples), device=samples.tokens.device)
    for part in compare_with_reference(policy, reference, samples, temperature, batch, autocast):
        mask = response_mask(samples.response_lengths[part.rows], part.ref_logprobs.shape[1])
        kl[part.rows] = sequence_kl(part.policy.logprobs, part.ref_logprobs, mask)
    return kl
