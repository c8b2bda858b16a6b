"""The plan of a run by TRL: the files that the worker reads.

plan.json             arguments of TRL's config and what the worker adds to its trainer
model/                the model to start from, and its tokenizer
prompts.jsonl, validation.jsonl, weights.safetensors: see `engines/handover.py`
pairs.jsonl, validation_pairs.jsonl   DPO: {"prompt_ids", "chosen_ids", "rejected_ids"}
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_exp.config.training import (
    AdvantageEstimator,
    DpoConfig,
    DpoLoss,
    GroupScale,
    LossMean,
    PpoConfig,
    TrainingConfig,
)
from rlhf_exp.data.batching import batch_index
from rlhf_exp.data.tokenized import RaggedArray, TokenizedPreferences, TokenizedPrompts
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.engines.handover import WEIGHTS, expected_results, prompt_order, write_prompts
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.pretrained import save_causal_lm
from rlhf_exp.training.optim import lr_multiplier

WORKER = "rlhf_exp.trl.worker.trl_worker"
"""The module that the worker imports; it counts as code of the stage, with `WORKER_PARTS`."""
WORKER_PARTS = (
    "rlhf_exp.trl.worker.trl_common",
    "rlhf_exp.trl.worker.trl_pairs",
    "rlhf_exp.trl.worker.trl_rollouts",
)


def rollout_arguments(section: PpoConfig, steps: int) -> dict[str, Any]:
    """Return the arguments of TRL's `RLOOConfig` or `GRPOConfig`.

    Args:
        section: Hyperparameters.
        steps: Optimizer steps; a whole number of iterations.
    """
    arguments = _arguments(section, steps) | {
        "num_generations": section.samples_per_prompt,
        "steps_per_generation": section.rollouts // (section.micro_batch or section.batch),
        "num_iterations": section.epochs,
        "max_completion_length": section.generation.max_new_tokens,
        "temperature": section.generation.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "beta": section.kl.coef,
        "epsilon": section.clip_range,
    }
    if section.advantage is AdvantageEstimator.rloo:
        return arguments
    return arguments | {
        "scale_rewards": "group" if section.grpo_scale is GroupScale.std else "none",
        "loss_type": "grpo" if section.loss_mean is LossMean.sequences else "bnpo",
        "use_bias_correction_kl": section.kl.unbiased,
    }


def pair_arguments(section: DpoConfig, steps: int) -> dict[str, Any]:
    """Return the arguments of TRL's `DPOConfig`; `rollout_arguments` has those of the others."""
    by_token = section.length_normalised and section.loss is DpoLoss.sigmoid
    return _arguments(section, steps) | {
        "beta": section.beta,
        "loss_type": ["sigmoid_norm" if by_token else section.loss.value],
        "max_length": section.seq_length,
    }


def _arguments(section: TrainingConfig, steps: int) -> dict[str, Any]:
    rows = section.micro_batch or section.batch
    return {
        "max_steps": steps,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": section.batch // rows,
        "learning_rate": section.lr,
        "adam_beta1": section.betas[0],
        "adam_beta2": section.betas[1],
        "adam_epsilon": 1e-8,
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.grad_norm,
        "gradient_checkpointing": section.gradient_checkpointing,
        "seed": section.seed,
        "disable_dropout": True,
        # What this project does itself, or does not want: TRL's defaults are others.
        "bf16": False,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "eval_strategy": "no",
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }


def hand_over_rollouts(
    folder: Path,
    policy: Policy,
    codec: Codec,
    prompts: TokenizedPrompts,
    validation: TokenizedPrompts,
    section: PpoConfig,
    steps: int,
    threads: int,
) -> Path:
    """Write what the worker of RLOO or GRPO reads into `folder`; return the plan's path.

    Args:
        folder: Made here.
        policy: The policy that training starts from, in float32.
        codec: Codec of its tokenizer.
        prompts: The training prompts.
        validation: The validation prompts.
        section: Hyperparameters.
        steps: Optimizer steps; a whole number of iterations.
        threads: CPU threads of the worker.
    """
    originals = prompts.original
    plan = _common(folder, policy, codec, prompts.prompt, originals, section, steps, threads)
    order = prompt_order(len(prompts), section, steps)
    count = min(section.eval_prompts, len(validation))
    numbers = np.unique(order).tolist()
    plan |= {
        "algorithm": section.advantage.value,
        "arguments": rollout_arguments(section, steps),
        "prompts": write_prompts(folder / "prompts.jsonl", prompts, numbers),
        "validation": write_prompts(folder / "validation.jsonl", validation, range(count)),
        "order": order.tolist(),
        "updates": section.updates,
        "max_new_tokens": section.generation.max_new_tokens,
        "temperature": section.generation.temperature,
        "generation_batch": section.generation.batch,
    }
    return _write(folder, plan)


def hand_over_pairs(
    folder: Path,
    policy: Policy,
    codec: Codec,
    pairs: TokenizedPreferences,
    held_out: TokenizedPreferences,
    prompts: TokenizedPrompts | None,
    section: DpoConfig,
    steps: int,
    threads: int,
) -> Path:
    """Write what the worker of DPO reads into `folder`; return the plan's path.

    Args:
        folder: Made here.
        policy: The policy that training starts from, in float32.
        codec: Codec of its tokenizer.
        pairs: Training pairs.
        held_out: Validation pairs.
        prompts: The validation prompts that are answered.
        section: Hyperparameters.
        steps: Optimizer steps.
        threads: CPU threads of the worker.
    """
    plan = _common(folder, policy, codec, pairs.prompt, pairs.chosen, section, steps, threads)
    order = np.concatenate(
        [batch_index(len(pairs), section.batch, section.seed, step) for step in range(steps)]
    )
    met, order = np.unique(order, return_inverse=True)
    every = range(len(held_out))
    validation = folder / "validation.jsonl"
    if prompts is None:
        validation.touch()
    else:
        write_prompts(validation, prompts, range(len(prompts)))
    plan |= {
        "algorithm": "dpo",
        "arguments": pair_arguments(section, steps),
        "pairs": _write_pairs(folder / "pairs.jsonl", pairs, met.tolist()),
        "order": order.tolist(),
        "validation_pairs": _write_pairs(folder / "validation_pairs.jsonl", held_out, every),
        "validation": str(validation),
        "updates": 1,
        "max_new_tokens": section.generation.max_new_tokens,
        "temperature": section.generation.temperature,
        "generation_batch": section.generation.batch,
    }
    return _write(folder, plan)


def _common(
    folder: Path,
    policy: Policy,
    codec: Codec,
    prompts: RaggedArray,
    responses: RaggedArray,
    section: TrainingConfig,
    steps: int,
    threads: int,
) -> dict[str, Any]:
    save_causal_lm(policy.model, codec.tokenizer, folder / "model")
    return {
        "model": str(folder / "model"),
        # Of a tied weight the first name, in the worker too.
        "trained": [name for name, p in policy.model.named_parameters() if p.requires_grad],
        "end_ids": sorted(codec.end_ids),
        "stop_strings": list(codec.stop_strings),
        "eval_every": section.eval_every,
        # The learning rate of each step, as a share of the peak: TRL's warm-up is another.
        "rates": [
            lr_multiplier(section.schedule.value, step, steps, section.warmup_steps)
            for step in range(steps)
        ],
        "seed": section.seed,
        "threads": threads,
        "weights": str(folder / WEIGHTS),
        "check": expected_results(policy.model, codec, prompts, responses),
    }


def _write(folder: Path, plan: dict[str, Any]) -> Path:
    path = folder / "plan.json"
    path.write_text(json.dumps(plan))
    return path


def _write_pairs(path: Path, pairs: TokenizedPreferences, numbers: Iterable[int]) -> str:
    with path.open("w", encoding="utf-8") as file:
        for number in numbers:
            columns = (pairs.prompt, pairs.chosen, pairs.rejected)
            names = ("prompt_ids", "chosen_ids", "rejected_ids")
            row = {
                name: column[number].tolist() for name, column in zip(names, columns, strict=True)
            }
            file.write(json.dumps(row) + "\n")
    return str(path)
