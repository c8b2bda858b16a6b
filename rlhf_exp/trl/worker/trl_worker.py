"""DPO, RLOO and GRPO by TRL, for `rlhf_exp/engines/worker/`, in an interpreter that has TRL."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from engine_line import WorkerChannel
from engine_model import check

LIBRARIES = ("trl", "transformers", "tokenizers", "accelerate", "torch")
MODULES = {"dpo": "trl_pairs", "rloo": "trl_rollouts", "grpo": "trl_rollouts"}


def work(line: WorkerChannel, plan: dict[str, Any]) -> None:
    """Carry out the plan."""
    torch.set_num_threads(plan["threads"])
    check(plan["model"], plan["check"])
    importlib.import_module(MODULES[plan["algorithm"]]).train(line, plan)
