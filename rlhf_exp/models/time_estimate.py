"""An estimate of the time that one PPO iteration takes, by arithmetic alone.

For each phase: the floating-point operations of its matrix products, and the bytes that it cannot
do without reading from memory. A device that does F operations and reads M bytes a second needs at
least max(operations / F, bytes / M) for each part of a phase. No torch, no weights; `rlhf-exp
profile` compares a run with it, and `benchmarks/estimates.py` makes tables of machines from it.

Counted are matrix products, with two operations for a multiplication and an addition: the linear
layers, attention's two products, and the head. Bytes are those of weights, keys and values,
gradients and the optimizer's state. Left out are norms, activation functions and softmax, the
bytes of activations, and communication between processes: a phase of many small parts, or of many
processes, takes longer.

Decoding and training follow Pope et al. 2022 (https://arxiv.org/abs/2211.05102, section 2) and
Kaplan et al. 2020 (https://arxiv.org/abs/2001.08361, section 2.1), with attention's products added.

B rows, S tokens of a row, T response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_exp.models.architecture import (
    Architecture,
    count_lora,
    count_parameters,
    linear_shapes,
)

PHASES = ("sampling", "scoring", "assessing", "updating")
"""The phases of an iteration, in order. `assessing`: log-probabilities, values, reference."""

_ADAMW_BYTES = 28
"""A trained float32 parameter's step: weight, gradient and two moments read, all but the gradient
written."""
_KEPT_LOGITS = 1 << 23
"""Up to so many logits of a micro-batch are kept for the backward pass, as in
`rlhf_exp.algo.logprobs`; more are computed again."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes read from or written to memory."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Return both together."""
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, factor: float) -> Work:
        """Return the work so many times."""
        return Work(self.flops * factor, self.bytes * factor)

    def seconds(self, flops: float, bandwidth: float) -> float:
        """Return the least time on a device.

        Args:
            flops: Operations a second.
            bandwidth: Bytes a second.
        """
        return max(self.flops / flops, self.bytes / bandwidth)


@dataclass(frozen=True)
class Iteration:
    """The sizes of one PPO iteration.

    Attributes:
        rows: B, responses.
        prompt: Mean tokens of a prompt.
        response: T, mean tokens of a response.
        decoded_rows: Rows decoded together.
        scored_rows: Rows of a forward pass without gradients.
        epochs: Passes over the responses.
        updates: Optimizer steps.
        micro_batch: Rows of a forward and backward pass.
    """

    rows: int
    prompt: float
    response: float
    decoded_rows: int
    scored_rows: int
    epochs: int
    updates: int
    micro_batch: int

    @property
    def tokens(self) -> float:
        """S, mean tokens of a row."""
        return self.prompt + self.response


@dataclass(frozen=True)
class Models:
    """What an iteration computes with.

    Attributes:
        policy: The policy's shape.
        train_blocks: How many of its last blocks train; `None`: all.
        lora_rank: Of an adapter; 0: none.
        value_blocks: Blocks that the values have of their own.
        reward: The reward model's shape; `None` where no model of these processes scores.
        reward_blocks: How many of its blocks are its own, over the policy's trunk; `None`: all.
        weight_bytes: Bytes of a number that forward passes compute with, also of the cache.
        captures_states: Whether decoding keeps the states that leave the frozen trunk; otherwise
            one pass more computes them.
        checkpointing: Whether blocks are computed again in the backward pass.
        skips_masked: Whether attention leaves out the pairs that its mask hides.
        runs_all_positions: Whether the last block is run where its output is not read, too.
        optimizer_share: Of what trains, the part that a process steps.
    """

    policy: Architecture
    train_blocks: int | None = None
    lora_rank: int = 0
    value_blocks: int = 0
    reward: Architecture | None = None
    reward_blocks: int | None = None
    weight_bytes: int = 4
    captures_states: bool = True
    checkpointing: bool = False
    skips_masked: bool = True
    runs_all_positions: bool = False
    optimizer_share: float = 1.0

    @property
    def blocks(self) -> int:
        """Blocks of the policy above the frozen trunk."""
        return self.policy.layers if self.train_blocks is None else self.train_blocks

    @property
    def reads_selected(self) -> bool:
        """Whether the last block above a frozen trunk is run only where its output is read."""
        everywhere = self.runs_all_positions or self.checkpointing
        return self.train_blocks is not None and not everywhere


def iteration_work(models: Models, sizes: Iteration) -> dict[str, dict[str, Work]]:
    """Return the parts of each phase in `PHASES`, with the work of each.

    Args:
        models: What is computed with.
        sizes: The iteration, as one process has it.
    """
    trunk = Work()
    if models.train_blocks is not None and not models.captures_states:
        below = models.policy.layers - models.blocks
        trunk = _forward(models, sizes, models.policy, below, 0.0)
    return {
        "sampling": _sampling(models, sizes, trunk),
        "scoring": _scoring(models, sizes),
        "assessing": _assessing(models, sizes, trunk),
        "updating": _updating(models, sizes),
    }


def phase_seconds(parts: Mapping[str, Work], flops: float, bandwidth: float) -> float:
    """Return the least time of a phase: its parts follow each other."""
    return sum(part.seconds(flops, bandwidth) for part in parts.values())


def block_flops(shape: Architecture, tokens: float, pairs: float) -> float:
    """Return the operations of one block's forward pass.

    Args:
        shape: The model's.
        tokens: At which it is run.
        pairs: Of a query and a key, over all rows.
    """
    products = sum(inputs * outputs for inputs, outputs in linear_shapes(shape))
    return 2 * products * tokens + 4 * shape.heads * shape.width_per_head * pairs


def decode_step(shape: Architecture, rows: float, context: float, weight_bytes: int) -> Work:
    """Return the work of one token of each row.

    Args:
        shape: The model's.
        rows: Decoded together.
        context: Mean tokens before the new one.
        weight_bytes: Bytes of a weight, and of a number of the cache.
    """
    head = shape.width * shape.vocabulary
    flops = shape.layers * block_flops(shape, rows, rows * context) + 2 * rows * head
    kept = 2 * shape.key_value_heads * shape.width_per_head * shape.layers
    weights = shape.layers * count_parameters(shape).block + head
    return Work(flops, (weights + rows * context * kept) * weight_bytes)


def _sampling(models: Models, sizes: Iteration, trunk: Work) -> dict[str, Work]:
    shape, rows = models.policy, sizes.rows
    together = min(sizes.decoded_rows, rows)
    pairs = rows * _pairs(sizes.prompt, models.skips_masked)
    flops = shape.layers * block_flops(shape, rows * sizes.prompt, pairs)
    head = 2 * rows * shape.width * shape.vocabulary
    read = shape.layers * count_parameters(shape).block * models.weight_bytes
    # A row's first token comes of its prompt's pass.
    steps = rows * max(sizes.response - 1, 0) / together
    context = sizes.prompt + sizes.response / 2
    step = decode_step(shape, together, context, models.weight_bytes)
    parts = {"prefill": Work(flops + head, read * -(-rows // together)), "decode": step * steps}
    # The trunk's states are computed right away where the reward model needs them, too.
    return parts | ({} if models.reward_blocks is None else {"trunk": trunk})


def _scoring(models: Models, sizes: Iteration) -> dict[str, Work]:
    if models.reward is None:
        return {}
    own = models.reward.layers if models.reward_blocks is None else models.reward_blocks
    return {"reward model": _forward(models, sizes, models.reward, own, None)}


def _assessing(models: Models, sizes: Iteration, trunk: Work) -> dict[str, Work]:
    shape = models.policy
    policy = _forward(models, sizes, shape, models.blocks, sizes.response)
    head = Work(2 * sizes.rows * sizes.response * shape.width * shape.vocabulary)
    parts = {"policy": policy + head, "reference": policy + head}
    if models.value_blocks:
        parts["values"] = _forward(
            models, sizes, shape, models.value_blocks, _values_read(models, sizes)
        )
    return parts | ({"trunk": trunk} if models.reward_blocks is None else {})


def _updating(models: Models, sizes: Iteration) -> dict[str, Work]:
    shape, passed = models.policy, sizes.epochs
    count = count_parameters(shape)
    forward = _forward(
        models, sizes, shape, models.blocks, sizes.response, sizes.micro_batch, passed
    )
    if models.value_blocks:
        read = _values_read(models, sizes)
        forward += _forward(
            models, sizes, shape, models.value_blocks, read, sizes.micro_batch, passed
        )
    head = 2 * sizes.rows * passed * sizes.response * shape.width * shape.vocabulary
    trained = count.trainable(models.train_blocks, shape.tied)
    if models.lora_rank:
        trained = count_lora(shape, models.lora_rank, models.train_blocks)
    whole = models.value_blocks == shape.layers
    trained += count.trunk if whole else count.block * models.value_blocks
    # Of frozen weights only the gradients of their inputs are computed.
    again = 1 if models.lora_rank else 2
    micro_logits = sizes.micro_batch * sizes.response * shape.vocabulary
    head_again = again + (1 if micro_logits > _KEPT_LOGITS else 0)
    gradients = Work(0.0, 8 * trained * passed * sizes.rows / sizes.micro_batch)
    return {
        "forward": forward + Work(head),
        "backward": forward * (again + models.checkpointing) + Work(head_again * head) + gradients,
        "optimizer": Work(0.0, _ADAMW_BYTES * trained * models.optimizer_share * sizes.updates),
    }


def _values_read(models: Models, sizes: Iteration) -> float | None:
    """Return at how many tokens of a row the values' own blocks are read; `None`: run at all."""
    return None if models.value_blocks == models.policy.layers else sizes.response


def _forward(
    models: Models,
    sizes: Iteration,
    shape: Architecture,
    blocks: int,
    read: float | None,
    together: int | None = None,
    passes: int = 1,
) -> Work:
    """Return the work of whole rows through some blocks.

    Args:
        models: How attention and the last block are run.
        sizes: The iteration.
        shape: The model's.
        blocks: How many.
        read: Tokens of a row at which the last block's output is read; 0 or `None`: at all.
        together: Rows of a pass; those without gradients by default.
        passes: How often all rows go through.
    """
    rows, tokens = sizes.rows * passes, sizes.tokens
    pairs = _pairs(tokens, models.skips_masked)
    flops = blocks * block_flops(shape, rows * tokens, rows * pairs)
    if read and models.reads_selected:
        # Over all positions, as far as keys and values; then where it is read, over the whole.
        whole = block_flops(shape, tokens, pairs)
        until_keys = 2 * sum(inputs * outputs for inputs, outputs in _key_layers(shape)) * tokens
        seen = tokens - read / 2 if models.skips_masked else tokens
        flops += rows * (until_keys + block_flops(shape, read, read * seen) - whole)
    read_bytes = blocks * count_parameters(shape).block * models.weight_bytes
    return Work(flops, read_bytes * rows / min(together or sizes.scored_rows, sizes.rows))


def _key_layers(shape: Architecture) -> list[tuple[int, int]]:
    """Return the linear layers that queries, keys and values come of."""
    return linear_shapes(shape)[: 1 if shape.type in ("gpt2", "gpt_neox") else 3]


def _pairs(tokens: float, skips_masked: bool) -> float:
    """Return the pairs of query and key of a row."""
    return tokens * (tokens + 1) / 2 if skips_masked else tokens * tokens
