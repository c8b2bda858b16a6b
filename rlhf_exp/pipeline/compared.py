"""What an evaluation reads besides the results of the pipeline's own steps, by role."""

from __future__ import annotations

from pathlib import Path

from rlhf_exp.config.evaluation import (
    REFEREE,
    REWARD_QUALITY,
    ROLES,
    SAMPLES,
    SAMPLES_FILE,
    EvalConfig,
    parts_of,
)
from rlhf_exp.errors import UserError
from rlhf_exp.pipeline.begun import weights_digest
from rlhf_exp.pipeline.given import Finder, Given
from rlhf_exp.store.artifact import Artifact


def compared(
    section: EvalConfig, finder: Finder, judge: tuple[str, Artifact | None] | None
) -> dict[str, Given]:
    """Return the models of an evaluation that no step makes, or the samples in their place.

    Args:
        section: The evaluation's config.
        finder: Finds them.
        judge: Key and artifact of the reward model, if one judges.

    Raises:
        UserError: One of them does not exist, or the referee is the reward model itself.
    """
    if section.samples is not None:
        return {SAMPLES: _samples(section.samples, finder)}
    found = {
        spec: finder.model(f"eval.models: {spec}", spec, ("ppo", "sft"))
        for spec in section.models
        if spec not in ROLES
    }
    if section.reward_quality.referee is not None and REWARD_QUALITY in parts_of(section.suite):
        found[REFEREE] = _referee(section.reward_quality.referee, finder, judge)
    return found


def _samples(run: str, finder: Finder) -> Given:
    option = f"eval.samples={run}"
    path = Path(run)
    if path.is_file():
        return Given(finder.keys.given_file(path), run)
    artifact = finder.artifact(option, run, ("eval",))
    if not (artifact.path / SAMPLES_FILE).is_file():
        raise UserError(
            f"{option}: {artifact.stage} {artifact.key} kept no {SAMPLES_FILE}; evaluate it "
            "again (stage=eval rerun=[eval])"
        )
    return Given(artifact.key, str(artifact.path / SAMPLES_FILE), artifact)


def _referee(wanted: str, finder: Finder, judge: tuple[str, Artifact | None] | None) -> Given:
    option = f"eval.reward_quality.referee={wanted}"
    found = finder.model(option, wanted, ("reward",))
    if judge is not None and _same(found, *judge):
        raise UserError(
            f"{option}: that is the reward model that PPO maximised ({judge[0]}), which cannot "
            "referee itself; train another one on other pairs, such as with "
            "stage=reward reward.part=2/2"
        )
    return found


def _same(found: Given, key: str, artifact: Artifact | None) -> bool:
    """Whether a given model is the one of a key, or has the weights of its artifact."""
    if found.key == key or found.artifact is None or artifact is None:
        return found.key == key
    return weights_digest(found.artifact) == weights_digest(artifact)
