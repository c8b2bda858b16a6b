"""What a late stage needs from outside is looked at before an early one begins.

What results in the store do not hold although it is asked for now.
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
    """Raise for what PPO or the evaluation would not find after hours of training.

    Raises:
        UserError: Naming what is missing and the remedy.
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
    """Make sure that a reward server answers, and that the reward model's own GPU is there.

    Raises:
        UserError: It does not, or is not, or a process trains there.
    """
    reward = config.ppo.reward
    if reward.url is not None:
        from rlhf_exp.stages.scorers import reward_client

        reward_client(reward).check()
    elif reward.gpu is not None and reward.model_scores:
        _check_gpu(config, reward.gpu)


def _check_gpu(config: Config, number: int) -> None:
    import torch

    found, training = torch.cuda.device_count(), _here(config)
    reason = None
    if number >= found:
        reason = f"this machine has {found} GPUs" + (", numbered from 0" if found else "")
    elif number < training:
        reason = f"{training} processes train on this machine, on its first {training} GPUs"
    if reason is not None:
        raise UserError(
            f"ppo.reward.placement=gpu:{number}: {reason}. Give another number, or "
            "ppo.reward.placement=shared (each process has the reward model on its own device)"
        )


def _here(config: Config) -> int:
    """Return how many processes train on this machine, which is the main one's."""
    if config.distributed.strategy is StrategyName.single:
        return 1
    place = find_launch_environment()
    return config.distributed.processes if place is None else place.local_processes


def lacking_extras(config: Config, steps: list[Step]) -> list[str]:
    """Return a sentence for each result in the store that lacks what it is to hold besides.

    Snapshots and the state are in no key: asking for them does not train again what is there.
    """
    lines = []
    for step in steps:
        if step.state != StepState.cached or step.artifact is None or step.stage == "eval":
            continue
        section: TrainingConfig = getattr(config, step.stage)
        made = step.artifact.manifest.config.get(step.stage, {})
        wanted: dict[str, object] = {
            "keep_every": section.keep_every,
            "keep": [one.name for one in section.keep],
        }
        if step.stage == "ppo":
            wanted["keep_state"] = config.ppo.keep_state
        lacks = [
            f"{step.stage}.{name}"
            for name, value in wanted.items()
            if value and made.get(name) != value
        ]
        if lacks:
            lines.append(
                f"{step.stage} {step.key} is in the store without what {' and '.join(lacks)} "
                f"asks for; rerun=[{step.stage}] makes it again with it"
            )
    return lines
