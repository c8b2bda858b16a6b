"""Packed rows against the same sequences one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_exp.batch import Demonstrations
from rlhf_exp.errors import UserError
from rlhf_exp.models.packing import packed_attention_mask, packed_mask_for
from rlhf_exp.models.policy import Policy
from tests.models.conftest import PACKED_LENGTHS

Build = Callable[..., PreTrainedModel]


def one_by_one(policy: Policy, batch: Demonstrations) -> Tensor:
    found = []
    for row, lengths in enumerate(PACKED_LENGTHS):
        start = 0
        for length in lengths:
            tokens = batch.tokens[row : row + 1, start : start + length]
            table = policy.model(tokens).logits[0].log_softmax(-1)
            found.append(table[torch.arange(length - 1), tokens[0, 1:]])
            start += length
    return torch.cat(found)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("train_blocks", [None, 2])
def test_packed_equals_separate(
    tiny: Build,
    family: str,
    packed: Demonstrations,
    attention: str,
    train_blocks: int | None,
) -> None:
    model = tiny(family)
    if family != "gptj":
        model.set_attn_implementation(attention)
    policy = Policy(model, train_blocks, value_head=False).train()
    found = policy(packed)
    assert (found - one_by_one(policy, packed)).abs().max() < 2e-5
    found.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in policy.parameters())


def test_packed_equals_separate_within_a_sliding_window(
    tiny: Build, packed: Demonstrations
) -> None:
    model = tiny("qwen2")
    config = copy.deepcopy(model.config)
    config.sliding_window = 3
    config.layer_types = ["full_attention", "sliding_attention"] * 2
    sliding = type(model)(config)
    sliding.load_state_dict(model.state_dict())
    policy = Policy(sliding, value_head=False)
    assert (policy(packed) - one_by_one(policy, packed)).abs().max() < 2e-5
    full = Policy(model, value_head=False)
    assert (policy(packed) - full(packed)).abs().max() > 1e-3


def test_mask_by_hand() -> None:
    mask = packed_attention_mask(torch.tensor([[1, 1, 2, 2, 0]]), torch.bool)
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    assert mask.shape == (1, 1, 5, 5)
    assert mask[0, 0].int().tolist() == expected
    added = packed_attention_mask(torch.tensor([[1, 1, 2, 2, 0]]), torch.float16)
    assert torch.equal(added == 0, mask)
    assert added.min() == torch.finfo(torch.float16).min


def test_window_reaches_back_itself_included() -> None:
    mask = packed_attention_mask(torch.ones(1, 4).long(), torch.bool, window=2)
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_rows_of_one_sequence_need_no_mask(tiny: Build) -> None:
    model = tiny("llama")
    assert packed_mask_for(model, torch.tensor([[1, 1, 0], [1, 1, 1]])) is None


def test_flash_attention_takes_no_packed_rows(tiny: Build, packed: Demonstrations) -> None:
    model = tiny("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UserError, match=r"dpo\.packing\) or model\.attention=sdpa"):
        packed_mask_for(model, packed.segments)
