"""Preflight checks: requirements of late stages are checked before an early one begins.

All that cannot work is reported together, by a run before its first stage and by `rlhf-exp doctor`.
What data, models and judges have to be like is in `stages/readiness.py`; a further check goes into
its list. Here too: files that the config asks for and that finished results in the store lack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_exp.config.evaluation import needs_reward
from rlhf_exp.config.experiment import UNTRAINED, Config, StrategyName
from rlhf_exp.config.training import (
    CONTINUED,
    GenerationConfig,
    RolloutEngineName,
    TrainingConfig,
)
from rlhf_exp.errors import UserError
from rlhf_exp.pipeline.brought_models import model_problems
from rlhf_exp.pipeline.hub import check_reachable, needs
from rlhf_exp.pipeline.local_models import LocalModels, local_models
from rlhf_exp.pipeline.plan import Step, StepState
from rlhf_exp.pipeline.stage_graph import stages_of
from rlhf_exp.processes.environment import find_launch_environment
from rlhf_exp.store.artifact import Artifact
from rlhf_exp.tracking.create import import_early

if TYPE_CHECKING:
    from rlhf_exp.stages.data_module import DataModule

SERVERS_START_S = 120.0
"""Time that vLLM servers are waited for, which may be started together with the run."""

Materials = Callable[[Mapping[str, str]], "DataModule"]


def preflight(config: Config, steps: Iterable[Step], materials: Materials) -> None:
    """Raise if a stage would fail, perhaps after hours of training, for a reason known now.

    Args:
        config: The experiment.
        steps: Its plan.
        materials: Returns its data, given the models that exist; called if anything will run.

    Raises:
        UserError: Names everything that will not work, each with its remedy.
    """
    problems = preflight_problems(config, list(steps), materials)
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise UserError(f"{len(problems)} things will not work:{listed}")


def preflight_problems(config: Config, steps: list[Step] | None, materials: Materials) -> list[str]:
    """Return everything that will not work, each with its remedy.

    Args:
        config: The experiment.
        steps: Its plan; `None` if there is none, so that every stage it needs counts as to be run.
        materials: Returns its data, given the models that exist; called if anything will run.
    """
    work = frozenset(stages_of(config) if steps is None else _to_run(steps))
    if not work:
        return []
    wanted = needs(config, steps or [])
    if wanted:
        try:
            check_reachable(Path(config.output_dir), wanted)
        except UserError as error:  # the other checks would ask the hub again
            return [str(error)]
    problems = list(_service_problems(config, work))
    import_early(config.tracking.mode.value)  # before torch, which the checks import
    from rlhf_exp.stages.readiness import CHECKS, Prospect, readiness_problems

    # What is pickled is converted now: a damaged file must not be found after hours of training.
    local = local_models(config, steps or [])
    given = _given_models(local)
    prospect = Prospect(config, materials(given), work, given)
    problems += readiness_problems(prospect, CHECKS)
    problems += model_problems(config, work, _given_models(local, ours=False), problems)
    return list(dict.fromkeys(problems))


def _to_run(steps: Iterable[Step]) -> set[str]:
    return {step.stage for step in steps if step.needs_work}


def _given_models(local: LocalModels, *, ours: bool = True) -> dict[str, str]:
    """Return the models that exist already and that the plan's own stages have not made.

    Args:
        local: The plan's models, as they are read.
        ours: Whether results of other runs count whose base model this project built: it is of a
            family that the tests compare, whatever was trained from it.
    """
    given = {} if local.base is None else {"base": local.base}
    for step in local.steps:
        models = {role: extra for role, extra in step.extra.items() if role != CONTINUED}
        found = {role: (extra.model, extra.artifact) for role, extra in models.items()}
        if step.model is not None:
            found[step.stage] = step.model, step.artifact
        given |= {
            role: model
            for role, (model, artifact) in found.items()
            if ours or artifact is None or _built_from(artifact) is not None
        }
    return given


def _built_from(artifact: Artifact) -> str | None:
    """Return the base model that a result was trained from, `None` for one built here."""
    path: str | None = artifact.manifest.config.get("model", {}).get("path")
    return path


def _service_problems(config: Config, work: frozenset[str]) -> Iterator[str]:
    """Yield why what scores is not there: a server, or the reward model's own GPU."""
    judged = "eval" in work and config.eval.samples is None and needs_reward(config.eval)
    if {"best_of", "ppo"} & work or judged:
        try:
            reward_ready(config)
        except UserError as error:
            yield str(error)
    samples = {"best_of", "ppo"} & work or ("eval" in work and config.eval.samples is None)
    for key, used in (("ppo.generation", samples), ("dpo.generation", "dpo" in work)):
        if used:
            yield from _sampler_problems(config, key)


def _sampler_problems(config: Config, key: str) -> Iterator[str]:
    """Yield why vLLM is not there: its servers do not answer, or its GPUs are not free."""
    section: GenerationConfig = attrgetter(key)(config)
    if section.engine is not RolloutEngineName.vllm:
        return
    for url in section.urls:
        from rlhf_exp.vllm.server import RemoteServer

        try:
            RemoteServer(url).start(SERVERS_START_S)
        except UserError as error:
            yield str(error)
    for number in section.gpus or []:
        try:
            remedy = f"{key}.placement=shared (each process has a vLLM on its own device)"
            _check_gpu(config, f"{key}.placement", number, remedy)
        except UserError as error:
            yield str(error)


def reward_ready(config: Config) -> None:
    """Raise if the reward server does not answer or the reward model's own GPU is not free.

    Raises:
        UserError: The server does not answer, the GPU does not exist, or a process trains on it.
    """
    reward = config.ppo.reward
    servers = {term.url: term.name for term in reward.terms if term.url is not None}
    if reward.url is not None:
        servers[reward.url] = reward.name
    if servers:
        from rlhf_exp.stages.scorers import reward_client

        for url, name in servers.items():
            reward_client(reward, url, name).check()
    elif reward.gpu is not None and reward.model_scores:
        remedy = "ppo.reward.placement=shared (each process has the reward model on its own device)"
        _check_gpu(config, "ppo.reward.placement", reward.gpu, remedy)


def _check_gpu(config: Config, key: str, number: int, remedy: str) -> None:
    import torch

    gpus, training = torch.cuda.device_count(), _local_processes(config)
    reason = None
    if number >= gpus:
        reason = f"this machine has {gpus} GPUs" + (", numbered from 0" if gpus else "")
    elif number < training:
        reason = f"{training} processes train on this machine, on its first {training} GPUs"
    if reason is not None:
        raise UserError(f"{key}=gpu:{number}: {reason}. Give another number, or {remedy}")


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
        if step.state != StepState.cached or step.artifact is None or step.stage in UNTRAINED:
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
