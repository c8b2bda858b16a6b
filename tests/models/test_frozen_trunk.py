"""Trunk and branch against the whole model.

Parts of models, found by structure.

The last block, run only where its output is read, against the library's whole model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GraniteConfig, OPTConfig, PreTrainedModel

from rlhf_exp.errors import UserError
from rlhf_exp.models.frozen_trunk import (
    TESTED_FAMILIES,
    Branch,
    LastBlock,
    Trunk,
    check_branch,
    decoder_parts,
)
from rlhf_exp.models.lora import LoraSettings
from rlhf_exp.models.policy import Policy

Build = Callable[..., PreTrainedModel]
Batch = dict[str, Tensor]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_branch_over_trunk_is_the_whole_model(
    tiny: Build, family: str, rows: Batch, k: int
) -> None:
    model = tiny(family)
    states = Trunk(model, 4 - k)(rows["tokens"])
    hidden = Branch.of(model, k, share=True)(states)
    whole = model(rows["tokens"], output_hidden_states=True)
    assert torch.equal(states, whole.hidden_states[4 - k])
    assert (model.lm_head(hidden) - whole.logits).abs().max() < 1e-5


def test_sliding_window_of_the_upper_blocks_is_kept(tiny: Build, rows: Batch) -> None:
    model = tiny("qwen2")
    config = copy.deepcopy(model.config)
    config.sliding_window = 4
    config.layer_types = ["full_attention", "full_attention", "full_attention", "sliding_attention"]
    sliding = type(model)(config)
    sliding.load_state_dict(model.state_dict())
    hidden = Branch.of(sliding, 2, share=True)(Trunk(sliding, 2)(rows["tokens"]))
    whole = sliding.base_model(rows["tokens"]).last_hidden_state
    assert torch.equal(hidden, whole)
    assert not torch.allclose(hidden, model.base_model(rows["tokens"]).last_hidden_state)


def test_shared_branch_follows_the_model_and_a_copy_does_not(
    tiny: Build, family: str, rows: Batch
) -> None:
    model = tiny(family)
    states = Trunk(model, 2)(rows["tokens"])
    shared, copied = Branch.of(model, 2, share=True), Branch.of(model, 2, share=False)
    before = shared(states).detach()
    assert torch.equal(copied(states), before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert not torch.allclose(shared(states), before)
    assert torch.equal(copied(states), before)


def test_copy_has_no_gradient_and_no_embedding(tiny: Build, family: str, rows: Batch) -> None:
    model = tiny(family)
    base = Branch.of(model, 1, share=False).module
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert not any(parameter.is_meta for parameter in base.parameters())
    # one block of four and a norm of 32 or 64, no table of 89 x 32
    assert sum(p.numel() for p in base.parameters()) < model.num_parameters() / 3


@pytest.mark.parametrize("k", [0, 5])
def test_number_of_blocks_out_of_range(tiny: Build, k: int) -> None:
    with pytest.raises(UserError, match=f"train_blocks={k}: the model has 4 blocks"):
        Branch.of(tiny("llama"), k, share=True)


def test_a_family_that_does_more_than_its_blocks_is_refused(tiny: Build) -> None:
    model = tiny("llama")
    model.config.model_type = "another"
    check_branch(model, 2)

    def scaled(module: nn.Module, args: object, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * 1.001
        return output

    model.base_model.register_forward_hook(scaled)
    with pytest.raises(UserError, match=r"'another' model cannot be cut.*differ by 0\.001 of"):
        check_branch(model, 2)


def test_a_factor_at_the_entry_is_not_put_on_states_that_enter_a_branch(rows: Batch) -> None:
    # Granite multiplies its embeddings by 12 in the forward that the branch runs too.
    config = GraniteConfig(
        vocab_size=89,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        embedding_multiplier=12.0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    whole = model.base_model(rows["tokens"]).last_hidden_state
    for k in (1, 3):
        found = Branch.of(model, k, share=True)(Trunk(model, 4 - k)(rows["tokens"]))
        torch.testing.assert_close(found, whole, rtol=0, atol=2e-5)


NAMES = {  # blocks, final norm, learned positions: transformers' own names
    "gpt2": ("h", "ln_f", "wpe"),
    "gptj": ("h", "ln_f", None),
    "gpt_neox": ("layers", "final_layer_norm", None),
    "llama": ("layers", "norm", None),
    "qwen2": ("layers", "norm", None),
    "qwen3": ("layers", "norm", None),
}


def test_parts_are_found(tiny: Build, family: str) -> None:
    model = tiny(family)
    for whole in (model, model.base_model):
        parts = decoder_parts(whole)
        assert (parts.blocks_name, parts.norm_name, parts.positions) == NAMES[family]
        assert parts.base is model.base_model
        assert len(parts.blocks) == 4
        assert tuple(parts.embedding.weight.shape) == (89, 32)
        assert (parts.head is None) == (whole is not model)
    assert decoder_parts(model).tied == (family in ("gpt2", "qwen3"))


def test_every_family_is_in_these_tests() -> None:
    assert set(NAMES) == TESTED_FAMILIES


def test_model_built_otherwise_is_refused() -> None:
    config = OPTConfig(
        vocab_size=20, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UserError, match="a 'opt' model is not built as one stack"):
        decoder_parts(AutoModelForCausalLM.from_config(config))


def test_unknown_part_beside_the_blocks_is_named(tiny: Build) -> None:
    model = tiny("llama")
    model.base_model.project_in = nn.Linear(3, 3)
    with pytest.raises(UserError, match=r"project_in \(Linear\)"):
        decoder_parts(model)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_chosen_positions_are_those_of_the_whole_branch(
    tiny: Build, family: str, rows: Batch, k: int
) -> None:
    model = tiny(family)
    states = Trunk(model, 4 - k)(rows["tokens"])
    branch = Branch.of(model, k, share=False)
    positions = torch.tensor([[14, 0, 3], [2, 2, 2], [0, 7, 1], [5, 6, 7]])
    assert branch.supports_forward_at
    found = branch.forward_at(states, positions)
    # Not `branch(states)`: the library's own model.
    whole = model.base_model(rows["tokens"]).last_hidden_state
    for row in range(4):
        for column in range(3):
            expected = whole[row, positions[row, column]]
            assert (found[row, column] - expected).abs().max() < 2e-5


def test_what_is_not_known_to_work_runs_whole(tiny: Build) -> None:
    model = tiny("qwen2")
    assert Branch.of(model, 2, share=True).supports_forward_at
    model.config.layer_types = ["full_attention"] * 3 + ["sliding_attention"]
    assert not Branch.of(model, 2, share=True).supports_forward_at
    model.config.layer_types = ["sliding_attention"] * 3 + ["full_attention"]
    assert Branch.of(model, 2, share=True).supports_forward_at
    another = tiny("llama")
    another.config.model_type = "another"
    assert not Branch.of(another, 2, share=True).supports_forward_at
    for attention, supported in (("sdpa", True), ("eager", True), ("flash_attention_2", False)):
        config = SimpleNamespace(_attn_implementation=attention, model_type="llama")
        assert (
            LastBlock(cast(PreTrainedModel, SimpleNamespace(config=config))).supported == supported
        )


@pytest.mark.parametrize("sdpa_family", ["gpt2", "gpt_neox", "llama", "qwen2", "qwen3"])
def test_the_last_block_is_run_where_it_is_read(tiny: Build, sdpa_family: str, rows: Batch) -> None:
    policies = [Policy(tiny(sdpa_family), 2, run_all_positions=whole) for whole in (False, True)]
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
        policy = Policy(tiny(family), k, lora, run_all_positions=whole).train()
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
