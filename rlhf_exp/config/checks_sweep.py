"""Checks of a multirun: every point of it, and its jobs on Slurm.

A problem that several points share is reported once, with the points that have it.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf_exp.config.checks import config_problems
from rlhf_exp.config.experiment import Config, PrecisionName, StageName
from rlhf_exp.config.launchers import SlurmConfig
from rlhf_exp.config.overrides import point_labels
from rlhf_exp.config.problems import Problem, format_value
from rlhf_exp.errors import UserError

_POSITIVE_FIELDS = ("cpus_per_process", "time_min", "concurrent_jobs", "signal_delay_s", "poll_s")
_NON_NEGATIVE_FIELDS = ("gpus_per_node", "grace_s", "max_restarts")
MAX_POINTS_NAMED = 3


def check_points(
    points: Sequence[Sequence[str]], compose: Callable[[Sequence[str]], Config]
) -> tuple[list[Config], list[str]]:
    """Compose and check every point of a multirun.

    Args:
        points: The overrides of each point.
        compose: Returns the config of overrides, or raises `UserError`.

    Returns:
        The configs of the points that can be composed, and the problems, each once. A problem
        that not all points have is followed by those that have it.
    """
    configs: list[Config] = []
    points_with: dict[str, list[int]] = {}
    for index, overrides in enumerate(points):
        problems: list[Problem | UserError] = []
        try:
            config = compose(overrides)
        except UserError as error:
            problems.append(error)
        else:
            configs.append(config)
            problems += config_problems(config, multirun=True)
        for text in dict.fromkeys(str(problem) for problem in problems):
            points_with.setdefault(text, []).append(index)
    return configs, [
        text + describe_points(points, set(indices)) for text, indices in points_with.items()
    ]


def describe_points(points: Sequence[Sequence[str]], affected: set[int]) -> str:
    """Return the points that have a problem, as text to append to its message; "" for all points.

    Points are described by the overrides that only they have, else by their labels.

    Args:
        points: The overrides of each point.
        affected: The numbers of the points with the problem, from 0.
    """
    if len(affected) == len(points):
        return ""
    count = f"{len(affected)} of {len(points)} points"
    others = {text for index, point in enumerate(points) if index not in affected for text in point}
    common = set.intersection(*(set(points[index]) for index in affected)) - others
    if common:
        return f" ({count}: all with {' '.join(sorted(common))})"
    names = [name for index, name in enumerate(point_labels(points)) if index in affected]
    hidden = len(affected) - MAX_POINTS_NAMED
    unnamed = f"; and {hidden} more" if hidden > 0 else ""
    return f" ({count}: {'; '.join(names[:MAX_POINTS_NAMED])}{unnamed})"


def slurm_problems(site: SlurmConfig, configs: Sequence[Config]) -> list[Problem]:
    """Return the problems that keep a multirun from being submitted.

    Args:
        site: The launcher's section.
        configs: The configs of all jobs.
    """
    problems = [*_site_problems(site), *_missing_programs()]
    job_kinds = [(config.distributed.strategy, config.distributed.processes) for config in configs]
    for job_kind in job_kinds:
        if job_kind != job_kinds[0]:
            first, other = (
                f"{strategy.name} with {count} processes"
                for strategy, count in (job_kinds[0], job_kind)
            )
            message = (
                f"a multirun on Slurm has one kind of job, and these are {first} and {other}. "
                "Start one multirun for each, under names of their own."
            )
            return [*problems, Problem("distributed", "", message)]
    for config in configs[:1]:
        shape = job_shape(site, config)
        if isinstance(shape, Problem):
            problems.append(shape)
        elif shape.gpus_per_node and _chooses_precision(configs):
            message = (
                "the jobs' GPUs are those of other machines, and cannot be looked at here: write "
                "bfloat16 (for NVIDIA's Ampere and later, such as A100 and H100) or float32."
            )
            problems.append(Problem("distributed.precision", "auto", message))
    return problems


def _chooses_precision(configs: Sequence[Config]) -> bool:
    return any(config.distributed.precision is PrecisionName.auto for config in configs)


def _site_problems(site: SlurmConfig) -> list[Problem]:
    problems = [(name, "must be above 0.") for name in _POSITIVE_FIELDS if getattr(site, name) <= 0]
    problems += [
        (name, "must not be negative.") for name in _NON_NEGATIVE_FIELDS if getattr(site, name) < 0
    ]
    if site.processes_per_node is not None and site.processes_per_node < 1:
        problems.append(("processes_per_node", "must be above 0, or null."))
    if site.grace_s >= site.signal_delay_s:
        problems.append(("grace_s", f"must be below signal_delay_s={site.signal_delay_s}."))
    return [
        Problem(f"hydra.launcher.{name}", format_value(getattr(site, name)), message)
        for name, message in problems
    ]


def _missing_programs() -> list[Problem]:
    problems = []
    if importlib.util.find_spec("submitit") is None:
        remedy = "needs submitit: `pip install submitit` (extra `slurm`)."
        problems.append(Problem("hydra/launcher", "slurm", remedy))
    if shutil.which("sbatch") is None:
        remedy = "there is no sbatch here: start it on a login node of the cluster."
        problems.append(Problem("hydra/launcher", "slurm", remedy))
    return problems


@dataclass(frozen=True)
class JobShape:
    """Resources of every job of a multirun.

    Attributes:
        nodes: Number of nodes.
        tasks_per_node: Processes on each.
        gpus_per_node: GPUs on each: one for each process, and the reward model's own; 0: none.
    """

    nodes: int
    tasks_per_node: int
    gpus_per_node: int


def job_shape(site: SlurmConfig, config: Config) -> JobShape | Problem:
    """Return the nodes and tasks that `distributed` needs on a site, or why they do not fit."""
    processes = config.distributed.processes
    per_node = site.processes_per_node or site.gpus_per_node or processes
    nodes = -(-processes // per_node)
    if processes % nodes:
        sizes = f"{processes // nodes * nodes} or {-(-processes // nodes) * nodes}"
        return Problem(
            "distributed.processes",
            str(processes),
            f"{nodes} nodes of {per_node} processes get equal shares: use {sizes}, or change "
            "hydra.launcher.gpus_per_node or .processes_per_node.",
        )
    share = processes // nodes
    reward_gpu = _reward_gpu(config)
    gpus = share if reward_gpu is None else max(share, reward_gpu + 1)
    if reward_gpu is not None and not share <= reward_gpu < site.gpus_per_node:
        return Problem(
            "ppo.reward.placement",
            f"gpu:{reward_gpu}",
            f"of a node's hydra.launcher.gpus_per_node={site.gpus_per_node} the first {share} "
            "train; name another, or use ppo.reward.placement=shared.",
        )
    return JobShape(nodes, share, gpus if site.gpus_per_node else 0)


def _reward_gpu(config: Config) -> int | None:
    """Return the number of the reward model's own GPU; None if it has none."""
    model_scores = (
        config.stage not in (StageName.sft, StageName.reward) and config.ppo.reward.model_scores
    )
    return config.ppo.reward.gpu if model_scores else None
