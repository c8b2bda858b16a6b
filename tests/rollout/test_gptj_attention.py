"""GPT-J's attention by the fused kernel: the library's outputs, and its own where they differ."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_exp.rollout import gptj_attention
from rlhf_exp.rollout.gptj_attention import fused_attention
from tests.rollout.test_sampler import FAMILIES


def build(dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES["gptj"]()).to(dtype).eval()


TOKENS = torch.arange(40).view(2, 20)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(TOKENS).logits.float()


def test_outputs_are_the_librarys_and_the_model_is_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, calls = build(), []
    expected = logits(model)
    kernel = gptj_attention.scaled_dot_product_attention
    monkeypatch.setattr(
        gptj_attention,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: calls.append(1) or kernel(*args, **kwargs),
    )
    with fused_attention(model):
        found = logits(model)
    assert len(calls) == model.config.n_layer
    assert torch.allclose(found, expected, atol=0.02)
    assert torch.equal(logits(model), expected)
    assert len(calls) == model.config.n_layer


def test_float32_is_left_to_the_library() -> None:
    model = build(torch.float32)
    expected = logits(model)
    with fused_attention(model):
        assert torch.equal(logits(model), expected)


def test_a_kernel_that_differs_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = build()
    expected = logits(model)
    monkeypatch.setattr(
        gptj_attention,
        "scaled_dot_product_attention",
        lambda query, key, value, **kwargs: value.mean(2, keepdim=True).expand_as(query),
    )
    with caplog.at_level(logging.WARNING), fused_attention(model):
        assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), expected)
    assert caplog.text.count("differs from GPT-J's own") == 1
