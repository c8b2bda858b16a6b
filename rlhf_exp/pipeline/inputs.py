"""Models that are given instead of trained: a folder, a run, a store key or a hub id.

What an evaluation reads besides the results of the pipeline's own steps, by role.

`ppo.continue_from`: a finished PPO run is extended by more steps.

The result is what one run of all the steps would have been, so all else that counts must be equal.

What a step was begun with: a note in its staging folder, which says whether it can go on.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from rlhf_exp.config.compose import from_dict
from rlhf_exp.config.evaluation import (
    REFEREE,
    REWARD_QUALITY,
    ROLES,
    SAMPLES,
    SAMPLES_FILE,
    EvalConfig,
    parts_of,
)
from rlhf_exp.config.experiment import Config
from rlhf_exp.config.fields import key_content
from rlhf_exp.config.training import CONTINUED
from rlhf_exp.errors import UserError
from rlhf_exp.pipeline.keys import Keys
from rlhf_exp.store.artifact import MANIFEST, Artifact, Manifest
from rlhf_exp.store.atomic_files import write_json_atomic
from rlhf_exp.store.fingerprint import key_of
from rlhf_exp.store.run_records import Records
from rlhf_exp.store.store import Store

MODEL = "model"


@dataclass(frozen=True)
class ResolvedModel:
    """A model that is there already.

    Attributes:
        key: What stands for it in the keys of results made with it.
        model: Folder or hub id.
        artifact: Its artifact, if it is in the store or is an artifact's folder.
    """

    key: str
    model: str
    artifact: Artifact | None = None


class ModelResolver:
    """Finds given models.

    Args:
        store: Where artifacts are.
        records: Where runs are recorded.
        keys: Makes the keys of folders and hub ids.
    """

    def __init__(self, store: Store, records: Records, keys: Keys) -> None:
        self.store, self.records, self.keys = store, records, keys

    def model(self, option: str, use: str, stages: Sequence[str]) -> ResolvedModel:
        """Return the model that a config value means.

        Args:
            option: How the value is written, for errors: `ppo.use=kl`.
            use: A folder, a run, a store key or a hub id.
            stages: Of a run, the first of these that it has.

        Raises:
            UserError: There is no such model.
        """
        folder = Path(use)
        if (folder / MANIFEST).is_file():
            found = Artifact(folder, Manifest.read(folder))
            if not (folder / MODEL).is_dir():
                raise UserError(f"{option}: {found.stage} {found.key} has no model")
            return ResolvedModel(found.key, str(folder / MODEL), found)
        if folder.is_dir():
            return ResolvedModel(self.keys.given(use), use)
        try:
            artifact = self.artifact(option, use, stages)
        except UserError as error:
            if isinstance(error, _NoRun) and use.count("/") == 1 and use[0] not in "./~":
                return ResolvedModel(self.keys.given(use), use)
            raise
        return ResolvedModel(artifact.key, str(artifact.path / MODEL), artifact)

    def artifact(self, option: str, run: str, stages: Sequence[str]) -> Artifact:
        """Return what a run, or a store key, has of the first of `stages` that it has.

        Raises:
            UserError: There is no such run, or it has none of them.
        """
        try:
            record = self.records.resolve(run, self.store)
        except UserError as error:
            raise _NoRun(f"{option}: no such folder, run or key. {error}") from error
        stage = next((stage for stage in stages if stage in record.keys), None)
        if stage is None:
            wanted, has = " or ".join(stages), ", ".join(record.keys)
            raise UserError(f"{option}: that run has no {wanted}, only {has}")
        artifact = self.store.lookup(stage, record.keys[stage])
        if artifact is None:
            raise UserError(f"{option}: its {stage} {record.keys[stage]} is no longer in the store")
        return artifact


class _NoRun(UserError):
    """Nothing is called that here, so it may be a hub id."""


def compared(
    section: EvalConfig, finder: ModelResolver, judge: tuple[str, Artifact | None] | None
) -> dict[str, ResolvedModel]:
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


def _samples(run: str, finder: ModelResolver) -> ResolvedModel:
    option = f"eval.samples={run}"
    path = Path(run)
    if path.is_file():
        return ResolvedModel(finder.keys.given_file(path), run)
    artifact = finder.artifact(option, run, ("eval",))
    if not (artifact.path / SAMPLES_FILE).is_file():
        raise UserError(
            f"{option}: {artifact.stage} {artifact.key} kept no {SAMPLES_FILE}; evaluate it "
            "again (stage=eval rerun=[eval])"
        )
    return ResolvedModel(artifact.key, str(artifact.path / SAMPLES_FILE), artifact)


def _referee(
    wanted: str, finder: ModelResolver, judge: tuple[str, Artifact | None] | None
) -> ResolvedModel:
    option = f"eval.reward_quality.referee={wanted}"
    found = finder.model(option, wanted, ("reward",))
    if judge is not None and _same(found, *judge):
        raise UserError(
            f"{option}: that is the reward model that PPO maximised ({judge[0]}), which cannot "
            "referee itself; train another one on other pairs, such as with "
            "stage=reward reward.part=2/2"
        )
    return found


def _same(found: ResolvedModel, key: str, artifact: Artifact | None) -> bool:
    """Whether a given model is the one of a key, or has the weights of its artifact."""
    if found.key == key or found.artifact is None or artifact is None:
        return found.key == key
    return weights_digest(found.artifact) == weights_digest(artifact)


CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in an artifact that keeps its state, and in a staging folder."""

_ITS_OWN = ("ppo.steps", "ppo.continue_from")


def continued(
    config: Config, keys: Keys, finder: ModelResolver, parents: Mapping[str, str]
) -> ResolvedModel:
    """Return the run that PPO is to go on from.

    Args:
        config: The experiment.
        keys: Makes its keys.
        finder: Finds runs.
        parents: The keys of what PPO starts from, by role.

    Raises:
        UserError: There is no such run, it is another one but for its steps, or not a shorter one.
    """
    use = config.ppo.continue_from
    assert use is not None, "asked for"
    folder, option = Path(use), _option(config)
    if (folder / MANIFEST).is_file():
        found = Artifact(folder.absolute(), Manifest.read(folder))
        if found.stage != "ppo":
            raise UserError(f"{option}: that is a result of {found.stage}, not of ppo")
    else:
        found = finder.artifact(option, use, ("ppo",))
    before = from_dict(found.manifest.config)
    same = copy.copy(config)
    same.ppo = copy.copy(config.ppo)
    same.ppo.steps = before.ppo.steps
    grandparent = found.manifest.parents.get(CONTINUED)
    if Keys(same, keys.digests).ppo(dict(parents), grandparent) != found.key:
        raise UserError(
            f"{option}: only ppo.steps may differ from that run, and these do as well:"
            + "".join(f"\n  {line}" for line in _differences(config, parents, before, found))
        )
    if config.ppo.steps <= before.ppo.steps:
        raise UserError(
            f"{option}: that run has ppo.steps={before.ppo.steps}, and ppo.steps="
            f"{config.ppo.steps} is the number of all steps, those included; give more"
        )
    return ResolvedModel(found.key, str(found.path), found)


def check_state(config: Config, parent: Artifact, stale: Sequence[str]) -> None:
    """Make sure that a run can be gone on from.

    Args:
        config: The experiment.
        parent: The run.
        stale: What it was made with and is another now, but for what is trusted.

    Raises:
        UserError: It kept no state, or what it was made with has changed.
    """
    if not any((parent.path / CHECKPOINTS).glob("step-*")):
        raise UserError(
            f"{_option(config)}: ppo {parent.key} did not keep its state; make it again with "
            "ppo.keep_state=true rerun=[ppo] (and its own ppo.steps, without ppo.continue_from)"
        )
    if stale:
        raise UserError(
            f"{_option(config)}: what ppo {parent.key} was made with has changed since: "
            f"{', '.join(stale)}. Make it again (rerun=[ppo], without ppo.continue_from), or go "
            "on from it as it is with cache=trust"
        )


def _option(config: Config) -> str:
    return f"ppo.continue_from={config.ppo.continue_from}"


def _differences(
    config: Config, parents: Mapping[str, str], before: Config, found: Artifact
) -> list[str]:
    """Return what counts for the key and differs, in words."""
    old, new = dict(_counting(before)), dict(_counting(config))
    lines = [
        f"{name}: {old.get(name)} there, {new.get(name)} here"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and name not in _ITS_OWN
    ]
    was = {role: key for role, key in found.manifest.parents.items() if role != CONTINUED}
    lines += [
        f"the {role} model: {was.get(role)} there, {parents.get(role)} here"
        for role in sorted(was.keys() | parents.keys())
        if was.get(role) != parents.get(role)
    ]
    return lines or ["the content of a file of data, or of ppo.reward.function"]


def _counting(config: Config) -> Iterator[tuple[str, Any]]:
    """Yield the values that may count for PPO's key, by dotted name."""
    yield from _flat("ppo", key_content(config.ppo))
    yield from _flat("data", key_content(config.data))
    yield "model.dtype", config.model.dtype.name
    yield "distributed.precision", config.distributed.precision.name
    yield "engine.name", config.engine.name.name
    yield "reward.seq_length", config.reward.seq_length


def _flat(prefix: str, content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}.{name}", value)
        else:
            yield f"{prefix}.{name}", value


NOTE = ".started.json"


@dataclass(frozen=True)
class StartedNote:
    """The note.

    Attributes:
        code: Digest of each module that the step runs.
        inputs: Digest of each parent's weights, by role (see `weights_digest`).
        replaces: Creation time of the result that is being made again, if one is.
        seconds: Work done so far.
    """

    code: dict[str, str]
    inputs: dict[str, str]
    replaces: str | None
    seconds: float = 0.0

    @classmethod
    def read(cls, folder: Path | None) -> Self | None:
        """Return the note in a staging folder; `None` if there is none that can be read."""
        try:
            return None if folder is None else cls(**json.loads((folder / NOTE).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Leave the note in a staging folder."""
        write_json_atomic(folder / NOTE, asdict(self))

    def later(self, seconds: float) -> Self:
        """Return the note after more work."""
        return replace(self, seconds=self.seconds + seconds)

    def continues(self, artifact: Artifact | None, inputs: Mapping[str, str]) -> bool:
        """Whether what was begun leads to what is wanted now.

        Args:
            artifact: The result to be made again, if there is one.
            inputs: Digests of the parents that are there already.
        """
        replaces = None if artifact is None else artifact.manifest.created
        return self.replaces == replaces and not other_inputs(self.inputs, inputs)


def weights_digest(artifact: Artifact) -> str:
    """Return the digest of an artifact's weights: a step redone under its key may have others.

    Snapshots of other steps are no input of anything.
    """
    return key_of(
        {
            name: entry.sha256
            for name, entry in artifact.manifest.files.items()
            if name.startswith("model/") and name.endswith(".safetensors")
        }
    )


def other_inputs(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Return the roles whose weights differ, of those known on both sides."""
    return sorted(role for role in old.keys() & new.keys() if old[role] != new[role])
