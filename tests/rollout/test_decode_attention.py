"""Attention of one query a row, against the library's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf_exp.rollout import decoder
from rlhf_exp.rollout.decode_attention import NAME, single_query_attention
from rlhf_exp.rollout.decoder import decoding_mode
from rlhf_exp.rollout.sampler import sample
from tests.rollout.test_sampler import LENGTHS, build, make_prompts, settings


@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_the_librarys_numbers(key_heads: int, masked: bool, scaling: float | None) -> None:
    torch.manual_seed(0)
    query = torch.randn(5, 6, 1, 8)
    whole = torch.randn(2, 5, key_heads, 12, 8)
    key, value = whole[0, :, :, :11], whole[1, :, :, :11]
    mask = torch.rand(5, 1, 1, 11) < 0.5 if masked else None
    if mask is not None:
        mask[..., 0] = True  # each query attends to something
    layer = nn.Module()
    layer.num_key_value_groups = 6 // key_heads  # type: ignore[assignment]
    layer.is_causal = True  # type: ignore[assignment]
    expected, _ = sdpa_attention_forward(layer, query, key, value, mask, 0.0, scaling)
    found, _ = single_query_attention(layer, query, key, value, mask, 0.0, scaling)
    assert found.shape == expected.shape == (5, 1, 6, 8)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def half(family: str) -> PreTrainedModel:
    model = copy.deepcopy(build(family))
    for weight in model.parameters():
        weight.data = weight.data.to(torch.bfloat16)
    return model


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gpt2", "gptj"])
def test_half_precision_samples_as_with_the_librarys_attention(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same but for rounding: log-probabilities of the first tokens, until one differs."""
    model, prompts = half(family), make_prompts(LENGTHS)
    ours = sample(model, prompts, settings(batch=3), seed=5)
    monkeypatch.setattr(decoder, "SINGLE_QUERY", "sdpa")
    theirs = sample(model, prompts, settings(batch=3), seed=5)
    agreeing = 0
    for row, length in enumerate(LENGTHS):
        one, other = ours.tokens[row, length:], theirs.tokens[row, length:]
        same = int((one == other).int().cumprod(0).sum())
        agreeing += same
        torch.testing.assert_close(
            ours.logprobs[row, :same], theirs.logprobs[row, :same], rtol=0, atol=0.05
        )
    assert agreeing > 0.5 * ours.response_lengths.sum()


def test_only_a_model_in_half_precision_on_a_cpu_asks_for_it() -> None:
    for model, expected in (
        (build("llama"), "sdpa"),
        (half("llama"), NAME),
        (half("gptj"), "eager"),
    ):
        before = model.config._attn_implementation
        with decoding_mode(model):
            assert model.config._attn_implementation == expected
        assert model.config._attn_implementation == before
