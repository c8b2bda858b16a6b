"""`sft`: supervised fine-tuning on demonstrations."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from rlhf_exp.config.fields import setting
from rlhf_exp.config.training import TrainingConfig


class LossOn(Enum):
    """Which tokens SFT learns to predict."""

    all = "all"
    response = "response"


@dataclass
class SftConfig(TrainingConfig):
    """Supervised fine-tuning."""

    steps: int | None = setting(None, "Optimizer steps; null: as `epochs` says.")
    epochs: float | None = setting(1.0, "Passes over the demonstrations, where `steps` is null.")
    seq_length: int = setting(256, "Longest sequence in tokens; longer prompts lose their start.")
    packing: bool = setting(True, "Put several demonstrations into one row of `seq_length` tokens.")
    loss_on: LossOn = setting(LossOn.all, "Learn whole dialogues, or responses only.")
