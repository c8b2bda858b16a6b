"""Preflight checks: requirements of late stages are checked before an early one begins.

Here too: files that the config asks for and that finished results in the store lack.
"""

from __future__ import annotations

from collections.abc import Iterable

from rlhf_exp.config.evaluation import TOXICITY, ScorerKind, needs_reward, parts_of, scores_toxicity
from rlhf_exp.config.experiment import Config, StrategyName
from rlhf_exp.config.training import TrainingConfig
from rlhf_exp.errors import UserError
from rlhf_exp.pipeline.plan import Step, StepState
from rlhf_exp.processes.environment import find_launch_environment


def preflight(config: Config, steps: Iterable[Step]) -> None:
    """Raise if PPO or the evaluation would fail after hours of training for a known reason.

    Raises:
        UserError: Names what is missing and the remedy.
    """
    work = {step.stage for step in steps if step.needs_work}
    judged = "eval" in work and config.eval.samples is None and needs_reward(config.eval.suite)
    if "ppo" in work or judged:
        reward_ready(config)
    if "eval" not in work:
        return
    usual = config.eval.toxicity.scorer_kind is ScorerKind.profanity
    if TOXICITY in parts_of(config.eval.suite) or (
        scores_toxicity(config.eval.suite) and not usual
    ):
        from rlhf_exp.stages.evaluation import toxicity

        toxicity.check(config)


def reward_ready(config: Config) -> None:
    """Raise if the reward server does not answer or the reward model's own GPU is not free.

    Raises:
        UserError: The server does not answer, the GPU does not exist, or a process trains on it.
    """
    reward = config.ppo.reward
    if reward.url is not None:
        from rlhf_exp.stages.scorers import reward_client

        reward_client(reward).check()
    elif reward.gpu is not None and reward.model_scores:
        _check_gpu(config, reward.gpu)


def _check_gpu(config: Config, number: int) -> None:
    import torch

    gpus, training = torch.cuda.device_count(), _local_processes(config)
    reason = None
    if number >= gpus:
        reason = f"this machine has {gpus} GPUs" + (", numbered from 0" if gpus else "")
    elif number < training:
        reason = f"{training} processes train on this machine, on its first {training} GPUs"
    if reason is not None:
        raise UserError(
            f"ppo.reward.placement=gpu:{number}: {reason}. Give another number, or "
            "ppo.reward.placement=shared (each process has the reward model on its own device)"
        )


def _local_processes(config: Config) -> int:
    """Return the number of processes that train on this machine, which is the leader's."""
    if config.distributed.strategy is StrategyName.single:
        return 1
    environment = find_launch_environment()
    return config.distributed.processes if environment is None else environment.local_processes


def lacking_extras(config: Config, steps: list[Step]) -> list[str]:
    """Return a sentence for each result in the store without the snapshots or state asked for.

    Snapshots and state are in no key, so asking for them does not train a finished result again.
    """
    lines = []
    for step in steps:
        if step.state != StepState.cached or step.artifact is None or step.stage == "eval":
            continue
        section: TrainingConfig = getattr(config, step.stage)
        stored = step.artifact.manifest.config.get(step.stage, {})
        wanted: dict[str, object] = {
            "keep_every": section.keep_every,
            "keep": [select.name for select in section.keep],
        }
        if step.stage == "ppo":
            wanted["keep_state"] = config.ppo.keep_state
        lacks = [
            f"{step.stage}.{name}"
            for name, value in wanted.items()
            if value and stored.get(name) != value
        ]
        if lacks:
            lines.append(
                f"{step.stage} {step.key} is in the store without what {' and '.join(lacks)} "
                f"asks for; rerun=[{step.stage}] makes it again with it"
            )
    return lines
