"""Attention in half precision on a CPU, against the library's own."""

from __future__ import annotations

import copy
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf_exp.models import cpu_attention
from rlhf_exp.models.cpu_attention import MOST_KEYS, half_attention
from rlhf_exp.rollout.sampler import sample
from tests.rollout.test_sampler import LENGTHS, build, make_prompts, settings

HALF = torch.bfloat16


def layer(groups: int, causal: bool = True) -> nn.Module:
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = groups, causal  # type: ignore[assignment]
    return module


def with_gradients(
    attention: Any, module: nn.Module, parts: list[Tensor], mask: Tensor | None, **how: Any
) -> list[Tensor]:
    """Return attention's output and the gradients of a sum of it that tells its elements apart."""
    leaves = [part.clone().requires_grad_() for part in parts]
    output, _ = attention(module, *leaves, mask, **how)
    weights = torch.linspace(-1.0, 1.0, output.numel()).view(output.shape)
    (output.float() * weights).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("key_heads", [1, 2, 6])
@pytest.mark.parametrize(
    ("queries", "masked"), [(1, True), (1, False), (4, True), (11, True), (11, False)]
)
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_the_librarys_numbers(
    key_heads: int, queries: int, masked: bool, scaling: float | None
) -> None:
    """Output and gradients are nearer to those of float32 than bfloat16 can tell apart."""
    torch.manual_seed(0)
    query = torch.randn(5, 6, queries, 8).to(HALF)
    whole = torch.randn(2, 5, key_heads, 12, 8).to(HALF)
    parts = [query, whole[0, :, :, :11], whole[1, :, :, :11]]
    mask = torch.rand(5, 1, queries, 11) < 0.5 if masked else None
    if mask is not None:
        mask[..., 0] = True  # each query attends to something
    module = layer(6 // key_heads)
    exact = [part.float() for part in parts]
    expected = with_gradients(sdpa_attention_forward, module, exact, mask, scaling=scaling)
    found = with_gradients(half_attention, module, parts, mask, scaling=scaling)
    assert found[0].shape == expected[0].shape == (5, queries, 6, 8)
    for one, other in zip(found, expected, strict=True):
        error = (one.float() - other).abs().max() / other.abs().max()
        assert error < 0.02


def test_a_layer_that_is_not_causal_sees_all() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(2, 2, 7, 8).to(HALF) for _ in range(3)]
    expected, _ = sdpa_attention_forward(layer(1, False), *(p.float() for p in parts), None)
    found, _ = half_attention(layer(1, False), *parts, None)
    assert (found.float() - expected).abs().max() < 0.02


def test_values_may_be_narrower_than_keys() -> None:
    """As in latent attention, DeepSeek's and MiniCPM3's."""
    torch.manual_seed(0)
    parts = [torch.randn(2, 4, 7, width).to(HALF) for width in (12, 12, 8)]
    module = layer(1)
    exact = [part.float() for part in parts]
    expected = with_gradients(sdpa_attention_forward, module, exact, None)
    found = with_gradients(half_attention, module, parts, None)
    assert found[0].shape == (2, 7, 4, 8)
    for one, other in zip(found, expected, strict=True):
        assert (one.float() - other).abs().max() / other.abs().max() < 0.02


def test_a_query_that_sees_nothing_has_finite_numbers() -> None:
    """It is padding; a NaN would reach other tokens through the products of the next layer."""
    torch.manual_seed(0)
    parts = [torch.randn(1, 2, 5, 8).to(HALF) for _ in range(3)]
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    mask[..., :2, :] = False
    for numbers in with_gradients(half_attention, layer(1), parts, mask):
        assert numbers.isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "keys", "how"),
    [
        (torch.float32, 8, {}),
        (HALF, MOST_KEYS + 1, {}),
        (HALF, 8, {"dropout": 0.5}),
        (HALF, 8, {"softcap": 20.0}),
    ],
)
def test_all_else_is_left_to_the_library(
    dtype: torch.dtype, keys: int, how: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        cpu_attention, "sdpa_attention_forward", lambda *all, **more: asked.append(all)
    )
    parts = [torch.randn(1, 2, keys, 8).to(dtype) for _ in range(3)]
    half_attention(layer(1), *parts, None, **how)
    assert len(asked) == 1


def half(family: str) -> PreTrainedModel:
    model = copy.deepcopy(build(family))
    for weight in model.parameters():
        weight.data = weight.data.to(HALF)
    return model


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gpt2"])
def test_models_sample_with_it_as_with_the_librarys(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same but for rounding: log-probabilities of the first tokens, until one differs."""
    model, prompts = half(family), make_prompts(LENGTHS)
    ours = sample(model, prompts, settings(batch=3), seed=5)
    calls: list[int] = []

    def library(*args: Any, **more: Any) -> Any:
        calls.append(1)
        return sdpa_attention_forward(*args, **more)

    monkeypatch.setitem(cpu_attention.ALL_ATTENTION_FUNCTIONS, "sdpa", library)
    theirs = sample(model, prompts, settings(batch=3), seed=5)
    assert calls
    differences: list[float] = []
    for row, length in enumerate(LENGTHS):
        one, other = ours.tokens[row, length:], theirs.tokens[row, length:]
        same = int((one == other).int().cumprod(0).sum())
        differences += (ours.logprobs[row, :same] - theirs.logprobs[row, :same]).abs().tolist()
    assert len(differences) > 0.5 * ours.response_lengths.sum()
    assert fmean(differences) < 0.03
