"""What PPO by trlx is told: from flat settings to the values of trlx's own config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_exp.algo.schedules import Schedule

Scale = Literal["none", "running", "reference"]

PIPELINE, TRAINER = "HandedPrompts", "HandedPpo"
"""Classes of the worker, under the names that trlx finds them by."""

_SCALES = {"none": "ignored", "running": "running", "reference": "ref"}
_UNREACHED = 1e12  # steps of a schedule that stays where it is


@dataclass(frozen=True)
class TrlxSettings:
    """Sizes and coefficients of a run.

    Attributes:
        steps: Optimizer steps; a whole number of iterations.
        rollouts: Responses an iteration.
        batch: Rollouts of an optimizer step.
        epochs: Passes over an iteration's rollouts.
        chunk: Most rows that are sampled, scored and assessed together.
        seq_length: Longest prompt and response together, in tokens.
        max_new_tokens: Longest response in tokens.
        train_blocks: The last k blocks train, with the final norm and an untied head; `None`: all.
        lr: Peak learning rate.
        schedule: `constant`, `linear` or `cosine`, without warm-up.
        betas: AdamW's betas.
        weight_decay: Decoupled weight decay; trlx's is on every parameter.
        grad_norm: L2 norm that gradients are clipped to.
        gamma: Discount a token.
        lam: Lambda of generalised advantage estimation.
        clip_range: Clip range of the probability ratio.
        clip_range_value: Clip range of the value function.
        vf_coef: Weight of the value loss.
        kl_coef: Weight of the KL penalty; the first one if there is a target.
        kl_target: What the adaptive controller aims at; `None`: a fixed weight.
        kl_horizon: Rollouts over which the controller reacts.
        reward_clip: Scores are clipped to plus or minus this; `None`: not.
        scale: What scores are divided by.
        missing_eos_penalty: Subtracted from the score of a response that did not end.
        eval_prompts: Most validation prompts of an evaluation.
        eval_every: Optimizer steps between evaluations.
        seed: Of trlx's own random numbers, and of the order of prompts.
        threads: CPU threads of the worker.
    """

    steps: int
    rollouts: int
    batch: int
    epochs: int
    chunk: int
    seq_length: int
    max_new_tokens: int
    train_blocks: int | None
    lr: float
    schedule: Schedule
    betas: tuple[float, float]
    weight_decay: float
    grad_norm: float
    gamma: float
    lam: float
    clip_range: float
    clip_range_value: float
    vf_coef: float
    kl_coef: float
    kl_target: float | None
    kl_horizon: int
    reward_clip: float | None
    scale: Scale
    missing_eos_penalty: float
    eval_prompts: int
    eval_every: int
    seed: int
    threads: int

    @property
    def updates(self) -> int:
        """Optimizer steps of one iteration."""
        return -(-self.rollouts // self.batch) * self.epochs

    @property
    def iterations(self) -> int:
        """Iterations of the run."""
        return self.steps // self.updates


def trl_config(settings: TrlxSettings, model: Path, folder: Path) -> dict[str, Any]:
    """Return what `TRLConfig.from_dict` reads.

    Args:
        settings: The run's.
        model: Folder of the model to start from, and of its tokenizer.
        folder: Where trlx may write.
    """
    return {
        "method": _method(settings),
        "model": {
            "model_path": str(model),
            "num_layers_unfrozen": settings.train_blocks or -1,
        },
        "tokenizer": {
            "tokenizer_path": str(model),
            "padding_side": "left",
            "truncation_side": "left",
        },
        "optimizer": {
            "name": "adamw",
            "kwargs": {
                "lr": settings.lr,
                "betas": list(settings.betas),
                "eps": 1e-8,
                "weight_decay": settings.weight_decay,
            },
        },
        "scheduler": _scheduler(settings),
        "train": {
            "seq_length": settings.seq_length,
            "epochs": settings.iterations,
            "total_steps": settings.steps,
            "batch_size": settings.batch,
            # The worker evaluates after every iteration for which an evaluation is due, and saves
            # what it is told to.
            "eval_interval": settings.updates,
            "checkpoint_interval": settings.steps + 1,
            "checkpoint_dir": str(folder / "checkpoints"),
            "save_best": False,
            "save_optimizer": False,
            "pipeline": PIPELINE,
            "trainer": TRAINER,
            "tracker": None,
            "seed": settings.seed,
        },
    }


def _method(settings: TrlxSettings) -> dict[str, Any]:
    return {
        "name": "PPOConfig",
        "num_rollouts": settings.rollouts,
        "chunk_size": settings.chunk,
        "ppo_epochs": settings.epochs,
        "init_kl_coef": settings.kl_coef,
        "target": settings.kl_target,
        "horizon": settings.kl_horizon,
        "gamma": settings.gamma,
        "lam": settings.lam,
        "cliprange": settings.clip_range,
        "cliprange_value": settings.clip_range_value,
        "vf_coef": settings.vf_coef,
        "scale_reward": _SCALES[settings.scale],
        "ref_mean": None,
        "ref_std": None,
        "cliprange_reward": settings.reward_clip,
        "gen_kwargs": {
            "max_new_tokens": settings.max_new_tokens,
            "do_sample": True,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
        },
    }


def _scheduler(settings: TrlxSettings) -> dict[str, Any]:
    """Return a schedule of torch's that multiplies the rate at step i as ours does."""
    if settings.schedule == "linear":
        kwargs = {"start_factor": 1.0, "end_factor": 0.0, "total_iters": settings.steps}
        return {"name": "linear", "kwargs": kwargs}
    # The published recipes write a constant rate as a cosine whose end is its start.
    constant = settings.schedule == "constant"
    length = _UNREACHED if constant else settings.steps
    floor = settings.lr if constant else 0.0
    return {"name": "cosine_annealing", "kwargs": {"T_max": length, "eta_min": floor}}


def chunks(rows: int, longest: int) -> list[int]:
    """Return sizes, as equal as can be, of the parts that `rows` are cut into.

    trlx divides by the standard deviation of a part, which one row alone does not have.
    """
    parts = -(-rows // longest)
    return [rows // parts + (number < rows % parts) for number in range(parts)]
