"""What PPO by trlx is told: from flat settings to the values of trlx's own config.

What the worker is given: the model in old clothes, the prompts, and a plan.

plan.json          trlx's config, the order of prompts, what is checked before training
prompts.jsonl      {"index": 3, "ids": [...]}: the training prompts that the run meets
validation.jsonl   the same of the validation prompts
model/             see `convert.py`
weights.safetensors   written by the worker: what is published

What trlx logs, under this project's names where it means the same.

Its own measures of KL are left under `trlx/`: they are estimates of another divergence, over prompt
and padding too. Scores, lengths and the sum of log-ratios are counted here, by our definitions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from rlhf_exp.data.batching import batch_index
from rlhf_exp.data.tokenized import TokenizedPrompts
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.training.optim import Schedule
from rlhf_exp.trlx.convert import write_old_model

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


WEIGHTS = "weights.safetensors"
_CHECKED = 16  # texts


def hand_over(
    folder: Path,
    model: PreTrainedModel,
    codec: Codec,
    prompts: TokenizedPrompts,
    validation: TokenizedPrompts,
    settings: TrlxSettings,
) -> Path:
    """Write all that the worker reads into `folder`; return the plan's path.

    Args:
        folder: Made here.
        model: What training starts from, in float32.
        codec: Of its tokenizer.
        prompts: The training prompts.
        validation: The validation prompts.
        settings: The run's.
    """
    write_old_model(model, codec.tokenizer, folder / "model")
    order = prompt_order(len(prompts), settings)
    count = min(settings.eval_prompts, len(validation))
    plan = {
        "config": trl_config(settings, folder / "model", folder),
        "stop_strings": list(codec.stop_strings),
        "prompts": _rows(folder / "prompts.jsonl", prompts, np.unique(order).tolist()),
        "validation": _rows(folder / "validation.jsonl", validation, range(count)),
        "order": order.tolist(),
        "sizes": chunks(settings.rollouts, settings.chunk),
        "eval_every": settings.eval_every,
        "grad_norm": settings.grad_norm,
        "threads": settings.threads,
        "weights": str(folder / WEIGHTS),
        "check": _check(model, codec, prompts),
    }
    path = folder / "plan.json"
    path.write_text(json.dumps(plan))
    return path


def prompt_order(count: int, settings: TrlxSettings) -> np.ndarray:
    """Return the prompts of all rollouts, in the order in which the native engine takes them."""
    return np.concatenate(
        [
            batch_index(count, settings.rollouts, settings.seed, iteration)
            for iteration in range(settings.iterations)
        ]
    )


def _rows(path: Path, prompts: TokenizedPrompts, numbers: Iterable[int]) -> str:
    with path.open("w", encoding="utf-8") as file:
        for number in numbers:
            row = {"index": number, "ids": prompts.prompt[number].tolist()}
            file.write(json.dumps(row) + "\n")
    return str(path)


@torch.no_grad()
def _check(model: PreTrainedModel, codec: Codec, prompts: TokenizedPrompts) -> dict[str, Any]:
    """Return what the worker must find when it reads model and tokenizer.

    Prompts and responses as ids, and the log-probabilities [S - 1] of a prompt's tokens in nats.
    """
    ids = [*prompts.prompt[0].tolist(), codec.eos_id]
    tokens = torch.tensor([ids])
    logits = model.eval()(tokens).logits[:, :-1]
    logprobs = logits.float().log_softmax(-1).gather(-1, tokens[:, 1:, None])
    columns = (prompts.prompt, prompts.original)
    count = min(_CHECKED, len(prompts))
    texts = [codec.decode(column[row].tolist()) for row in range(count) for column in columns]
    text_ids = codec.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return {
        "ids": ids,
        "logprobs": logprobs.flatten().tolist(),
        "texts": texts,
        "text_ids": text_ids,
    }


_ROLLOUTS = {
    "kl_ctl_value": "kl/beta",
    "policy/sqrt_kl": "trlx/sqrt_kl",
}
_UPDATES = {
    "losses/total_loss": "loss/total",
    "losses/policy_loss": "loss/policy",
    "losses/value_loss": "loss/value",
    "policy/clipfrac": "policy/clip_fraction",
    "policy/approx_kl": "trlx/approx_kl",
    "old_values/mean": "value/mean",
    "values/clipfrac": "value/clip_fraction",
}
_LAST = {
    "lr": "optim/lr",
    "grad_norm": "optim/grad_norm",
    "peak": "memory/peak_bytes",
    "time/update": "time/update_s",
}
UPDATE = "losses/total_loss"
"""What trlx logs after an optimizer step, and at no other time."""


@dataclass
class Iteration:
    """One iteration, as far as it is known.

    Attributes:
        scores: Raw scores.
        deltas: Scores less the penalty for not ending and the score of the data's own response;
            empty where that is not subtracted.
        lengths: Tokens of the responses, with what ended them.
        parts: Number of parts in which they were sampled.
        kl: Sum of log policy - log reference of each response; empty where it is not known.
        seconds: That the experience took.
        rollouts: What trlx logged of it: means over the parts.
        updates: What it logged of each optimizer step.
        scaled: Whether scores are divided by their running standard deviation.
    """

    scaled: bool
    scores: list[float] = field(default_factory=list)
    deltas: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    parts: int = 0
    kl: Sequence[float] = ()
    seconds: float = 0.0
    rollouts: Mapping[str, float] = field(default_factory=dict)
    updates: list[Mapping[str, float]] = field(default_factory=list)

    def metrics(self) -> dict[str, float]:
        """Return the iteration's metrics."""
        found = {
            "reward/mean": fmean(self.scores),
            "reward/std": pstdev(self.scores),
            "reward/min": min(self.scores),
            "reward/max": max(self.scores),
            "response/length_mean": fmean(self.lengths),
        }
        if self.deltas:
            found["reward/delta_mean"] = fmean(self.deltas)
        if self.kl:
            found["kl/sequence"] = fmean(self.kl)
        if self.scaled:
            found["reward/scale"] = self.rollouts["rollout_scores/running_std"]
        found |= {name: self.rollouts[theirs] for theirs, name in _ROLLOUTS.items()}
        for theirs, name in _UPDATES.items():
            found[name] = fmean(one[theirs] for one in self.updates)
        found |= {name: self.updates[-1][theirs] for theirs, name in _LAST.items()}
        return found | self._times(found["time/update_s"])

    def _times(self, updating: float) -> dict[str, float]:
        sampling = self.rollouts["time/rollout_generate"] * self.parts
        scoring = self.rollouts["time/rollout_score"] * self.parts
        total = self.seconds + updating
        return {
            "time/rollout_s": sampling,
            "time/score_s": scoring,
            "time/assess_s": self.seconds - sampling - scoring,
            "throughput/samples_per_s": len(self.scores) / total,
            "throughput/tokens_per_s": sum(self.lengths) / total,
        }
