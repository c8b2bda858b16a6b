"""The tracker of a stage, with its lineage and the code's revision in its config; its progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import rlhf_exp
from rlhf_exp.config.compose import to_dict
from rlhf_exp.config.experiment import Config
from rlhf_exp.distributed.world import World
from rlhf_exp.stages.context import StageContext
from rlhf_exp.store.artifact import git_state
from rlhf_exp.tracking.alerts import AlertRules
from rlhf_exp.tracking.create import open_tracker
from rlhf_exp.tracking.progress_bar import StageProgress
from rlhf_exp.tracking.tracker import NullTracker, Tracker


def tracker_for(config: Config, context: StageContext, resume: int | None, world: World) -> Tracker:
    """Open the stage's tracker; lineage and revision go into its config: that works offline too."""
    if not world.is_main:
        return NullTracker()
    section = config.tracking
    git = git_state(Path(rlhf_exp.__path__[0]).parent)
    diff = str(git.pop("diff", ""))
    return open_tracker(
        section.mode.value,
        context.folder,
        project=section.project,
        entity=section.entity,
        group=config.name,
        job_type=context.stage,
        name=run_name(config, context.stage, context.job.settings),
        tags=section.tags,
        also=[tracker.value for tracker in section.also],
        config=to_dict(config) | {"lineage": lineage(context), "git": git},
        diff=diff,
        alerts=_alert_rules(config),
        resume_step=resume,
    )


def run_name(config: Config, stage: str, settings: Sequence[str]) -> str:
    """Return a stage's name for people: `ppo lr=3e-4 kl=0.05 seed=1`.

    The hyperparameters that are looked at first, then what the command line sets of this stage and
    of those it builds on. The key, which tells all runs apart, is in the run's config.

    Args:
        config: The experiment.
        stage: The stage.
        settings: The command line.
    """
    shown = {name: _short(get(config)) for name, get in _SHOWN[stage].items()}
    parts = [f"{name}={value}" for name, value in shown.items()]
    covered = {"seed", f"{stage}.seed", f"{stage}.lr", "ppo.kl.coef", "dpo.beta"}
    for text in settings:
        key, _, value = text.lstrip("+").partition("=")
        section = key.partition(".")[0]
        if section in _BUILT_ON[stage] and key not in covered and not key.endswith(".seed"):
            parts.append(f"{key.removeprefix(f'{stage}.')}={_public(value)}")
    name = " ".join([stage, *parts])
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


_LONGEST_NAME = 120
_POLICY = ("model", "data", "sft")
# The sections of the config that a stage's result depends on.
_BUILT_ON = {
    "sft": _POLICY,
    "reward": (*_POLICY, "reward"),
    "dpo": (*_POLICY, "dpo"),
    "best_of": (*_POLICY, "reward", "ppo", "best_of"),
    "ppo": (*_POLICY, "reward", "ppo", "engine"),
    "eval": (*_POLICY, "reward", "dpo", "ppo", "engine", "eval"),
}
_SHOWN: dict[str, dict[str, Callable[[Config], object]]] = {
    "sft": {"lr": lambda config: config.sft.lr, "seed": lambda config: config.sft.seed},
    "reward": {"lr": lambda config: config.reward.lr, "seed": lambda config: config.reward.seed},
    "dpo": {
        "lr": lambda config: config.dpo.lr,
        "beta": lambda config: config.dpo.beta,
        "seed": lambda config: config.dpo.seed,
    },
    "best_of": {
        "n": lambda config: config.best_of.n,
        "seed": lambda config: config.best_of.seed,
    },
    "ppo": {
        "lr": lambda config: config.ppo.lr,
        "kl": lambda config: config.ppo.kl.coef,
        "seed": lambda config: config.ppo.seed,
    },
    "eval": {
        "suite": lambda config: config.eval.suite.value,
        "seed": lambda config: config.eval.seed,
    },
}


def _short(value: object) -> str:
    """Write a number as people do: 3e-4, 0.05, 1."""
    if not isinstance(value, float) or value == 0 or abs(value) >= 1e-2:
        return f"{value:g}" if isinstance(value, float) else str(value)
    digits, _, power = f"{value:.6e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def _public(value: str) -> str:
    """Return a value without the folders of a path."""
    return Path(value).name if value.startswith(("/", "~", ".")) else value


def stage_progress(
    context: StageContext | None,
    label: str,
    total: int,
    world: World | None = None,
    watch: Sequence[str] = (),
) -> StageProgress:
    """Return the progress of a stage's work, shown by the first process.

    Args:
        context: The stage; `None` for work that is no stage's.
        label: The name in front.
        total: The step at which the work is done.
        world: The processes.
        watch: The metrics to show.
    """
    shown = world is None or world.is_main
    if context is None:
        return StageProgress(label, total, watch, shown=shown)
    folder = context.folder
    return StageProgress(label, total, watch, shown=shown, folder=folder, log=context.job.log)


def lineage(context: StageContext) -> dict[str, object]:
    """Return the lineage of a stage: its name and key, its parents and their weights."""
    return {
        "stage": context.stage,
        "key": context.key,
        "parents": dict(context.parents),
        "inputs": dict(context.inputs),
    }


def _alert_rules(config: Config) -> AlertRules:
    rules, target = config.tracking.alerts, config.ppo.kl.target
    kl = None if rules.kl_factor is None or target is None else rules.kl_factor * target
    return AlertRules(kl=kl, reward_drop=rules.reward_drop, entropy=rules.entropy_fraction)
