"""What a process holds in memory while it trains, by arithmetic alone.

An estimate for planning, from the architecture and the settings; no torch, no weights. Weights,
gradients, optimizer, reference, key-value cache and trunk states follow exactly from the numbers of
parameters and elements. Activations count the tensors that autograd keeps for the backward pass
(Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 4, without dropout); the
allocator's fragmentation and the CUDA context (about 1 GiB) come on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_exp.models.architecture import Architecture, count_lora, count_parameters
from rlhf_exp.models.reduction import reduction_of, share_of
from rlhf_exp.models.workload import FLOAT32, Precision, Sharding, Workload

LOGITS_CHUNK = 1 << 25
"""Most logits that exist at a time, as in `rlhf_exp.algo.logprobs`."""

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
        gathered_to_sample: the same while responses are sampled and scored.
        gradients: of what trains, with the bucket from which they are reduced.
        keeps_gradients: whether these are there while nothing is updated, too.
        communication: copies in which gradients are reduced or weights are fetched, the larger.
        at_the_end: whether these are made without activations: everything fits into one.
        optimizer: AdamW's state; 0 where it is offloaded.
        activations: kept for the backward pass.
        logits: the largest chunk of logits with its gradient.
        kv_cache: keys and values of the rows decoded together.
        trunk_states: states entering the first training block, of an iteration's rows.
        reference: the frozen copy for the KL divergence.
        reward_model: the reward model.
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
    host: int = 0

    @property
    def peak(self) -> int:
        """The most at one time: sampling and updating take turns."""
        resident = self.weights + self.optimizer + self.reference + self.reward_model
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
    """
    sharding = sharding or Sharding()
    count = count_parameters(architecture)
    trained = count.trainable(train_blocks, architecture.tied)
    stored = count.total
    copied = {"none": 0, "lora": 0, "shared": trained, "full": count.total}[reference]
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
    host = reduced.host + (stored - trained) * precision.exact + (weights if away else 0)
    states = workload.cached_rows * workload.tokens * architecture.width
    logits = workload.rows * workload.head_tokens * architecture.vocabulary
    sampled = stored if workload.decoded_rows and sharding.weights else 0
    return MemoryEstimate(
        weights=0 if away else weights,
        gathered=live * precision.gathered if sharding.weights else 0,
        gathered_to_sample=sampled * precision.gathered,
        gradients=reduced.held,
        keeps_gradients=sharding.keeps_gradients,
        communication=reduced.copies,
        at_the_end=reduced.at_the_end,
        optimizer=0 if sharding.offload else optimizer,
        activations=_activations(architecture, workload, precision, train_blocks, value_blocks),
        logits=2 * 4 * min(LOGITS_CHUNK, logits),
        kv_cache=kv_cache_bytes(architecture, workload, precision),
        trunk_states=states * precision.activation,
        reference=copied * min(precision.weight, precision.gathered),
        reward_model=_reward_parameters(reward_model, reward_blocks) * precision.beside,
        host=host + (optimizer if sharding.offload else 0),
    )


def reward_bytes(architecture: Architecture, precision: Precision) -> int:
    """Return the bytes of a whole reward model's weights."""
    return _reward_parameters(architecture, None) * precision.weight


def _reward_parameters(shape: Architecture | None, blocks: int | None) -> int:
    if shape is None:
        return 0
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
