"""An estimate of the memory that a process takes while it trains, by arithmetic alone.

It is for planning, from the architecture and the settings; no torch, no weights. Weights,
gradients, optimizer, reference, key-value cache and trunk states follow exactly from the numbers of
parameters and elements. Activations count the tensors that autograd keeps for the backward pass
(Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 4, without dropout); the
allocator's fragmentation and the CUDA context (about 1 GiB) come on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from rlhf_exp.models.architecture import Architecture, count_lora, count_parameters


@dataclass(frozen=True)
class Precision:
    """Bytes for each number.

    Attributes:
        weight: a stored weight.
        gradient: a gradient.
        optimizer: AdamW's state for one trained parameter: two moments, and the float32 master
            copy where weights are half precision.
        activation: an activation.
        trained: a stored weight that trains.
        gathered: a weight of those that are made whole to compute with.
        beside: a weight of the reward model.
        exact: of a frozen weight, the copy in host memory that is published, where it is computed
            with in fewer bytes.
    """

    weight: int = 4
    gradient: int = 4
    optimizer: int = 8
    activation: int = 4
    trained: int = 4
    gathered: int = 4
    beside: int = 4
    exact: int = 0


FLOAT32 = Precision()
HALF_WITH_MASTER = Precision(2, 2, 12, 2, trained=2, gathered=2)
"""bfloat16 weights with a float32 master copy in the optimizer (DeepSpeed)."""


@dataclass(frozen=True)
class Sharding:
    """The tensors that are divided over the processes.

    Attributes:
        processes: how many there are.
        optimizer: optimizer state is (ZeRO 1).
        gradients: gradients are (ZeRO 2).
        weights: weights are (ZeRO 3, FSDP).
        blocks: of divided weights, two blocks at a time and all that is no block are whole in an
            update (FSDP); otherwise, as many as `LIVE` (ZeRO 3).
        bucket: gradients are copied into a buffer to be reduced (DeepSpeed's ZeRO).
        overlaps: there are two such buffers, one being filled while the other is reduced (ZeRO 1
            and 2 on GPUs).
        keeps_gradients: their memory is kept while nothing is updated (DDP, ZeRO 3).
        offload: optimizer state, and divided weights, live in host memory.
    """

    processes: int = 1
    optimizer: bool = False
    gradients: bool = False
    weights: bool = False
    blocks: bool = False
    bucket: bool = False
    overlaps: bool = False
    keeps_gradients: bool = False
    offload: bool = False


@dataclass(frozen=True)
class Workload:
    """The tensors of one process's step.

    Attributes:
        rows: rows of one forward and backward.
        tokens: tokens of a row.
        head_tokens: tokens of a row whose log-probabilities are needed.
        gradient_checkpointing: whether a block keeps its input only.
        fused_attention: whether no [tokens, tokens] scores are kept (sdpa, flash attention).
        decoded_rows: rows decoded together; 0 where nothing is sampled.
        cached_rows: rows whose trunk states are kept for an iteration.
        accumulates: whether gradients of several forward passes are added up before a step.
    """

    rows: int
    tokens: int
    head_tokens: int
    gradient_checkpointing: bool = False
    fused_attention: bool = True
    decoded_rows: int = 0
    cached_rows: int = 0
    accumulates: bool = False


LOGITS_CHUNK = 1 << 28
"""Most logits that exist at a time on a GPU, as in `rlhf_exp.algo.logprobs`."""

CHUNK_ROWS = 4096
"""Most positions whose logits exist at a time, as there."""

LIVE = 1_000_000_000
"""Weights that DeepSpeed's ZeRO 3 leaves whole if they are soon needed again: its default."""

KEPT_INNER_LAYERS = {"gpt2": 5, "gptj": 5, "gpt_neox": 2, "llama": 4, "qwen2": 4, "qwen3": 4}
"""Tensors of the feed-forward part's inner width that a block keeps.

A GELU in one kernel keeps its input and output; the approximate one, written out in elementary
steps, five; a gated layer the gate, its activation, the other factor and the product.
"""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process.

    Attributes:
        weights: of the policy, and of blocks of the values' own; this process's part.
        gathered: weights that are whole in an update beside their parts.
        gathered_to_sample: the same while responses are sampled and scored, with two blocks of a
            divided reference or reward model.
        gradients: of what trains, with the bucket from which they are reduced.
        keeps_gradients: whether these are there while nothing is updated, too.
        communication: copies in which gradients are reduced or weights are fetched, the larger.
        at_the_end: whether these are made without activations: everything fits into one.
        optimizer: AdamW's state; 0 where it is offloaded.
        activations: kept for the backward pass.
        logits: the largest chunk of logits with its gradient.
        kv_cache: keys and values of the rows decoded together.
        trunk_states: states entering the first training block, of an iteration's rows.
        reference: the frozen copy for the KL divergence; this process's part.
        reward_model: the reward model; this process's part.
        rollout_copy: the copy that is sampled from.
        host: of host memory (what is offloaded; copies of weights that are computed with rounded).
    """

    weights: int
    gathered: int
    gathered_to_sample: int
    gradients: int
    keeps_gradients: bool
    communication: int
    at_the_end: bool
    optimizer: int
    activations: int
    logits: int
    kv_cache: int
    trunk_states: int
    reference: int
    reward_model: int
    rollout_copy: int = 0
    host: int = 0

    @property
    def peak(self) -> int:
        """The most at one time: sampling and updating take turns."""
        resident = self.weights + self.optimizer + self.reference + self.reward_model
        resident += self.rollout_copy
        passes = self.activations + self.logits
        both = max(passes, self.communication) if self.at_the_end else passes + self.communication
        update = self.gathered + self.gradients + both
        sample = self.gathered_to_sample + self.kv_cache
        if self.keeps_gradients:
            sample += self.gradients
        return resident + self.trunk_states + max(update, sample)


def estimate_memory(
    architecture: Architecture,
    workload: Workload,
    precision: Precision = FLOAT32,
    sharding: Sharding | None = None,
    train_blocks: int | None = None,
    lora_rank: int = 0,
    reference: Literal["none", "shared", "lora", "full"] = "none",
    reward_model: Architecture | None = None,
    reward_blocks: int | None = None,
    value_blocks: int = 0,
    sampled_bytes: int = 0,
) -> MemoryEstimate:
    """Estimate the bytes that one process holds.

    Args:
        architecture: of the trained model.
        workload: sizes of a step.
        precision: bytes for each number.
        sharding: over the processes; none by default.
        train_blocks: how many of the last blocks train; `None`: all.
        lora_rank: of an adapter on the blocks' linear layers; 0: none.
        reference: which kind there is: `shared` copies what trains.
        reward_model: its trunk's shape where it sits in the same process.
        reward_blocks: how many of its blocks are its own, over the policy's trunk; `None`: all.
        value_blocks: how many blocks the values have of their own, all trained; with as many as
            the architecture has, embeddings too.
        sampled_bytes: of a weight in the copy that responses are sampled from, which has what
            trains and what is stored in another size; 0: there is none.
    """
    sharding = sharding or Sharding()
    count = count_parameters(architecture)
    trained = count.trainable(train_blocks, architecture.tied)
    blocks = architecture.layers if train_blocks is None else train_blocks
    stored = count.total
    kept = _frozen_bytes(
        {"none": 0, "lora": 0, "shared": trained, "full": count.total}[reference],
        count.block * blocks,
        count.block,
        min(precision.trained, precision.gathered),
        sharding,
    )
    merged = count.block * blocks if lora_rank else trained
    if precision.weight != sampled_bytes:
        merged = stored
    if lora_rank:
        trained = count_lora(architecture, lora_rank, train_blocks)
        stored += trained
    values = count.trunk if value_blocks == architecture.layers else count.block * value_blocks
    trained, stored = trained + values, stored + values
    optimizer = share_of(trained, sharding, sharding.optimizer) * precision.optimizer
    weights = share_of(stored - trained, sharding, sharding.weights) * precision.weight
    weights += share_of(trained, sharding, sharding.weights) * precision.trained
    rest = count.total - count.block * count.blocks
    live = min(stored, rest + 2 * count.block if sharding.blocks else LIVE)
    away = sharding.offload and sharding.weights
    reduced = reduction_of(trained, stored, live, precision, sharding, workload.accumulates)
    judge = _reward_bytes(reward_model, reward_blocks, precision.beside, sharding)
    host = reduced.host + (stored - trained) * precision.exact + (weights if away else 0)
    host += kept.host + judge.host
    states = workload.cached_rows * workload.tokens * architecture.width
    positions = min(workload.rows * workload.head_tokens, CHUNK_ROWS)
    logits = min(positions * architecture.vocabulary, LOGITS_CHUNK)
    sampled = stored if workload.decoded_rows and sharding.weights else 0
    return MemoryEstimate(
        weights=0 if away else weights,
        gathered=live * precision.gathered if sharding.weights else 0,
        gathered_to_sample=sampled * precision.gathered + max(kept.gathered, judge.gathered),
        gradients=reduced.held,
        keeps_gradients=sharding.keeps_gradients,
        communication=reduced.copies,
        at_the_end=reduced.at_the_end,
        optimizer=0 if sharding.offload else optimizer,
        activations=_activations(architecture, workload, precision, train_blocks, value_blocks),
        logits=2 * 4 * logits,
        kv_cache=kv_cache_bytes(architecture, workload, precision),
        trunk_states=states * precision.activation,
        reference=kept.held,
        reward_model=judge.held,
        rollout_copy=sampled_bytes * merged if workload.decoded_rows else 0,
        host=host + (optimizer if sharding.offload else 0),
    )


class FrozenBytes(NamedTuple):
    """Bytes of a frozen model.

    Attributes:
        held: all the time.
        gathered: of two blocks that are whole while it computes, if it is divided.
        host: of host memory.
    """

    held: int
    gathered: int = 0
    host: int = 0


def _frozen_bytes(
    parameters: int, in_blocks: int, block: int, each: int, sharding: Sharding
) -> FrozenBytes:
    """Return the bytes of a frozen model, whose blocks are divided where weights are.

    Args:
        parameters: of the model; 0: there is none.
        in_blocks: those of them that are in its blocks.
        block: parameters of a block.
        each: bytes of a weight.
        sharding: over the processes.
    """
    if not sharding.weights or not parameters:
        return FrozenBytes(parameters * each)
    part = share_of(in_blocks, sharding, divided=True) * each
    rest, gathered = (parameters - in_blocks) * each, min(2 * block, in_blocks) * each
    return (
        FrozenBytes(rest, gathered, part)
        if sharding.offload
        else FrozenBytes(rest + part, gathered)
    )


def _reward_bytes(
    shape: Architecture | None, blocks: int | None, each: int, sharding: Sharding
) -> FrozenBytes:
    """Return the bytes of a reward model in the same process, of `each` bytes a weight."""
    if shape is None:
        return FrozenBytes(0)
    count = count_parameters(shape)
    in_blocks = count.block * (count.blocks if blocks is None else blocks)
    return _frozen_bytes(_reward_parameters(shape, blocks), in_blocks, count.block, each, sharding)


def reward_bytes(architecture: Architecture, precision: Precision) -> int:
    """Return the bytes of a whole reward model's weights."""
    return _reward_parameters(architecture, None) * precision.beside


def _reward_parameters(shape: Architecture, blocks: int | None) -> int:
    count = count_parameters(shape)
    return count.trunk if blocks is None else count.block * blocks


def kv_cache_bytes(architecture: Architecture, workload: Workload, precision: Precision) -> int:
    """Return the bytes of keys and values of all rows decoded together, at full length."""
    per_token = 2 * architecture.key_value_heads * architecture.width_per_head
    elements = workload.decoded_rows * workload.tokens * architecture.layers * per_token
    return elements * precision.activation


def block_activations(architecture: Architecture, workload: Workload, precision: Precision) -> int:
    """Return the bytes that one block keeps for its backward pass, without checkpointing."""
    shape = architecture
    keys = shape.key_value_heads * shape.width_per_head
    # Of each token: inputs and outputs of the norms, queries, keys, values, attention's output.
    elements = 4 * shape.width + 2 * shape.heads * shape.width_per_head + 2 * keys
    elements += shape.ffn_width * KEPT_INNER_LAYERS[shape.type]
    tokens = workload.rows * workload.tokens
    kept = tokens * elements * precision.activation
    if not workload.fused_attention or shape.type == "gptj":  # GPT-J knows no fused attention
        # The softmax is made in float32, and kept again in the activations' own type.
        each = 4 if precision.activation == 4 else 4 + precision.activation
        kept += tokens * workload.tokens * shape.heads * each
    return kept


def _activations(
    architecture: Architecture,
    workload: Workload,
    precision: Precision,
    train_blocks: int | None,
    value_blocks: int,
) -> int:
    """Return the bytes kept for the backward pass by all blocks that take part in it."""
    blocks = (architecture.layers if train_blocks is None else train_blocks) + value_blocks
    block = block_activations(architecture, workload, precision)
    states = workload.rows * workload.tokens * architecture.width * precision.activation
    if workload.gradient_checkpointing:
        return blocks * states + block + states  # one block at a time is recomputed
    return blocks * block + states


BUCKET = 200_000_000
"""Most gradients that DeepSpeed reduces at a time, as in `rlhf_exp.distributed.deepspeed`."""

PREFETCH = 50_000_000
"""Most weights that DeepSpeed's ZeRO 3 fetches at a time: its default."""


class Reduction(NamedTuple):
    """Bytes of gradients, and of the copies that reducing them takes.

    Attributes:
        held: through the backward pass.
        copies: for a moment beside them.
        at_the_end: whether that moment is outside of forward and backward pass.
        host: of host memory.
    """

    held: int
    copies: int = 0
    at_the_end: bool = True
    host: int = 0


def reduction_of(
    trained: int,
    stored: int,
    live: int,
    precision: Precision,
    sharding: Sharding,
    accumulates: bool,
) -> Reduction:
    """Return the memory of gradients, and of fetching weights in ZeRO 3.

    Seen in DeepSpeed 0.19, tensor by tensor: it copies each gradient into a bucket. A full bucket,
    or what there is at the end, is copied once more (`torch.cat`) and reduced; what this process
    steps is added to its part.
    """
    divided = sharding.gradients or sharding.weights
    # Parts of gradients are added up in float32, whatever they are reduced in.
    part = share_of(trained, sharding, divided) * (4 if divided else precision.gradient)
    if not sharding.bucket:
        fetched = min(live, trained) * precision.gradient if sharding.blocks else 0
        return Reduction(part + fetched)
    bucket = min(BUCKET, trained) * precision.gradient
    second = bucket if sharding.overlaps else 0
    here, away = (0, part) if sharding.offload else (part, 0)
    if not divided:
        # ZeRO 1 fills the bucket after the backward pass, from gradients that are all there.
        return Reduction(part + second, bucket, host=away // sharding.processes)
    if sharding.weights:
        # Weights arrive in one flat buffer, and are copied out of it. When they are stepped, the
        # gradients of the part are copied into one tensor. Offloaded, both are there for good.
        arriving = min(PREFETCH, stored) * precision.gathered
        copies = max(bucket, arriving, here)
        at_the_end = trained <= BUCKET and stored <= PREFETCH
        return Reduction(bucket + here, copies, at_the_end, host=2 * away)
    if trained > BUCKET or accumulates:
        copies = max(bucket, here)
        return Reduction(bucket + second + here, copies, trained <= BUCKET, host=away)
    # One bucket: the part comes into being when it is reduced, in float32 after the copy is gone.
    copies = max(bucket, here) if precision.gradient == 4 else bucket + here
    return Reduction(bucket + second, copies, host=away)


def share_of(parameters: int, sharding: Sharding, divided: bool) -> int:
    """Return how many of some parameters one process has, if they are divided at all."""
    return -(-parameters // sharding.processes) if divided or sharding.weights else parameters
