"""The last block, run only where its output is read, against the library's whole model."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import cast
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_exp.models.branch import Branch, Trunk
from rlhf_exp.models.lora import LoraSettings
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.top import TopBlock

Build = Callable[..., PreTrainedModel]
Batch = dict[str, Tensor]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_chosen_positions_are_those_of_the_whole_branch(
    tiny: Build, family: str, rows: Batch, k: int
) -> None:
    model = tiny(family)
    states = Trunk(model, 4 - k)(rows["tokens"])
    branch = Branch.of(model, k, share=False)
    positions = torch.tensor([[14, 0, 3], [2, 2, 2], [0, 7, 1], [5, 6, 7]])
    assert branch.reads
    found = branch.read(states, positions)
    # Not `branch(states)`: the library's own model.
    whole = model.base_model(rows["tokens"]).last_hidden_state
    for row in range(4):
        for column in range(3):
            expected = whole[row, positions[row, column]]
            assert (found[row, column] - expected).abs().max() < 2e-5


def test_what_is_not_known_to_work_runs_whole(tiny: Build) -> None:
    model = tiny("qwen2")
    assert Branch.of(model, 2, share=True).reads
    model.config.layer_types = ["full_attention"] * 3 + ["sliding_attention"]
    assert not Branch.of(model, 2, share=True).reads
    model.config.layer_types = ["sliding_attention"] * 3 + ["full_attention"]
    assert Branch.of(model, 2, share=True).reads
    another = tiny("llama")
    another.config.model_type = "another"
    assert not Branch.of(another, 2, share=True).reads
    for attention, usable in (("sdpa", True), ("eager", True), ("flash_attention_2", False)):
        config = SimpleNamespace(_attn_implementation=attention, model_type="llama")
        assert TopBlock(cast(PreTrainedModel, SimpleNamespace(config=config))).usable == usable


@pytest.mark.parametrize("sdpa_family", ["gpt2", "gpt_neox", "llama", "qwen2", "qwen3"])
def test_the_last_block_is_run_where_it_is_read(tiny: Build, sdpa_family: str, rows: Batch) -> None:
    policies = [Policy(tiny(sdpa_family), 2, whole_blocks=whole) for whole in (False, True)]
    attend = nn.functional.scaled_dot_product_attention
    queries = []
    for policy in policies:
        with mock.patch("torch.nn.functional.scaled_dot_product_attention", wraps=attend) as calls:
            policy.response_outputs(**rows, temperature=1.0)
        queries.append([call.args[0].shape[2] for call in calls.call_args_list])
    # 15 tokens a row, of which the longest response has 12.
    assert queries == [[15, 15, 15, 12], [15, 15, 15, 15]]


@pytest.mark.parametrize("lora", [None, LoraSettings(2, 4.0, ())])
@pytest.mark.parametrize("k", [1, 2])
def test_parts_of_the_last_block_have_the_gradients_of_the_whole(
    tiny: Build, family: str, rows: Batch, k: int, lora: LoraSettings | None
) -> None:
    found = []
    for whole in (False, True):
        policy = Policy(tiny(family), k, lora, whole_blocks=whole).train()
        outputs = policy(**rows, temperature=0.7)
        (outputs.logprobs.square().sum() + outputs.values.square().sum()).backward()
        trained = dict(policy.trainable_named_parameters())
        found.append({name: p.grad for name, p in trained.items()})
    ours, theirs = found
    for name, gradient in theirs.items():
        assert gradient is not None, name
        assert ours[name] is not None, name
        scale = gradient.abs().max()
        assert (ours[name] - gradient).abs().max() <= 2e-5 * max(1.0, scale), name
