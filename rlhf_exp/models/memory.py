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

LOGITS_CHUNK = 1 << 25
"""Most logits that exist at a time, as in `rlhf_exp.algo.logprobs`."""


KEPT_INNER_LAYERS = {"gpt2": 5, "gptj": 5, "gpt_neox": 2, "llama": 4, "qwen2": 4, "qwen3": 4}
"""Tensors of the feed-forward part's inner width that a block keeps.

A GELU in one kernel keeps its input and output; the approximate one, written out in elementary
steps, five; a gated layer the gate, its activation, the other factor and the product.
"""


@dataclass(frozen=True)
class Precision:
    """Bytes for each number.

    Attributes:
        weight: a stored weight.
        gradient: a gradient.
        optimizer: AdamW's state for one trained parameter: two moments, and the float32 master
            copy where weights are half precision.
        activation: an activation.
    """

    weight: int = 4
    gradient: int = 4
    optimizer: int = 8
    activation: int = 4


FLOAT32 = Precision()
AUTOCAST = Precision(weight=4, gradient=4, optimizer=8, activation=2)
"""Float32 weights, products in bfloat16 (torch's autocast)."""
HALF_WITH_MASTER = Precision(weight=2, gradient=2, optimizer=12, activation=2)
"""bfloat16 weights with a float32 master copy in the optimizer (DeepSpeed)."""


@dataclass(frozen=True)
class Sharding:
    """What is divided over the processes.

    Attributes:
        processes: how many there are.
        optimizer: optimizer state is (ZeRO 1).
        gradients: gradients are (ZeRO 2).
        weights: weights are (ZeRO 3, FSDP); one block at a time is whole.
        offload: optimizer state lives in host memory.
    """

    processes: int = 1
    optimizer: bool = False
    gradients: bool = False
    weights: bool = False
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
    """

    rows: int
    tokens: int
    head_tokens: int
    gradient_checkpointing: bool = False
    fused_attention: bool = True
    decoded_rows: int = 0
    cached_rows: int = 0


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process.

    Attributes:
        weights: of the policy, and of blocks of the values' own.
        gradients: of what trains.
        optimizer: AdamW's state; 0 where it is offloaded.
        activations: kept for the backward pass.
        logits: the largest chunk of logits with its gradient.
        kv_cache: keys and values of the rows decoded together.
        trunk_states: states entering the first training block, of an iteration's rows.
        reference: the frozen copy for the KL divergence.
        reward_model: the reward model.
        host: of host memory (offloaded optimizer state).
    """

    weights: int
    gradients: int
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
        update = self.gradients + self.activations + self.logits
        return resident + self.trunk_states + max(update, self.kv_cache)


def estimate_memory(
    architecture: Architecture,
    workload: Workload,
    precision: Precision = FLOAT32,
    sharding: Sharding | None = None,
    train_blocks: int | None = None,
    lora_rank: int = 0,
    reference: Literal["none", "shared", "lora", "full"] = "none",
    reward_model: Architecture | None = None,
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
    whole = value_blocks == architecture.layers
    values = count.trunk if whole else count.block * value_blocks
    trained += values
    stored += values

    def share(parameters: int, divided: bool) -> int:
        return -(-parameters // sharding.processes) if divided else parameters

    whole_block = count.block if sharding.weights and sharding.processes > 1 else 0
    optimizer = share(trained, sharding.optimizer or sharding.weights) * precision.optimizer
    gradients = share(trained, sharding.gradients or sharding.weights) * precision.gradient
    weights = (share(stored, sharding.weights) + whole_block) * precision.weight
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        optimizer=0 if sharding.offload else optimizer,
        activations=_activations(architecture, workload, precision, train_blocks, value_blocks),
        logits=2
        * 4
        * min(LOGITS_CHUNK, workload.rows * workload.head_tokens * architecture.vocabulary),
        kv_cache=kv_cache_bytes(architecture, workload, precision),
        trunk_states=workload.cached_rows
        * workload.tokens
        * architecture.width
        * precision.activation,
        reference=copied * precision.weight,
        reward_model=0
        if reward_model is None
        else count_parameters(reward_model).trunk * precision.weight,
        host=optimizer if sharding.offload else 0,
    )


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
