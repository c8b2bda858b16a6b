"""The plan of a run by trlx: the files that the worker reads.

plan.json             trlx's config, the order of prompts, checks before training
prompts.jsonl         {"index": 3, "ids": [...]}: the training prompts that the run meets
validation.jsonl      the same of the validation prompts
model/                see `convert.py`
weights.safetensors   written by the worker: the weights to publish
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from rlhf_exp.config.training import PpoConfig, Scale, Schedule
from rlhf_exp.data.tokenized import TokenizedPrompts
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.engines.handover import WEIGHTS, expected_results, prompt_order, write_prompts
from rlhf_exp.trlx.convert import write_old_model

WORKER = "rlhf_exp.trlx.worker.trlx_worker"
"""The module that the worker imports; it counts as code of the stage, with `WORKER_PARTS`."""
WORKER_PARTS = ("rlhf_exp.trlx.worker.trlx_trainer",)
PIPELINE, TRAINER = "HandedPrompts", "HandedPpo"
"""Classes of the worker, under the names that trlx finds them by."""

_SCALES = {Scale.none: "ignored", Scale.running: "running", Scale.reference: "ref"}
_UNREACHED = 1e12  # steps of a schedule that stays where it is


def trl_config(section: PpoConfig, steps: int, model: Path, folder: Path) -> dict[str, Any]:
    """Return the values for `TRLConfig.from_dict`.

    Args:
        section: Hyperparameters.
        steps: Optimizer steps; a whole number of iterations.
        model: Folder of the model to start from, and of its tokenizer.
        folder: Where trlx may write.
    """
    return {
        "method": _method(section),
        "model": {
            "model_path": str(model),
            "num_layers_unfrozen": section.train_blocks or -1,
        },
        "tokenizer": {
            "tokenizer_path": str(model),
            "padding_side": "left",
            "truncation_side": "left",
        },
        "optimizer": {
            "name": "adamw",
            "kwargs": {
                "lr": section.lr,
                "betas": list(section.betas),
                "eps": 1e-8,
                "weight_decay": section.weight_decay,
            },
        },
        "scheduler": _scheduler(section, steps),
        "train": {
            "seq_length": section.seq_length,
            "epochs": steps // section.updates,
            "total_steps": steps,
            "batch_size": section.batch,
            # The worker evaluates after every iteration for which an evaluation is due, and saves
            # weights only when it is told to.
            "eval_interval": section.updates,
            "checkpoint_interval": steps + 1,
            "checkpoint_dir": str(folder / "checkpoints"),
            "save_best": False,
            "save_optimizer": False,
            "pipeline": PIPELINE,
            "trainer": TRAINER,
            "tracker": None,
            "seed": section.seed,
        },
    }


def _method(section: PpoConfig) -> dict[str, Any]:
    return {
        "name": "PPOConfig",
        "num_rollouts": section.rollouts,
        "chunk_size": section.generation.batch,
        "ppo_epochs": section.epochs,
        "init_kl_coef": section.kl.coef,
        "target": section.kl.target,
        "horizon": section.kl.horizon,
        "gamma": section.gamma,
        "lam": section.lam,
        "cliprange": section.clip_range,
        "cliprange_value": section.clip_range_value,
        "vf_coef": section.vf_coef,
        "scale_reward": _SCALES[section.reward.scale],
        "ref_mean": None,
        "ref_std": None,
        "cliprange_reward": section.reward.clip,
        "gen_kwargs": {
            "max_new_tokens": section.generation.max_new_tokens,
            "do_sample": True,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
        },
    }


def _scheduler(section: PpoConfig, steps: int) -> dict[str, Any]:
    """Return a schedule of torch's that multiplies the rate at step i as ours does."""
    if section.schedule is Schedule.linear:
        kwargs = {"start_factor": 1.0, "end_factor": 0.0, "total_iters": steps}
        return {"name": "linear", "kwargs": kwargs}
    # The published recipes write a constant rate as a cosine whose end is its start.
    constant = section.schedule is Schedule.constant
    length = _UNREACHED if constant else steps
    floor = section.lr if constant else 0.0
    return {"name": "cosine_annealing", "kwargs": {"T_max": length, "eta_min": floor}}


def chunks(rows: int, longest: int) -> list[int]:
    """Return sizes, as equal as can be, of the parts that `rows` are cut into.

    trlx divides by the standard deviation of a part, which one row alone does not have.
    """
    parts = -(-rows // longest)
    return [rows // parts + (number < rows % parts) for number in range(parts)]


def hand_over(
    folder: Path,
    model: PreTrainedModel,
    codec: Codec,
    prompts: TokenizedPrompts,
    validation: TokenizedPrompts,
    section: PpoConfig,
    steps: int,
    threads: int,
) -> Path:
    """Write the files that the worker reads into `folder`; return the plan's path.

    Args:
        folder: Made here.
        model: The model that training starts from, in float32.
        codec: Codec of its tokenizer.
        prompts: The training prompts.
        validation: The validation prompts.
        section: Hyperparameters.
        steps: Optimizer steps; a whole number of iterations.
        threads: CPU threads of the worker.
    """
    write_old_model(model, codec.tokenizer, folder / "model")
    order = prompt_order(len(prompts), section, steps)
    count = min(section.eval_prompts, len(validation))
    plan = {
        "config": trl_config(section, steps, folder / "model", folder),
        "stop_strings": list(codec.stop_strings),
        "prompts": write_prompts(folder / "prompts.jsonl", prompts, np.unique(order).tolist()),
        "validation": write_prompts(folder / "validation.jsonl", validation, range(count)),
        "order": order.tolist(),
        "sizes": chunks(section.rollouts, section.generation.batch),
        "eval_every": section.eval_every,
        "grad_norm": section.grad_norm,
        "threads": threads,
        "weights": str(folder / WEIGHTS),
        "check": expected_results(model, codec, prompts.prompt, prompts.original),
    }
    path = folder / "plan.json"
    path.write_text(json.dumps(plan))
    return path
