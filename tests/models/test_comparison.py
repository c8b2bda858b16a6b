"""Training's log-probabilities against a model's own: what a family does in its own way is seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_exp.models.comparison import TOLERANCE, Comparison, short_windows
from rlhf_exp.models.lora import LoraSettings
from rlhf_exp.models.policy import Policy
from tests.models.families import tiny_model


def policy_of(model: PreTrainedModel, **arguments: Any) -> Policy:
    return Policy(model, value_head=False, **arguments)


def test_what_is_right_differs_by_rounding(tiny: Any, family: str) -> None:
    model = tiny(family)
    compared = Comparison(model)
    assert compared.noise() < 1e-5
    assert compared.rows_of(policy_of(model)) < 1e-4
    assert compared.packed(policy_of(model)) < 1e-4
    assert compared.saved(policy_of(model)) < 1e-5
    assert compared.rows_of(policy_of(model, train_blocks=2)) < 1e-4
    assert compared.adapter(policy_of(model, lora=LoraSettings(rank=2))) < 1e-4


def test_rows_that_see_their_batch_are_seen(tiny: Any) -> None:
    model = tiny("llama")
    compared = Comparison(model)
    layer: nn.Module = model.base_model.layers[1]
    # As a state that is carried over the batch would: 1 % of the mean of all rows.
    layer.register_forward_hook(lambda module, args, out: out + 0.01 * out.mean((0, 1)))
    assert compared.rows_of(policy_of(model)) > TOLERANCE


def test_rows_packed_into_one_must_not_meet(tiny: Any) -> None:
    # A convolution over time reads the last tokens of the row before.
    model = tiny_model("lfm2")
    compared = Comparison(model)
    assert compared.rows_of(policy_of(model)) < 1e-4
    assert compared.packed(policy_of(model)) > 0.1


def test_noise_of_train_mode(tiny: Any) -> None:
    model = tiny("qwen2")
    compared = Comparison(model)

    def jitter(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        scale = 1.0 + 0.1 * torch.rand(()) if module.training else torch.ones(())
        return (args[0] * scale, *args[1:])

    model.base_model.layers[1].mlp.register_forward_pre_hook(jitter)
    assert compared.noise() > TOLERANCE


def test_noise_that_a_config_names_is_switched_off() -> None:
    # Mixtral multiplies its router's inputs by random numbers near 1, OLMo-like families drop
    # activations by a function and not by a module.
    model = tiny_model("mixtral")
    model.train()
    for block in model.base_model.layers:
        block.mlp.jitter_noise = 0.5
        block.self_attn.attention_dropout = 0.5
    assert Comparison(model).noise() > TOLERANCE
    assert Comparison(policy_of(model).model).noise() < 1e-5


def test_an_adapter_that_is_merged_into_other_weights_is_seen(tiny: Any) -> None:
    model = tiny("llama")
    compared = Comparison(model)
    policy = policy_of(model, lora=LoraSettings(rank=2))
    policy.merged_model = lambda: model_without_adapter(tiny)  # type: ignore[method-assign]
    assert compared.adapter(policy) > TOLERANCE


def model_without_adapter(tiny: Any) -> PreTrainedModel:
    return tiny("llama")


def test_positions_scaled_by_the_batch_count_where_rows_are_so_long() -> None:
    model = tiny_model("phi3, longrope")
    model.config.original_max_position_embeddings = 64
    model.config.rope_parameters["original_max_position_embeddings"] = 64
    policy = policy_of(model)
    assert Comparison(model, longest=64).rows_of(policy) < 1e-4
    assert Comparison(model, longest=65).rows_of(policy) > TOLERANCE
    assert model.config.rope_parameters["original_max_position_embeddings"] == 64


def test_windows_are_narrow_meanwhile_only() -> None:
    model = tiny_model("mistral")
    model.config.sliding_window = 4096
    with short_windows(model):
        assert model.config.sliding_window == 8
    assert model.config.sliding_window == 4096
