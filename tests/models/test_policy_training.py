"""What of a policy trains, and how its forward runs while it does."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from rlhf_exp.errors import UserError
from rlhf_exp.models.families import decoder_parts
from rlhf_exp.models.policy import Policy

Build = Callable[..., PreTrainedModel]
Batch = dict[str, Tensor]


def test_top_blocks_norm_and_untied_head_train(tiny: Build, family: str) -> None:
    policy = Policy(tiny(family), train_blocks=1)
    parts = decoder_parts(policy.model)
    expected = list(parts.blocks[3].parameters()) + list(parts.norm.parameters())
    assert parts.head is not None
    if family not in ("gpt2", "qwen3"):  # those two are tied
        expected += list(parts.head.parameters())
    assert policy.value_head is not None
    expected += [policy.value_head.weight, policy.value_head.bias]
    trained = {id(value) for _, value in policy.trainable_named_parameters()}
    assert trained == {id(value) for value in expected}
    assert policy.cut == 3


def test_everything_trains_by_default_each_parameter_once(tiny: Build, family: str) -> None:
    policy = Policy(tiny(family))
    assert policy.cut is None
    names = [name for name, _ in policy.trainable_named_parameters()]
    assert len(names) == len(set(names)) == len(list(policy.model.parameters())) + 2


def test_frozen_trunk_gets_no_gradient(tiny: Build, family: str, rows: Batch) -> None:
    policy = Policy(tiny(family), train_blocks=2).train()
    outputs = policy(**rows, temperature=1.0)
    (outputs.logprobs.sum() + outputs.values.sum()).backward()
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_gradient_from_cached_states_is_the_same(tiny: Build, family: str, rows: Batch) -> None:
    policy = Policy(tiny(family), train_blocks=2).train()
    gradients = []
    for states in (None, policy.trunk_states(rows["tokens"])):
        policy.zero_grad()
        policy(**rows, temperature=1.0, states=states).logprobs.sum().backward()
        gradients.append(
            [p.grad for _, p in policy.trainable_named_parameters() if p.grad is not None]
        )
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("train_blocks", [None, 2])
def test_checkpointing_recomputes_in_train_mode(
    tiny: Build, family: str, rows: Batch, train_blocks: int | None
) -> None:
    policy = Policy(tiny(family), train_blocks).train().set_gradient_checkpointing(True)
    block = decoder_parts(policy.model).blocks[3]
    kind = type(
        getattr(block, "attn", None) or getattr(block, "attention", None) or block.self_attn
    )
    states = None if train_blocks is None else policy.trunk_states(rows["tokens"])
    with mock.patch.object(kind, "forward", autospec=True, side_effect=kind.forward) as calls:
        outputs = policy(**rows, temperature=1.0, states=states)
        forward = calls.call_count
        outputs.logprobs.sum().backward()
        assert forward == (train_blocks or 4)
        assert calls.call_count == 2 * forward  # once more each in the backward pass
    checkpointed = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
    other = Policy(tiny(family), train_blocks, whole_blocks=True).train()
    other(**rows, temperature=1.0, states=states).logprobs.sum().backward()
    plain = [p.grad for p in other.parameters() if p.grad is not None]
    for one, other in zip(checkpointed, plain, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=89, bos_token_id=1, eos_token_id=1),
        LlamaConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            vocab_size=89,
            attention_dropout=0.3,
        ),
    ],
)
def test_dropout_is_off_in_train_mode(config: PreTrainedConfig, rows: Batch) -> None:
    model = AutoModelForCausalLM.from_config(config).train()
    assert not torch.equal(model(rows["tokens"]).logits, model(rows["tokens"]).logits)
    policy = Policy(model).train()
    first, again = (policy(**rows, temperature=1.0).logprobs for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("train_blocks", [0, 5, -1])
def test_number_of_blocks_out_of_range(tiny: Build, train_blocks: int) -> None:
    with pytest.raises(UserError, match=f"train_blocks={train_blocks}: the model has 4 blocks"):
        Policy(tiny("gpt2"), train_blocks)
