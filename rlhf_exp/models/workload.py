"""What a memory plan goes by: bytes of numbers, what is divided, and the tensors of a step."""

from __future__ import annotations

from dataclasses import dataclass


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
    """What is divided over the processes.

    Attributes:
        processes: how many there are.
        optimizer: optimizer state is (ZeRO 1).
        gradients: gradients are (ZeRO 2).
        weights: weights are (ZeRO 3, FSDP).
        blocks: of divided weights, two blocks at a time and all that is no block are whole in an
            update (FSDP); otherwise, as many as `LIVE` (ZeRO 3).
        bucket: gradients are copied into a buffer to be reduced (DeepSpeed's ZeRO).
        keeps_gradients: their memory is kept while nothing is updated (DDP, ZeRO 3).
        offload: optimizer state, and divided weights, live in host memory.
    """

    processes: int = 1
    optimizer: bool = False
    gradients: bool = False
    weights: bool = False
    blocks: bool = False
    bucket: bool = False
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
