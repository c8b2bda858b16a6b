"""The reference: the policy as it was before training, for the KL divergence.

Build it before any trained weights are put into the policy. B rows, S tokens, T response tokens, D
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

from rlhf_exp.batch import Samples
from rlhf_exp.data.batching import length_sorted_micro_batches
from rlhf_exp.models.frozen_trunk import Branch, decoder_parts
from rlhf_exp.models.lora import adapter_off
from rlhf_exp.models.policy import Policy, ResponseIndex, ResponseOutputs, head_logprobs

Module = TypeVar("Module", bound=nn.Module)


class Reference(Protocol):
    """Log-probabilities of responses under the frozen model."""

    def logprobs(
        self,
        tokens: Tensor,
        prompt_lengths: Tensor,
        response_lengths: Tensor,
        temperature: float,
        states: Tensor | None = None,
        width: int | None = None,
    ) -> Tensor:
        """Return [B, T] float32 without gradient; arguments as in `Policy.response_outputs`."""
        ...


class SharedTrunkReference:
    """A frozen copy of the training blocks, over the states of the policy's own trunk."""

    def __init__(self, policy: Policy, dtype: torch.dtype | None = None) -> None:
        """Copy what trains in `policy`, in `dtype` if given."""
        assert policy.train_blocks is not None, "no trunk to share: everything trains"
        assert not policy.adapted, "the adapter off is the cheaper reference"
        parts = decoder_parts(policy.model)
        self._policy = policy
        self._branch = Branch.of(policy.model, policy.train_blocks, share=False)
        _cast(self._branch.module, dtype)
        # A tied head is frozen, so it needs no copy.
        self._head = policy.head
        if not parts.tied:
            self._head = _cast(copy.deepcopy(policy.head).requires_grad_(False), dtype)

    @torch.no_grad()
    def logprobs(
        self,
        tokens: Tensor,
        prompt_lengths: Tensor,
        response_lengths: Tensor,
        temperature: float,
        states: Tensor | None = None,
        width: int | None = None,
    ) -> Tensor:
        """See `Reference`; runs the trunk only where `states` are not given."""
        index = ResponseIndex.of(tokens, prompt_lengths, response_lengths, width)
        if states is None:
            states = self._policy.trunk_states(tokens)
        picked = index.of_branch(self._branch, states, self._policy.whole_blocks)
        return head_logprobs(picked, self._head, index, temperature)[0]


class LoraReference:
    """The policy with its adapter off."""

    def __init__(self, policy: Policy) -> None:
        """Use `policy` itself; nothing is copied."""
        assert policy.adapted, "a policy without LoRA has no adapter to turn off"
        self._policy = policy

    @torch.no_grad()
    def logprobs(
        self,
        tokens: Tensor,
        prompt_lengths: Tensor,
        response_lengths: Tensor,
        temperature: float,
        states: Tensor | None = None,
        width: int | None = None,
    ) -> Tensor:
        """See `Reference`."""
        index = ResponseIndex.of(tokens, prompt_lengths, response_lengths, width)
        with adapter_off(self._policy.model):
            picked = self._policy.predicting(index, tokens, states)
        return head_logprobs(picked, self._policy.head, index, temperature)[0]


class FullReference:
    """A whole frozen model."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Take `model` for good: it must not be the policy's own."""
        self._model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def logprobs(
        self,
        tokens: Tensor,
        prompt_lengths: Tensor,
        response_lengths: Tensor,
        temperature: float,
        states: Tensor | None = None,
        width: int | None = None,
    ) -> Tensor:
        """See `Reference`; `states` are of no use to it."""
        index = ResponseIndex.of(tokens, prompt_lengths, response_lengths, width)
        hidden = self._model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        head = self._model.get_output_embeddings()
        return head_logprobs(index.pick(hidden), head, index, temperature)[0]


def reference_of(policy: Policy, dtype: torch.dtype | None = None) -> Reference:
    """Return the cheapest reference that is right for an untrained `policy`.

    Args:
        policy: Not yet trained.
        dtype: Of a copy's weights; as the policy's where not given. A policy that computes with
            bfloat16 weights needs a reference that does, or rounding would count as divergence.
    """
    if policy.adapted:
        return LoraReference(policy)
    if policy.cut is not None:
        return SharedTrunkReference(policy, dtype)
    return FullReference(_cast(copy.deepcopy(policy.model), dtype))


class Compared(NamedTuple):
    """Policy and reference on the same responses, of one micro-batch.

    Attributes:
        rows: [b] int64, numbers of the rows.
        policy: Of the policy, for `T` response tokens.
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
) -> Iterator[Compared]:
    """Run policy and reference over all responses, in micro-batches of rows of like length.

    Args:
        policy: The policy; its frozen trunk is run once for both.
        reference: The reference.
        samples: B responses with their prompts, on the policy's device.
        temperature: Of the log-probabilities.
        batch: Rows of a micro-batch.
        autocast: Makes the context of mixed precision.
        states: [B, S, D] that enter the training blocks, where they are known already.
        with_entropy: Whether the policy's entropy is wanted.
        width: Columns of the results; by default those of a micro-batch's longest response.
    """
    lengths = (samples.prompt_lengths + samples.response_lengths).cpu()
    for rows in length_sorted_micro_batches(lengths, batch):
        longest = int(lengths[rows].max())
        tokens = samples.tokens[rows, :longest]
        spans = (samples.prompt_lengths[rows], samples.response_lengths[rows])
        with autocast():
            given = None if states is None else states[rows, :longest].to(tokens.device)
            if given is None and policy.cut is not None:
                given = policy.trunk_states(tokens)
            outputs = policy.response_outputs(
                tokens, *spans, temperature, states=given, with_entropy=with_entropy, width=width
            )
            expected = reference.logprobs(tokens, *spans, temperature, states=given, width=width)
        yield Compared(rows, outputs, expected, given)


def _cast(module: Module, dtype: torch.dtype | None) -> Module:
    """Return the module with its parameters in `dtype`; rotary tables and the like stay exact."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype or parameter.dtype)
    return module
