"""Inputs of a plan's steps that no step of the plan makes.

- Models that are used instead of trained ones: a folder, a run, a store key or a hub id.
- Models and samples that an evaluation reads besides the results of the plan's own steps.
- A finished PPO run that is continued (`ppo.continue_from`). The result equals one run of all the
  steps, so every other setting that counts must be equal.
- The note in a staging folder: the code and inputs of an unfinished step, which decide whether it
  can be resumed.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from rlhf_exp.config.compose import from_dict
from rlhf_exp.config.evaluation import (
    REFEREE,
    ROLES,
    SAMPLES,
    SAMPLES_FILE,
    EvalConfig,
    uses_referee,
)
from rlhf_exp.config.experiment import CHOSEN_FILE, Config
from rlhf_exp.config.fields import key_content
from rlhf_exp.config.training import CONTINUED
from rlhf_exp.errors import UserError
from rlhf_exp.pipeline.keys import Keys
from rlhf_exp.program import PROGRAM
from rlhf_exp.store.artifact import MANIFEST, Artifact, Manifest
from rlhf_exp.store.atomic_files import write_json_atomic
from rlhf_exp.store.fingerprint import key_of
from rlhf_exp.store.run_records import Records
from rlhf_exp.store.store import Store

log = logging.getLogger(__name__)

MODEL = "model"


@dataclass(frozen=True)
class ResolvedModel:
    """A model that exists already.

    Attributes:
        key: Key of the model, part of the keys of results made with it.
        model: Folder or hub id.
        artifact: The model's artifact, if it is in the store or is an artifact's folder.
    """

    key: str
    model: str
    artifact: Artifact | None = None


class ModelResolver:
    """Finds the models that config values name.

    Args:
        store: The store of artifacts.
        records: The records of runs.
        keys: Makes the keys of folders and hub ids.
    """

    def __init__(self, store: Store, records: Records, keys: Keys) -> None:
        self.store, self.records, self.keys = store, records, keys

    def model(self, option: str, use: str, stages: Sequence[str]) -> ResolvedModel:
        """Return the model that a config value names.

        Args:
            option: The option on the command line, for errors: `ppo.use=kl`.
            use: A folder, a run, a store key or a hub id.
            stages: Stages in order of preference; a run's model is of the first that it has.

        Raises:
            UserError: There is no such model.
        """
        folder = Path(use)
        if (folder / MANIFEST).is_file():
            artifact = Artifact(folder, Manifest.read(folder))
            artifact.verify(_of_model, contents=False)
            if not (folder / MODEL).is_dir():
                raise UserError(f"{option}: {artifact.stage} {artifact.key} has no model")
            return ResolvedModel(artifact.key, str(folder / MODEL), artifact)
        if folder.is_dir():
            if (folder.parent / MANIFEST).is_file():
                within = Artifact(folder.parent, Manifest.read(folder.parent))
                within.verify(lambda name: name.startswith(f"{folder.name}/"))
            return ResolvedModel(self.keys.given(use), use)
        try:
            artifact = self.artifact(option, use, stages)
        except UserError as error:
            if isinstance(error, _NoRun) and use.count("/") == 1 and use[0] not in "./~":
                return ResolvedModel(self.keys.given(use), use)
            raise
        artifact.verify(_of_model, contents=False)
        return ResolvedModel(artifact.key, str(artifact.path / MODEL), artifact)

    def artifact(self, option: str, run: str, stages: Sequence[str]) -> Artifact:
        """Return the artifact of a run or store key, of the first of `stages` that it has.

        Raises:
            UserError: There is no such run, or it has none of the stages.
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


def _of_model(name: str) -> bool:
    return name.startswith(f"{MODEL}/")


class _NoRun(UserError):
    """No folder, run or key has that name, so it may be a hub id."""


def compared(
    section: EvalConfig, finder: ModelResolver, judge: tuple[str, Artifact | None] | None
) -> dict[str, ResolvedModel]:
    """Return the models of an evaluation that no step makes, or the samples instead of them.

    Args:
        section: The evaluation's config.
        finder: Finds the models and samples.
        judge: Key and artifact of the reward model, if one judges.

    Raises:
        UserError: A model does not exist, or the referee is the reward model itself.
    """
    if section.samples is not None:
        return {SAMPLES: _samples(section.samples, finder)}
    models = {
        spec: finder.model(f"eval.models: {spec}", spec, ("ppo", "dpo", "sft"))
        for spec in section.models
        if spec not in ROLES
    }
    if section.reward_quality.referee is not None and uses_referee(section):
        models[REFEREE] = _referee(section.reward_quality.referee, finder, judge)
    return models


def chosen_answers(config: Config, finder: ModelResolver) -> ResolvedModel | None:
    """Return the chosen answers that `data.demonstrations=best_of:RUN` names.

    Args:
        config: The experiment.
        finder: Finds runs.

    Returns:
        Their file; `None` where the demonstrations are others.

    Raises:
        UserError: There is no such run, or it has chosen none.
    """
    run = config.data.chosen_by
    if run is None:
        return None
    option = f"data.demonstrations={config.data.demonstrations}"
    try:
        artifact = finder.artifact(option, run, ("best_of",))
    except UserError as error:
        raise UserError(
            f"{error}. These answers are made beforehand, with the settings of the run whose "
            f"policy is to be asked: {PROGRAM} stage=best_of name={run}"
        ) from error
    path = artifact.path / CHOSEN_FILE
    artifact.verify(lambda name: name == CHOSEN_FILE)
    return ResolvedModel(artifact.key, str(path), artifact)


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
    name: str, finder: ModelResolver, judge: tuple[str, Artifact | None] | None
) -> ResolvedModel:
    option = f"eval.reward_quality.referee={name}"
    referee = finder.model(option, name, ("reward",))
    if judge is not None and _same_weights(referee, *judge):
        raise UserError(
            f"{option}: that is the reward model that PPO maximised ({judge[0]}), which cannot "
            "referee itself; train another one on other pairs, such as with "
            "stage=reward reward.part=2/2"
        )
    return referee


def _same_weights(model: ResolvedModel, key: str, artifact: Artifact | None) -> bool:
    """Whether a model has the key of an artifact, or the same weights."""
    if model.key == key or model.artifact is None or artifact is None:
        return model.key == key
    return weights_digest(model.artifact) == weights_digest(artifact)


CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in an artifact that keeps its state, and in a staging folder."""

_MAY_DIFFER = ("ppo.steps", "ppo.continue_from")


def continued(
    config: Config, keys: Keys, finder: ModelResolver, parents: Mapping[str, str]
) -> ResolvedModel:
    """Return the finished run that PPO continues.

    Args:
        config: The experiment.
        keys: Makes its keys.
        finder: Finds runs.
        parents: Keys of the results that PPO starts from, by role.

    Raises:
        UserError: There is no such run, more than its steps differs, or it is not shorter.
    """
    use = config.ppo.continue_from
    assert use is not None, "the caller checks it"
    folder, option = Path(use), _option(config)
    if (folder / MANIFEST).is_file():
        parent = Artifact(folder.absolute(), Manifest.read(folder))
        if parent.stage != "ppo":
            raise UserError(f"{option}: that is a result of {parent.stage}, not of ppo")
    else:
        parent = finder.artifact(option, use, ("ppo",))
    before = from_dict(parent.manifest.config)
    same = copy.copy(config)
    same.ppo = copy.copy(config.ppo)
    same.ppo.steps = before.ppo.steps
    grandparent = parent.manifest.parents.get(CONTINUED)
    if Keys(same, keys.digests).ppo(dict(parents), grandparent) != parent.key:
        raise UserError(
            f"{option}: only ppo.steps may differ from that run, and these do as well:"
            + "".join(f"\n  {line}" for line in _differences(config, parents, before, parent))
        )
    if config.ppo.steps <= before.ppo.steps:
        raise UserError(
            f"{option}: that run has ppo.steps={before.ppo.steps}, and ppo.steps="
            f"{config.ppo.steps} is the number of all steps, those included; give more"
        )
    return ResolvedModel(parent.key, str(parent.path), parent)


def check_state(config: Config, parent: Artifact, stale: Sequence[str]) -> None:
    """Raise if a finished run cannot be continued.

    Args:
        config: The experiment.
        parent: The run.
        stale: The modules and parents that have changed since, without those that are trusted.

    Raises:
        UserError: The run kept no state, or its code or parents have changed.
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
    config: Config, parents: Mapping[str, str], before: Config, run: Artifact
) -> list[str]:
    """Return a line for each setting or parent that counts for the key and differs."""
    old, new = dict(_key_values(before)), dict(_key_values(config))
    lines = [
        f"{name}: {old.get(name)} there, {new.get(name)} here"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and name not in _MAY_DIFFER
    ]
    old_parents = {role: key for role, key in run.manifest.parents.items() if role != CONTINUED}
    lines += [
        f"the {role} model: {old_parents.get(role)} there, {parents.get(role)} here"
        for role in sorted(old_parents.keys() | parents.keys())
        if old_parents.get(role) != parents.get(role)
    ]
    return lines or ["the content of a file of data, or of ppo.reward.function"]


def _key_values(config: Config) -> Iterator[tuple[str, Any]]:
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
    """The note in the staging folder of a step that has started.

    Attributes:
        code: Digest of each module that the step runs.
        inputs: Digest of each parent's weights, by role (see `weights_digest`).
        replaces: Creation time of the result that the step replaces, if there is one.
        seconds: Time of work so far.
    """

    code: dict[str, str]
    inputs: dict[str, str]
    replaces: str | None
    seconds: float = 0.0

    @classmethod
    def read(cls, folder: Path | None) -> Self | None:
        """Return the note in a staging folder; `None` if there is no readable one."""
        if folder is None or not (folder / NOTE).exists():
            return None
        try:
            note = cls(**json.loads((folder / NOTE).read_text()))
            if all(isinstance(values, dict) for values in (note.code, note.inputs)):
                return replace(note, seconds=float(note.seconds))
            reason = "no digests"
        except (OSError, ValueError, TypeError) as error:
            reason = str(error)
        log.warning("%s is damaged (%s): the stage is begun anew", folder / NOTE, reason)
        return None

    def write(self, folder: Path) -> None:
        """Write the note into a staging folder."""
        write_json_atomic(folder / NOTE, asdict(self))

    def later(self, seconds: float) -> Self:
        """Return the note with the time of more work added."""
        return replace(self, seconds=self.seconds + seconds)

    def continues(self, artifact: Artifact | None, inputs: Mapping[str, str]) -> bool:
        """Whether the unfinished step can be resumed.

        Args:
            artifact: The result to replace, if there is one.
            inputs: Digests of the parents' weights, as far as they are in the store.
        """
        replaces = None if artifact is None else artifact.manifest.created
        return self.replaces == replaces and not other_inputs(self.inputs, inputs)


def weights_digest(artifact: Artifact) -> str:
    """Return the digest of an artifact's weights, which may change when a step is run again.

    Snapshots of other steps do not count, because no step reads them.
    """
    return key_of(
        {
            name: entry.sha256
            for name, entry in artifact.manifest.files.items()
            if name.startswith("model/") and name.endswith(".safetensors")
        }
    )


def other_inputs(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Return the roles in both mappings whose weights differ."""
    return sorted(role for role in old.keys() & new.keys() if old[role] != new[role])
