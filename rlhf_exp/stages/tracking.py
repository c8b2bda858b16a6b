"""The tracker of a stage, with the stage's lineage and the revision of the code in its config."""

from __future__ import annotations

from pathlib import Path

import rlhf_exp
from rlhf_exp.config.compose import to_dict
from rlhf_exp.config.experiment import Config
from rlhf_exp.distributed.world import World
from rlhf_exp.stages.context import StageContext
from rlhf_exp.store.artifact import git_state
from rlhf_exp.tracking.alerts import AlertRules
from rlhf_exp.tracking.create import open_tracker
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
        name=f"{context.stage}-{context.key[:8]}",
        tags=section.tags,
        config=to_dict(config) | {"lineage": lineage(context), "git": git},
        diff=diff,
        alerts=_alert_rules(config),
        resume_step=resume,
    )


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
