"""What SFT, reward model and PPO share: optimizer, schedule, what trains, intervals."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import II

from rlhf_exp.config.fields import setting


class Schedule(Enum):
    """Learning-rate schedules, after warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Select(Enum):
    """Which weights a stage publishes."""

    best = "best"
    last = "last"


@dataclass
class LoraConfig:
    """Low-rank adaptation (Hu et al. 2021)."""

    rank: int = setting(0, "Rank of the update; 0: no LoRA.")
    alpha: float = setting(16.0, "Scale of the update: alpha / rank.")
    targets: list[str] = setting(
        factory=list, doc="Names of the linear layers adapted; empty: the family's default."
    )


@dataclass
class TrainingConfig:
    """Fields of every training stage."""

    use: str | None = setting(
        None, "Use this hub id, folder, run or store key instead of training.", key=False
    )
    seed: int = setting(II("seed"), "Seed of this stage: data order, initial heads, sampling.")
    batch: int = setting(32, "Rows of an optimizer step, over all processes.")
    micro_batch: int | None = setting(
        None, "Rows of one forward and backward in a process; null: the whole share.", key=False
    )
    lr: float = setting(1e-3, "Peak learning rate of AdamW.")
    schedule: Schedule = setting(Schedule.constant, "Learning-rate schedule after warm-up.")
    warmup_steps: int = setting(0, "Optimizer steps of linear warm-up.")
    betas: list[float] = setting(factory=lambda: [0.9, 0.95], doc="AdamW's two betas.")
    weight_decay: float = setting(1e-6, "AdamW's weight decay, on matrices only.")
    grad_norm: float = setting(1.0, "Gradients are clipped to this L2 norm.")
    train_blocks: int | None = setting(
        None, "Train only the last k blocks, the final norm and an untied head; null: everything."
    )
    lora: LoraConfig = setting(factory=LoraConfig, doc="Low-rank adaptation.")
    gradient_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass to save memory.", key=False
    )
    eval_every: int = setting(50, "Optimizer steps between evaluations on validation data.")
    checkpoint_every: int = setting(
        50, "Optimizer steps between checkpoints (PPO: at the next iteration's end).", key=False
    )
    keep_checkpoints: int = setting(
        2, "Number of latest checkpoints kept while training.", key=False
    )
    keep_every: int | None = setting(
        None,
        "The result also holds the model after every n-th optimizer step (PPO: at the next "
        "iteration's end), in `snapshots/`; null: none.",
        key=False,
    )
    keep: list[Select] = setting(
        factory=list,
        doc="Models that the result also holds, in `snapshots/`: `best`, `last`.",
        key=False,
    )
    select: Select = setting(Select.best, "Publish the weights best on validation, or the last.")
