"""Log-probabilities and their gradients against float64 numpy and plain float64 autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_exp.algo import logprobs as module
from rlhf_exp.algo.logprobs import LogitTransform, gather_logprobs

N, D, V, TEMPERATURE = 13, 5, 11, 0.7


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    return hidden, weight, bias, targets


def by_numpy(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> np.ndarray:
    """All log-probabilities [N, V] in float64."""
    logits = hidden.detach().double().numpy() @ weight.detach().double().numpy().T
    if bias is not None:
        logits = logits + bias.detach().double().numpy()
    logits = logits / TEMPERATURE
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk", [4, 100])
def test_values_and_entropy_match_numpy(with_bias: bool, chunk: int) -> None:
    hidden, weight, bias, targets = problem()
    head_bias = bias if with_bias else None
    logprobs, entropy = gather_logprobs(
        hidden, weight, head_bias, targets, TEMPERATURE, chunk, with_entropy=True
    )
    expected = by_numpy(hidden, weight, head_bias)
    assert entropy is not None
    np.testing.assert_allclose(
        logprobs.detach(), expected[np.arange(N), targets.numpy()], rtol=0, atol=1e-5
    )
    np.testing.assert_allclose(
        entropy.detach(), -(np.exp(expected) * expected).sum(1), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("outputs", ["logprobs", "entropy", "both"])
def test_gradients_match_plain_autograd(
    keep: bool, outputs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_KEPT_LOGITS", 10**9 if keep else 0)
    hidden, weight, bias, targets = problem()
    tensors = (hidden, weight, bias)
    pull = torch.randn(2, N, generator=torch.Generator().manual_seed(1))
    if outputs == "logprobs":
        pull[1] = 0
    elif outputs == "entropy":
        pull[0] = 0

    wide = tuple(tensor.detach().double().requires_grad_() for tensor in tensors)
    table = torch.log_softmax((wide[0] @ wide[1].t() + wide[2]) / TEMPERATURE, dim=-1)
    plain = (table[torch.arange(N), targets] * pull[0]).sum()
    plain = plain + (-(table.exp() * table).sum(-1) * pull[1]).sum()
    expected = torch.autograd.grad(plain, wide)

    logprobs, entropy = gather_logprobs(
        hidden, weight, bias, targets, TEMPERATURE, chunk=4, with_entropy=outputs != "logprobs"
    )
    loss = torch.zeros(())
    if outputs != "entropy":
        loss = loss + (logprobs * pull[0]).sum()
    if entropy is not None:
        loss = loss + (entropy * pull[1]).sum()
    for gradient, reference in zip(torch.autograd.grad(loss, tensors), expected, strict=True):
        torch.testing.assert_close(gradient, reference.float(), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_scaled_and_capped_logits_by_plain_autograd(
    keep: bool, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_KEPT_LOGITS", 10**9 if keep else 0)
    tensors = problem()[:3]
    targets = problem()[3]
    wide = tuple(tensor.detach().double().requires_grad_() for tensor in tensors)
    logits = 0.6 * (wide[0] @ wide[1].t() + wide[2])
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    table = torch.log_softmax(logits / TEMPERATURE, dim=-1)
    logprobs = table[torch.arange(N), targets]
    entropy = -(table.exp() * table).sum(-1)
    gradients = torch.autograd.grad(logprobs.sum() + 0.3 * entropy.sum(), wide)

    found, found_entropy = gather_logprobs(
        *tensors,
        targets,
        TEMPERATURE,
        chunk=4,
        with_entropy=True,
        transform=LogitTransform(scale=0.6, cap=cap),
    )
    assert found_entropy is not None
    torch.testing.assert_close(found, logprobs.float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found_entropy, entropy.float(), rtol=0, atol=1e-5)
    loss = found.sum() + 0.3 * found_entropy.sum()
    for gradient, expected in zip(torch.autograd.grad(loss, tensors), gradients, strict=True):
        torch.testing.assert_close(gradient, expected.float(), rtol=1e-5, atol=5e-6)


def test_only_what_requires_gradients_gets_them() -> None:
    hidden, weight, bias, targets = problem()
    frozen = weight.detach()
    logprobs, entropy = gather_logprobs(hidden, frozen, bias.detach(), targets, 1.0)
    assert entropy is None
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert frozen.grad is None
    assert bias.grad is None


def test_half_precision_states_keep_float32_logits() -> None:
    # The same bfloat16 numbers, multiplied and normalised in float64: only the sums' own rounding
    # may differ. Logits rounded to bfloat16 would be off by up to 2^-9 of their size, about 1e-2.
    hidden, weight, bias, targets = problem(torch.bfloat16)
    logprobs, _ = gather_logprobs(hidden, weight, bias, targets, TEMPERATURE)
    assert logprobs.dtype == torch.float32
    expected = by_numpy(hidden, weight, bias)[np.arange(N), targets.numpy()]
    np.testing.assert_allclose(logprobs.detach(), expected, rtol=0, atol=1e-5)
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


def test_chunks_shrink_with_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = module.head_logits

    def spy(hidden: Tensor, *args: object) -> Tensor:
        sizes.append(hidden.shape[0])
        return original(hidden, *args)

    monkeypatch.setattr(module, "head_logits", spy)
    monkeypatch.setattr(module, "HOST_CHUNK_LOGITS", 5 * V)
    hidden, weight, bias, targets = problem()
    gather_logprobs(hidden, weight, bias, targets, 1.0, chunk=4096)
    assert sizes == [5, 5, 3]  # 13 rows, at most 5 at a time


def test_backward_saves_nothing_of_vocabulary_size_when_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_KEPT_LOGITS", 0)
    hidden, weight, bias, targets = problem()
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gather_logprobs(hidden, weight, bias, targets, 1.0, chunk=4, with_entropy=True)
    # Not even one chunk's logits (4 * 11 = 44 of them); the largest are the inputs, 13 * 5 = 65.
    assert sorted(saved) == sorted([N * D, V * D, V, N, N, N])


def test_second_use_of_the_graph_gives_the_same_gradient() -> None:
    hidden, weight, bias, targets = problem()
    logprobs, entropy = gather_logprobs(
        hidden, weight, bias, targets, 1.0, chunk=4, with_entropy=True
    )
    assert entropy is not None
    loss = logprobs.sum() + entropy.sum()
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(first, second)


def test_autocast_runs_the_products_in_its_type() -> None:
    hidden, weight, bias, targets = problem()
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = gather_logprobs(hidden, weight, bias, targets, 1.0)
    rounded = (tensor.detach().bfloat16() for tensor in (hidden, weight))
    plain, _ = gather_logprobs(*rounded, bias.detach(), targets, 1.0)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.detach(), plain, rtol=0, atol=1e-6)
