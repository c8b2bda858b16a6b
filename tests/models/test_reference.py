"""Each kind of reference: equal to the policy at the start, frozen, blind to the future."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_exp.batch import Demonstrations
from rlhf_exp.models.lora import LoraSettings
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.reference import (
    FullReference,
    LoraReference,
    Reference,
    SharedTrunkReference,
    build_reference,
)

Build = Callable[..., PreTrainedModel]
Batch = dict[str, Tensor]

KINDS = {
    "shared": ({"train_blocks": 2}, SharedTrunkReference),
    "every block, embeddings frozen": ({"train_blocks": 4}, SharedTrunkReference),
    "full": ({}, FullReference),
    "lora": ({"lora": LoraSettings(rank=4)}, LoraReference),
    "lora above a trunk": ({"lora": LoraSettings(rank=4), "train_blocks": 2}, LoraReference),
}
TEMPERATURE = 0.7


@pytest.fixture(params=list(KINDS))
def pair(request: pytest.FixtureRequest, tiny: Build, family: str) -> tuple[Policy, Reference]:
    """Return a policy in train mode and its reference."""
    arguments, kind = KINDS[request.param]
    policy = Policy(tiny(family), **arguments).train()
    reference = build_reference(policy)
    assert type(reference) is kind
    return policy, reference


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_policy_exactly_in_mixed_precision(
    kind: str, tiny: Build, family: str, rows: Batch
) -> None:
    policy = Policy(tiny(family).to(torch.bfloat16), **KINDS[kind][0])
    for _, parameter in policy.trainable_named_parameters():
        parameter.data = parameter.data.float()
    reference = build_reference(policy)
    with torch.autocast("cpu", torch.bfloat16):
        ours = policy.response_outputs(**rows, temperature=TEMPERATURE).logprobs
        theirs = reference.logprobs(**rows, temperature=TEMPERATURE)
    assert ours.abs().sum() > 0
    assert torch.equal(ours, theirs)


def test_equals_the_policy_exactly_in_packed_rows(
    pair: tuple[Policy, Reference], packed: Demonstrations
) -> None:
    """And stays where it is; `test_packing.py` has the policy's own against separate rows."""
    policy, reference = pair
    before = reference.target_logprobs(packed)
    assert torch.equal(before, policy.target_logprobs(packed))
    assert not before.requires_grad
    optimizer = torch.optim.SGD([p for _, p in policy.trainable_named_parameters()], lr=0.05)
    for _ in range(2):  # an adapter's second matrix is 0 at first
        policy(packed).sum().neg().backward()
        optimizer.step()
    assert torch.equal(reference.target_logprobs(packed), before)
    assert (policy.target_logprobs(packed) - before).abs().max() > 1e-3


def train_a_little(policy: Policy, rows: Batch) -> None:
    optimizer = torch.optim.SGD([p for _, p in policy.trainable_named_parameters()], lr=0.05)
    for _ in range(2):
        policy.response_outputs(**rows, temperature=1.0).logprobs.sum().neg().backward()
        optimizer.step()


def test_equals_the_policy_exactly_at_the_start(
    pair: tuple[Policy, Reference], rows: Batch
) -> None:
    policy, reference = pair
    states = None if policy.frozen_blocks is None else policy.trunk_states(rows["tokens"])
    ours = policy.response_outputs(**rows, temperature=TEMPERATURE, states=states).logprobs
    theirs = reference.logprobs(**rows, temperature=TEMPERATURE, states=states)
    assert torch.equal(ours, theirs)
    assert not theirs.requires_grad


def test_stays_where_it_is_while_the_policy_trains(
    pair: tuple[Policy, Reference], rows: Batch
) -> None:
    policy, reference = pair
    before = reference.logprobs(**rows, temperature=TEMPERATURE)
    train_a_little(policy, rows)
    assert torch.equal(reference.logprobs(**rows, temperature=TEMPERATURE), before)
    after = policy.response_outputs(**rows, temperature=TEMPERATURE).logprobs
    assert (after - before).abs().max() > 1e-3
    if policy.frozen_blocks is not None:
        states = policy.trunk_states(rows["tokens"])
        assert torch.equal(
            reference.logprobs(**rows, temperature=TEMPERATURE, states=states), before
        )


def test_sees_no_future_token(pair: tuple[Policy, Reference], rows: Batch) -> None:
    _, reference = pair
    before = reference.logprobs(**rows, temperature=TEMPERATURE)
    row, step = 1, 6
    tokens = rows["tokens"].clone()
    place = int(rows["prompt_lengths"][row]) + step
    tokens[row, place] = (tokens[row, place] + 1) % 80 + 2
    after = reference.logprobs(**{**rows, "tokens": tokens}, temperature=TEMPERATURE)
    assert torch.equal(after[row, :step], before[row, :step])
    assert (after[row, step:] - before[row, step:]).abs().min() > 1e-6
    others = [0, 2, 3]
    assert torch.equal(after[others], before[others])


def test_adapter_is_on_again_after_the_reference(tiny: Build, rows: Batch) -> None:
    policy = Policy(tiny("llama"), lora=LoraSettings(rank=4)).train()
    reference = build_reference(policy)
    train_a_little(policy, rows)
    before = policy.response_outputs(**rows, temperature=1.0).logprobs
    reference.logprobs(**rows, temperature=1.0)
    after = policy.response_outputs(**rows, temperature=1.0).logprobs
    assert torch.equal(before, after)
    assert after.requires_grad
