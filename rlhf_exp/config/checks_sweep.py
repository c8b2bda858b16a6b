"""Checks of a multirun on Slurm: the site's values, and one shape for all its jobs.

What is wrong with the points of a multirun: all of it at once, and where.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf_exp.config.checks import config_problems
from rlhf_exp.config.experiment import Config, StageName
from rlhf_exp.config.launchers import SlurmConfig
from rlhf_exp.config.overrides import point_labels
from rlhf_exp.config.problems import Problem, format_value
from rlhf_exp.errors import UserError

_POSITIVE = ("cpus_per_process", "time_min", "concurrent_jobs", "signal_delay_s", "poll_s")
_NOT_NEGATIVE = ("gpus_per_node", "grace_s", "max_restarts")


@dataclass(frozen=True)
class JobShape:
    """What every job of a multirun gets.

    Attributes:
        nodes: Number of nodes.
        tasks_per_node: Processes on each.
        gpus_per_node: GPUs on each, one for each process, and the reward model's own; 0: none.
    """

    nodes: int
    tasks_per_node: int
    gpus_per_node: int


def job_shape(site: SlurmConfig, config: Config) -> JobShape | Problem:
    """Return the nodes and tasks that `distributed` needs on a site."""
    processes = config.distributed.processes
    most = site.processes_per_node or site.gpus_per_node or processes
    nodes = -(-processes // most)
    if processes % nodes:
        fits = f"{processes // nodes * nodes} or {-(-processes // nodes) * nodes}"
        return Problem(
            "distributed.processes",
            str(processes),
            f"{nodes} nodes of {most} processes get equal shares: use {fits}, or change "
            "hydra.launcher.gpus_per_node or .processes_per_node.",
        )
    each = processes // nodes
    placed = _placed(config)
    gpus = each if placed is None else max(each, placed + 1)
    if placed is not None and not each <= placed < site.gpus_per_node:
        return Problem(
            "ppo.reward.placement",
            f"gpu:{placed}",
            f"of a node's hydra.launcher.gpus_per_node={site.gpus_per_node} the first {each} "
            "train; name another, or use ppo.reward.placement=shared.",
        )
    return JobShape(nodes, each, gpus if site.gpus_per_node else 0)


def _placed(config: Config) -> int | None:
    """Return the number of the GPU that the reward model has for itself, if it has one."""
    scored = (
        config.stage not in (StageName.sft, StageName.reward) and config.ppo.reward.model_scores
    )
    return config.ppo.reward.gpu if scored else None


def slurm_problems(site: SlurmConfig, configs: Sequence[Config]) -> list[Problem]:
    """Return what keeps a multirun from being submitted.

    Args:
        site: The launcher's section.
        configs: The config of every job.
    """
    found = [*_site_problems(site), *_missing()]
    kinds = [(one.distributed.strategy, one.distributed.processes) for one in configs]
    for kind in kinds:
        if kind != kinds[0]:
            first, other = (
                f"{strategy.name} with {count} processes" for strategy, count in (kinds[0], kind)
            )
            message = (
                f"a multirun on Slurm has one kind of job, and these are {first} and {other}. "
                "Start one multirun for each, under names of their own."
            )
            return [*found, Problem("distributed", "", message)]
    for config in configs[:1]:
        shape = job_shape(site, config)
        found += [shape] if isinstance(shape, Problem) else []
    return found


def _site_problems(site: SlurmConfig) -> list[Problem]:
    wrong = [(name, "must be above 0.") for name in _POSITIVE if getattr(site, name) <= 0]
    wrong += [(name, "must not be negative.") for name in _NOT_NEGATIVE if getattr(site, name) < 0]
    if site.processes_per_node is not None and site.processes_per_node < 1:
        wrong.append(("processes_per_node", "must be above 0, or null."))
    if site.grace_s >= site.signal_delay_s:
        wrong.append(("grace_s", f"must be below signal_delay_s={site.signal_delay_s}."))
    return [
        Problem(f"hydra.launcher.{name}", format_value(getattr(site, name)), why)
        for name, why in wrong
    ]


def _missing() -> list[Problem]:
    found = []
    if importlib.util.find_spec("submitit") is None:
        remedy = "needs submitit: pip install 'rlhf-exp[slurm]'."
        found.append(Problem("hydra/launcher", "slurm", remedy))
    if shutil.which("sbatch") is None:
        remedy = "there is no sbatch here: start it on a login node of the cluster."
        found.append(Problem("hydra/launcher", "slurm", remedy))
    return found


MAX_POINTS_NAMED = 3


def check_points(
    points: Sequence[Sequence[str]], compose: Callable[[Sequence[str]], Config]
) -> tuple[list[Config], list[str]]:
    """Compose every point and check it.

    Args:
        points: The overrides of each.
        compose: Returns the config of overrides, or raises a `UserError`.

    Returns:
        The configs of those that can be composed, and what is wrong, each once: with the points
        that have it, unless all do.
    """
    configs: list[Config] = []
    where: dict[str, list[int]] = {}
    for index, overrides in enumerate(points):
        found: list[Problem | UserError] = []
        try:
            config = compose(overrides)
        except UserError as error:
            found.append(error)
        else:
            configs.append(config)
            found += config_problems(config, multirun=True)
        for text in dict.fromkeys(str(problem) for problem in found):
            where.setdefault(text, []).append(index)
    return configs, [text + describe_points(points, set(at)) for text, at in where.items()]


def describe_points(points: Sequence[Sequence[str]], at: set[int]) -> str:
    """Return in which points something is wrong, to be put after what it is; nothing for all.

    They are told by what only they have, else by their names.

    Args:
        points: The overrides of each.
        at: The numbers of those that are meant, from 0.
    """
    if len(at) == len(points):
        return ""
    count = f"{len(at)} of {len(points)} points"
    others = {text for index, point in enumerate(points) if index not in at for text in point}
    common = set.intersection(*(set(points[index]) for index in at)) - others
    if common:
        return f" ({count}: all with {' '.join(sorted(common))})"
    names = [name for index, name in enumerate(point_labels(points)) if index in at]
    more = f"; and {len(at) - MAX_POINTS_NAMED} more" if len(at) > MAX_POINTS_NAMED else ""
    return f" ({count}: {'; '.join(names[:MAX_POINTS_NAMED])}{more})"
