"""Adapters: where they sit, that they start as nothing, and what a saved model holds of them."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_exp.errors import UserError
from rlhf_exp.models import lora
from rlhf_exp.models.lora import LoraSettings, adapter_off, merged_state
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.pretrained import load_tokenizer

Build = Callable[..., PreTrainedModel]
Batch = dict[str, Tensor]


def stir(policy: Policy) -> None:
    """Give the adapter's zero half weights, as training would."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.trainable_named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def test_only_the_adapter_and_the_value_head_train(tiny: Build, family: str) -> None:
    policy = Policy(tiny(family), lora=LoraSettings(rank=4))
    names = [name for name, _ in policy.trainable_named_parameters()]
    assert policy.frozen_blocks is None
    assert all(".lora_" in name or name.startswith("value_head.") for name in names)
    assert not any("lm_head" in name or "embed" in name for name in names)


def test_adapter_above_a_frozen_trunk(tiny: Build, family: str, rows: Batch) -> None:
    policy = Policy(tiny(family), train_blocks=1, lora=LoraSettings(rank=4)).train()
    assert policy.frozen_blocks == 3
    names = [name for name, _ in policy.trainable_named_parameters() if "lora" in name]
    assert names
    assert all(".3." in name for name in names)
    states = policy.trunk_states(rows["tokens"])
    stir(policy)
    after = policy.trunk_states(rows["tokens"])
    assert torch.equal(states, after)
    found = policy.response_outputs(**rows, temperature=1.0, states=states).logprobs
    whole = policy.model(rows["tokens"]).logits.log_softmax(-1)
    # Row 0: prompt of 5, response of 7; token t is predicted at t - 1.
    expected = whole[0, torch.arange(4, 11), rows["tokens"][0, 5:12]]
    assert (found[0, :7] - expected).abs().max() < 2e-5


def test_adapter_starts_as_nothing_and_a_function_of_the_seed(tiny: Build, family: str) -> None:
    tokens = torch.arange(20)[None]
    expected = tiny(family)(tokens).logits
    policies = [Policy(tiny(family), lora=LoraSettings(rank=4), seed=seed) for seed in (1, 1, 2)]
    for policy in policies:
        assert torch.equal(policy.model(tokens).logits, expected)
    first, again, other = (
        {name: p for name, p in policy.trainable_named_parameters() if "lora" in name}
        for policy in policies
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_saved_model_holds_the_adapter(
    tiny: Build, family: str, shared_data: Path, tmp_path: Path
) -> None:
    policy = Policy(tiny(family), lora=LoraSettings(rank=4, alpha=8))
    stir(policy)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    policy.save(tmp_path, load_tokenizer(shared_data / "stories260k"))
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())
    tokens = torch.arange(20)[None]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (plain(tokens).logits - policy.model(tokens).logits).abs().max() < 1e-3
    with adapter_off(policy.model):
        without = policy.model(tokens).logits
    assert (without - policy.model(tokens).logits).abs().max() > 0.1
    assert plain.num_parameters() == tiny(family).num_parameters()


def test_merged_weight_by_hand(tiny: Build) -> None:
    policy = Policy(tiny("llama"), lora=LoraSettings(rank=2, alpha=6, targets=("q_proj",)))
    stir(policy)
    layer = policy.model.model.layers[1].self_attn.q_proj
    # W + alpha / rank * B A
    update = 3 * layer.lora_B.default.weight @ layer.lora_A.default.weight
    merged = merged_state(policy.model)["model.layers.1.self_attn.q_proj.weight"]
    assert (merged - layer.base_layer.weight - update).abs().max() < 1e-6


def test_chosen_targets_only(tiny: Build) -> None:
    policy = Policy(tiny("gpt_neox"), lora=LoraSettings(rank=2, targets=("query_key_value",)))
    names = {name for name, _ in policy.trainable_named_parameters() if "lora" in name}
    assert len(names) == 2 * 4
    assert all("query_key_value" in name for name in names)


def test_unknown_target_lists_the_valid_ones(tiny: Build) -> None:
    with pytest.raises(UserError, match=r"q_proj is no linear layer .* dense, dense_4h_to_h"):
        Policy(tiny("gpt_neox"), lora=LoraSettings(rank=2, targets=("q_proj",)))


def test_half_precision_model_has_a_float32_adapter(tiny: Build, rows: Batch) -> None:
    policy = Policy(tiny("llama").to(torch.bfloat16), lora=LoraSettings(rank=2))
    assert all(p.dtype == torch.float32 for _, p in policy.trainable_named_parameters())
    policy(**rows, temperature=1.0).logprobs.sum().backward()


def test_peft_is_imported_for_lora_alone() -> None:
    """It takes seconds: no module may import it before LoRA is asked for."""
    for path in Path(lora.__file__).parent.glob("*.py"):
        for statement in ast.parse(path.read_text()).body:
            assert not (isinstance(statement, ast.Import | ast.ImportFrom)) or (
                "peft" not in ast.unparse(statement)
            ), path
