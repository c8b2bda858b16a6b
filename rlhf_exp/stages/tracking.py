"""What the stages tell their trackers: who they are, what from, and what they have made."""

from __future__ import annotations

from pathlib import Path

import rlhf_exp
from rlhf_exp.config.load import to_dict
from rlhf_exp.config.root import Config
from rlhf_exp.distributed.world import World
from rlhf_exp.engines.native.loop_types import Outcome
from rlhf_exp.stages.context import MODEL, StageContext
from rlhf_exp.store.artifact import git_state
from rlhf_exp.store.fingerprint import file_digest, key_of
from rlhf_exp.tracking.alerts import AlertRules
from rlhf_exp.tracking.opening import open_tracker
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
        config=to_dict(config) | {"lineage": _lineage(context), "git": git},
        diff=diff,
        alerts=_alert_rules(config),
        resume_step=resume,
    )


def record_model(context: StageContext, world: World, outcome: Outcome, tracker: Tracker) -> None:
    """Tell the tracker of the model in the staging folder, at the place that it will have."""
    if not world.is_main:
        return
    made = context.folder / MODEL
    facts = _lineage(context) | {
        "digest": _digest_of_weights(context.folder),
        "published_step": outcome.published_step,
        "metrics": outcome.metrics,
    }
    place = context.folder.parents[1] / context.stage / context.key / MODEL
    tracker.model(f"{context.stage}-{context.key}", made, place, facts)


def _lineage(context: StageContext) -> dict[str, object]:
    return {
        "stage": context.stage,
        "key": context.key,
        "parents": dict(context.parents),
        "inputs": dict(context.inputs),
    }


def _digest_of_weights(folder: Path) -> str:
    """Return what the children of the model will call its digest (see `weights_digest`)."""
    found = (folder / MODEL).rglob("*.safetensors")
    return key_of({path.relative_to(folder).as_posix(): file_digest(path) for path in found})


def _alert_rules(config: Config) -> AlertRules:
    rules, target = config.tracking.alerts, config.ppo.kl.target
    kl = None if rules.kl_factor is None or target is None else rules.kl_factor * target
    return AlertRules(kl=kl, reward_drop=rules.reward_drop, entropy=rules.entropy_fraction)
