"""Log-probabilities of tokens from hidden states, without keeping the [N, V] logits in memory.

Dimensions: N positions, V vocabulary, D hidden width.

A language model's head turns [N, D] into [N, V] logits, of which training needs one number a row
(and perhaps the entropy). The logits are computed in chunks of rows, reduced and discarded; the
backward pass recomputes them (as gradient checkpointing would), unless all of them are small.

The logits leave the matrix product in float32 and stay so: a log-softmax in bfloat16 is off by
0.017 nats a token, as much as the KL divergence early in training. For half-precision inputs the
products themselves run in that precision with float32 accumulation; on a CPU, in float32.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

HOST_CHUNK_LOGITS = 1 << 25
"""Most logits of a chunk on a CPU: 128 MiB in float32, whatever the vocabulary."""

ACCELERATOR_CHUNK_LOGITS = 1 << 28
"""The same on a GPU, 1 GiB: smaller products do not fill it, and each adds a gradient of the head's
weight, 2 GiB at a vocabulary of 128k and a width of 4096."""

CHUNK_ROWS = 4096
"""Most rows of a chunk."""

MAX_KEPT_LOGITS = 1 << 23
"""Up to this number of logits in all (32 MiB), keeping them is cheaper than recomputing them."""


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its head's outputs x: logits = cap * tanh(scale * x / cap).

    Attributes:
        scale: factor of the head's outputs, such as 1 / `logits_scaling` of Granite.
        cap: largest absolute value of a logit (Gemma 2's `final_logit_softcapping`); `None`: no
            limit, so that logits = scale * x.
    """

    scale: float = 1.0
    cap: float | None = None

    def apply_(self, logits: Tensor) -> Tensor:
        """Transform a head's outputs [N, V] in place."""
        if self.cap is not None:
            return logits.mul_(self.scale / self.cap).tanh_().mul_(self.cap)
        return logits if self.scale == 1.0 else logits.mul_(self.scale)

    def slope(self, logits: Tensor) -> Tensor | float:
        """Return the derivative of transformed `logits` [N, V] with respect to the head's outputs.

        d/dx cap tanh(scale x / cap) = scale (1 - tanh^2) = scale (1 - (logit / cap)^2).
        """
        if self.cap is None:
            return self.scale
        return logits.div(self.cap).square_().neg_().add_(1.0).mul_(self.scale)


UNCHANGED = LogitTransform()
"""The transform of most models: logits are what their head computes."""


def gather_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk: int = CHUNK_ROWS,
    with_entropy: bool = False,
    transform: LogitTransform = UNCHANGED,
) -> tuple[Tensor, Tensor | None]:
    """Return log-probabilities of `targets`, and entropies, under softmax(logits / temperature).

    `hidden`, `weight` and `bias` receive gradients where they require them, from both outputs.
    Under autocast the matrix products take the autocast type, as a linear layer's would.

    Args:
        hidden: [N, D] final hidden states, float32 or half precision.
        weight: [V, D] of the head.
        bias: [V] of the head, or None.
        targets: [N] int64 token ids.
        temperature: above 0; logits are divided by it.
        chunk: most rows of a chunk; a large vocabulary makes it smaller.
        with_entropy: also return the entropy of each row's distribution.
        transform: makes logits of the head's outputs, before the temperature divides them.

    Returns:
        Log-probabilities [N] float32 and entropies [N] float32 (nats) or None.
    """
    assert temperature > 0, f"temperature {temperature} is not above 0"
    assert hidden.shape[0] == targets.shape[0], f"{hidden.shape} states, {targets.shape} targets"
    assert hidden.shape[1] == weight.shape[1], f"{hidden.shape} states, {weight.shape} head"
    most = HOST_CHUNK_LOGITS if hidden.device.type == "cpu" else ACCELERATOR_CHUNK_LOGITS
    rows = max(1, min(chunk, most // weight.shape[0]))
    differentiable = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    )
    keep = differentiable and hidden.shape[0] * weight.shape[0] <= MAX_KEPT_LOGITS
    dtype = product_dtype(hidden, weight)
    logprobs, entropy = _GatherLogprobs.apply(
        *(hidden, weight, bias, targets, transform, 1.0 / temperature),
        *(rows, with_entropy, keep, dtype),
    )
    return logprobs, entropy if with_entropy else None


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float = 1.0,
    transform: LogitTransform = UNCHANGED,
) -> Tensor:
    """Return float32 logits [N, V] times `scale`; for use without gradients.

    Args:
        hidden: [N, D].
        weight: [V, D], of the same type as `hidden`.
        bias: [V] or None.
        scale: one over the temperature.
        transform: makes logits of the head's outputs.
    """
    logits = _float32_matmul(hidden, weight.t())
    if bias is not None:
        logits += bias
    logits = transform.apply_(logits)
    return logits if scale == 1.0 else logits.mul_(scale)


def _float32_matmul(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product in float32, of float32 or half-precision factors of one type."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a matrix product to `sums` (float32); on a GPU without a tensor for the product."""
    if sums.is_cuda and left.dtype == torch.float32:
        sums.addmm_(left, right)
    elif sums.is_cuda and _adds_half_products(sums.device, left.dtype):
        torch.addmm(sums, left, right, out_dtype=torch.float32, out=sums)
    elif sums.is_cuda:
        sums += _float32_matmul(left, right)
    else:
        # In half precision rounded once more, as mixed precision rounds any weight's gradient: in
        # float32 a CPU with bfloat16 units takes two to seven times as long.
        sums += left @ right


@functools.cache
def _adds_half_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch adds half-precision products to float32 sums; not all versions do."""
    sums = torch.ones(16, 16, device=device)
    factor = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(sums, factor, factor, out_dtype=torch.float32, out=sums)
    except (RuntimeError, TypeError):
        return False
    return bool((sums == 17.0).all())


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the type for `hidden` times `weight`: autocast's, or the narrower of the two."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    if hidden.dtype == weight.dtype:
        return hidden.dtype
    return hidden.dtype if hidden.dtype.itemsize < weight.dtype.itemsize else weight.dtype


class _GatherLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's own untyped context
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        scale: float,
        rows: int,
        with_entropy: bool,
        keep: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        total = hidden.shape[0]
        logprobs = torch.empty(total, device=hidden.device, dtype=torch.float32)
        normaliser = torch.empty_like(logprobs)
        entropy = torch.empty_like(logprobs) if with_entropy else logprobs.new_empty(0)
        kept_logits: list[Tensor] = []
        with torch.autocast(hidden.device.type, enabled=False):
            head = weight.to(dtype)
            for start in range(0, total, rows):
                part = slice(start, start + rows)
                logits = head_logits(hidden[part].to(dtype), head, bias, scale, transform)
                normaliser[part] = torch.logsumexp(logits, dim=-1)
                target_logits = logits.gather(1, targets[part, None]).squeeze(1)
                logprobs[part] = target_logits - normaliser[part]
                if with_entropy:
                    # Not log Z - E[logit]: it loses 20 times the precision to cancellation.
                    all_logprobs = logits - normaliser[part, None]
                    entropy[part] = -(all_logprobs.exp() * all_logprobs).sum(-1)
                if keep:
                    kept_logits.append(logits)
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser, entropy, *kept_logits)
        ctx.scale, ctx.rows, ctx.with_entropy, ctx.dtype = scale, rows, with_entropy, dtype
        ctx.transform = transform
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,  # noqa: ANN401 - torch's own untyped context
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normaliser, entropy, *kept_logits = ctx.saved_tensors
        hidden_needs_grad, weight_needs_grad, bias_needs_grad = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if hidden_needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if weight_needs_grad else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias_needs_grad else None
        with torch.autocast(hidden.device.type, enabled=False):
            head = weight.to(ctx.dtype)
            for number, start in enumerate(range(0, hidden.shape[0], ctx.rows)):
                part = slice(start, start + ctx.rows)
                states = hidden[part].to(ctx.dtype)
                logits = (
                    kept_logits[number]
                    if kept_logits
                    else head_logits(states, head, bias, ctx.scale, ctx.transform)
                )
                grad = _logits_gradient(
                    logits,
                    normaliser[part, None],
                    targets[part, None],
                    None if grad_logprobs is None else grad_logprobs[part, None],
                    None if grad_entropy is None else grad_entropy[part, None],
                    entropy[part, None] if ctx.with_entropy else None,
                ).mul_(ctx.scale)
                if ctx.transform != UNCHANGED:
                    grad *= ctx.transform.slope(logits / ctx.scale)
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                grad_in_dtype = grad.to(ctx.dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = grad_in_dtype @ head
                if grad_weight is not None:
                    _add_product(grad_weight, grad_in_dtype.t(), states)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, *[None] * 7


def _logits_gradient(
    logits: Tensor,
    normaliser: Tensor,
    targets: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    entropy: Tensor | None,
) -> Tensor:
    """Return the gradient [n, V] with respect to the scaled logits [n, V]; the rest is [n, 1].

    d log p_t / d z_j = [j = t] - p_j ;  d H / d z_j = -p_j (log p_j + H).
    """
    grad = logits - normaliser
    if grad_entropy is not None and entropy is not None:
        slope = (grad + entropy).mul_(grad_entropy)
        if grad_logprobs is not None:
            slope += grad_logprobs
        grad.exp_().mul_(slope).neg_()
    else:
        assert grad_logprobs is not None
        grad.exp_().mul_(-grad_logprobs)
    if grad_logprobs is not None:
        grad.scatter_add_(1, targets, grad_logprobs)
    return grad
