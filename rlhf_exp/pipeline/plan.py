"""The plan of an experiment: its steps, in order, and the state of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_exp.config.evaluation import REFEREE, SAMPLES, needs_reward
from rlhf_exp.config.experiment import CHOSEN, UNTRAINED, CachePolicy, Config
from rlhf_exp.config.training import CONTINUED, RewardInit, RolloutEngineName
from rlhf_exp.errors import UserError
from rlhf_exp.pipeline.inputs import (
    ModelResolver,
    ResolvedModel,
    StartedNote,
    check_state,
    chosen_answers,
    compared,
    continued,
    other_inputs,
    weights_digest,
)
from rlhf_exp.pipeline.keys import Keys
from rlhf_exp.pipeline.stage_graph import module_of, sampler_of, stages_of
from rlhf_exp.stages.context import StageJob
from rlhf_exp.store.artifact import Artifact
from rlhf_exp.store.code_digest import changed, code_digests
from rlhf_exp.store.disk_usage import TRACKED
from rlhf_exp.store.fingerprint import DigestCache
from rlhf_exp.store.run_records import Records
from rlhf_exp.store.store import Store
from rlhf_exp.tracking.local import ALERTS, METRICS, URL

if TYPE_CHECKING:
    from rlhf_exp.search.pruning import RunningTrial
    from rlhf_exp.store.lease import Claim

PACKAGE = Path(__file__).resolve().parents[1]
# Modules that compute nothing: a message or a help text may change in them without putting a
# trained model in doubt.
# - __init__.py: the version.
# - function_source.py: where a user's function is; its content is in the key.
# - model_names.py: which revision a hub id says, and which files are a model's; ids and digests are
#   in the key.
# - config/: its values are in the key.
# - tracking/, stages/tracking.py, training/memory.py: they record what others have computed.
# - store/: results are found by their key and checked by their digests.
# - processes/: starts and ends processes, and carries messages between them. The number of
#   processes and of their threads, and the devices, are fields with `key=False`.
NOT_COMPUTING = (
    "rlhf_exp/__init__.py",
    "rlhf_exp/config/",
    "rlhf_exp/errors.py",
    "rlhf_exp/function_source.py",
    "rlhf_exp/model_names.py",
    "rlhf_exp/processes/",
    "rlhf_exp/redaction.py",
    "rlhf_exp/run_log.py",
    "rlhf_exp/signals.py",
    "rlhf_exp/stages/tracking.py",
    "rlhf_exp/store/",
    "rlhf_exp/tracking/",
    "rlhf_exp/training/memory.py",
)


_VLLM = "rlhf_exp/vllm/"
"""What a stage imports that samples natively, too, and does not use."""

_LOGS = (METRICS, ALERTS, URL, "facts.json", "summary.json", "run_id")


class StepState(StrEnum):
    """Whether and how a step runs."""

    given = "given"
    cached = "cached"
    damaged = "damaged"
    changed = "code changed"
    resume = "resume"
    run = "run"


@dataclass(frozen=True)
class Step:
    """One stage of a plan.

    Attributes:
        stage: Name of the stage.
        key: Key of the result.
        state: Whether and how the step runs.
        parents: Keys of the results that it starts from, by role.
        inputs: Digests of the parents' weights, as far as they are in the store.
        code: Digest of each module that it runs.
        artifact: The result, if it is in the store.
        model: Folder or hub id of a given model.
        files: The modules that have changed since the result was made or begun, and the parents
            that were made anew since; of a damaged result, its damaged files.
        redo: Whether to make the result again if there is one.
        extra: The models and samples that it reads besides the results of other steps, by role.
    """

    stage: str
    key: str
    state: StepState
    parents: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)
    artifact: Artifact | None = None
    model: str | None = None
    files: tuple[str, ...] = ()
    redo: bool = False
    extra: dict[str, ResolvedModel] = field(default_factory=dict)

    @property
    def needs_work(self) -> bool:
        """Whether the step would run."""
        return self.state in (StepState.run, StepState.resume)

    def job(
        self,
        folder: Path | str,
        cache: Path,
        models: dict[str, str],
        *,
        claim: Claim | None = None,
        probe: bool = False,
        trial: RunningTrial | None = None,
    ) -> StageJob:
        """Return the job of running the step; see `StageJob` for the arguments."""
        return StageJob(
            self.stage,
            self.key,
            str(folder),
            str(cache),
            models,
            self.parents,
            self.inputs,
            claim=claim,
            probe=probe,
            trial=trial,
        )


def store_of(config: Config) -> Store:
    """Return the store of an experiment."""
    return Store(Path(config.output_dir) / "store")


def records_of(config: Config) -> Records:
    """Return the run records of an experiment."""
    return Records(Path(config.output_dir) / "sweeps")


def plan(config: Config) -> list[Step]:
    """Return the steps of an experiment; nothing on disk changes."""
    return _Planner(config).steps()


def refuse_changed(steps: list[Step]) -> None:
    """Raise if a result is damaged, or its code or parents have changed since it was made.

    Raises:
        UserError: Names the files and the ways on.
    """
    for step in steps:
        if step.state == StepState.damaged and step.artifact is not None:
            step.artifact.verify(computed_with, contents=False)
    stale = [step for step in steps if step.state == StepState.changed]
    if not stale:
        return
    lines = [f"\n  {step.stage} {step.key}: {', '.join(step.files)}" for step in stale]
    raise UserError(
        f"what these were made with has changed since they were made or begun:{''.join(lines)}\n"
        f"Make them again with rerun=[{stale[0].stage}] (and all that is built on them), or go on "
        "with them as they are with cache=trust"
    )


class _Planner:
    def __init__(self, config: Config) -> None:
        self.config = config
        self.store = store_of(config)
        self.cache = Path(config.output_dir) / "cache"
        self.keys = Keys(config, DigestCache(self.cache / "digests.json"))
        self.finder = ModelResolver(self.store, records_of(config), self.keys)
        self.done: dict[str, Step] = {}
        self.chosen = chosen_answers(config, self.finder)
        if self.chosen is not None:
            self.keys.chosen = self.keys.given_file(Path(self.chosen.model))

    def steps(self) -> list[Step]:
        for stage in stages_of(self.config):
            use = None if stage in UNTRAINED else getattr(self.config, stage).use
            self.done[stage] = self._own(stage) if use is None else self._given(stage, use)
        return list(self.done.values())

    def _own(self, stage: str) -> Step:
        parents = self._parents(stage)
        extra = self._extra(stage, parents)
        judges = {role: extra[role].key for role in extra if role in self._term_roles()}
        key = self._key(stage, parents | judges, extra)
        code = stage_code(module_of(self.config, stage), self.cache / "code.json")
        if sampler_of(self.config, stage) is RolloutEngineName.native:
            code = {path: digest for path, digest in code.items() if not path.startswith(_VLLM)}
        present = {role: self.done[role].artifact for role in parents if self._stays(role)}
        present |= {role: model.artifact for role, model in extra.items()}
        inputs = {
            role: weights_digest(parent) for role, parent in present.items() if parent is not None
        }
        artifact = self.store.lookup(stage, key)
        redo = stage in self.config.rerun or any(self.done[role].redo for role in parents)
        parents |= {role: model.key for role, model in extra.items()}
        step = Step(
            stage, key, StepState.run, parents, inputs, code, artifact, redo=redo, extra=extra
        )
        if artifact is None or redo:
            if CONTINUED in extra:
                self._check_continued(step)
            return self._begun(step)
        # Sizes cost nothing; digests are compared where a stage reads the files.
        if damaged := artifact.damaged_files(computed_with):
            return replace(step, state=StepState.damaged, files=tuple(damaged))
        files = stale_files(artifact.manifest.code, artifact.manifest.inputs, step)
        stops = files and self.config.cache == CachePolicy.strict
        return replace(step, state=StepState.changed if stops else StepState.cached, files=files)

    def _check_continued(self, step: Step) -> None:
        """Raise if the run that a step continues cannot be resumed."""
        parent = step.extra[CONTINUED].artifact
        assert parent is not None, "a finished run is in the store"
        inputs = {
            role: digest for role, digest in parent.manifest.inputs.items() if role != CONTINUED
        }
        stale = list(stale_files(parent.manifest.code, inputs, step))
        stale = stale if self.config.cache == CachePolicy.strict else []
        redone = [role for role in step.parents if role in self.done and self.done[role].redo]
        check_state(self.config, parent, [*stale, *(f"{role} (made again)" for role in redone)])

    def _stays(self, role: str) -> bool:
        """Whether a parent is in the store and will not be made again."""
        return not self.done[role].needs_work

    def _begun(self, step: Step) -> Step:
        """Return a step that has to run, with its state from the staging folder."""
        folder = self.store.unfinished(step.stage, step.key)
        begun = StartedNote.read(folder)
        if begun is None:
            # Without the note there is only a publication that was cut off, if anything.
            return replace(step, state=StepState.run if folder is None else StepState.resume)
        trained = self.done.keys() & step.parents.keys()
        anew = any(self.done[role].redo and not self._stays(role) for role in trained)
        if anew or not begun.continues(step.artifact, step.inputs):
            return step
        files = tuple(changed(begun.code, step.code))
        if files and step.stage in self.config.rerun:
            return step
        stops = files and self.config.cache == CachePolicy.strict
        return replace(step, state=StepState.changed if stops else StepState.resume, files=files)

    def _key(self, stage: str, parents: dict[str, str], extra: dict[str, ResolvedModel]) -> str:
        if stage == "sft":
            return self.keys.sft()
        if stage == "ppo":
            before = extra.get(CONTINUED)
            return self.keys.ppo(parents, None if before is None else before.key)
        if stage == "reward":
            return self.keys.reward(parents)
        if stage == "dpo":
            return self.keys.dpo(parents)
        if stage == "best_of":
            return self.keys.best_of(parents)
        if SAMPLES in extra:
            return self.keys.recomputed(Path(extra[SAMPLES].model))
        models = [extra[spec].key if spec in extra else spec for spec in self.config.eval.models]
        referee = extra.get(REFEREE)
        return self.keys.eval(parents, models, None if referee is None else referee.key)

    def _extra(self, stage: str, parents: dict[str, str]) -> dict[str, ResolvedModel]:
        if stage == "eval":
            scored = self.config.eval.samples is None and needs_reward(self.config.eval)
            return self._compared() | (self._term_models() if scored else {})
        if stage in ("sft", "reward"):
            return {} if self.chosen is None else {CHOSEN: self.chosen}
        if stage not in ("best_of", "ppo"):
            return {}
        models = self._term_models()
        if stage == "best_of" or self.config.ppo.continue_from is None:
            return models
        judges = {role: model.key for role, model in models.items()}
        before = continued(self.config, self.keys, self.finder, parents | judges)
        return models | {CONTINUED: before}

    def _term_roles(self) -> dict[str, str]:
        return self.config.ppo.reward.term_models

    def _term_models(self) -> dict[str, ResolvedModel]:
        """Return the reward models of terms that no step makes, by role."""
        models = {
            role: self.finder.model(f"ppo.reward.terms: {spec}", spec, ("reward",))
            for role, spec in self._term_roles().items()
        }
        return {
            role: replace(model, key=self.keys.given_reward(model.key))
            if model.artifact is None
            else model
            for role, model in models.items()
        }

    def _compared(self) -> dict[str, ResolvedModel]:
        reward = self.done.get("reward")
        judge = None if reward is None else (reward.key, reward.artifact)
        return compared(self.config.eval, self.finder, judge)

    def _parents(self, stage: str) -> dict[str, str]:
        roles: Mapping[str, tuple[str, ...]] = {
            "sft": (),
            "reward": ("sft",) if self.config.reward.init == RewardInit.sft else (),
            "dpo": ("sft",),
            "best_of": ("sft", "reward"),
            "ppo": ("sft", "reward"),
            "eval": ("sft", "reward", "dpo", "ppo"),
        }
        return {role: self.done[role].key for role in roles[stage] if role in self.done}

    def _given(self, stage: str, use: str) -> Step:
        """Return the step of a stage whose result is given."""
        given = self.finder.model(f"{stage}.use={use}", use, (stage,))
        brought = stage == "reward" and given.artifact is None
        key = self.keys.given_reward(given.key) if brought else given.key
        return Step(stage, key, StepState.given, model=given.model, artifact=given.artifact)


def computed_with(name: str) -> bool:
    """Whether a result is of no use without one of its files; reports can do without a log."""
    return not name.startswith((*TRACKED, "tables/")) and name not in _LOGS


def stale_files(code: Mapping[str, str], inputs: Mapping[str, str], step: Step) -> tuple[str, ...]:
    """Return the modules and parents that differ from those that a result was made with.

    Args:
        code: Digests of the modules that made the result.
        inputs: Digests of the weights it was made from.
        step: The step as it would run now.
    """
    anew = [f"{role} (made anew)" for role in other_inputs(inputs, step.inputs)]
    return tuple(changed(dict(code), step.code) + anew)


_first_seen: dict[str, dict[str, str]] = {}


def stage_code(stage: str, notes: Path | None = None) -> dict[str, str]:
    """Return the digest of every module that a stage computes with, as it was at the first call.

    Later jobs of a multirun in this process compute with the modules that are imported already,
    even if their files are edited meanwhile.

    Args:
        stage: Name of the stage's module.
        notes: File that caches the results of parsing.
    """
    if stage not in _first_seen:
        # A stage is handed the data rather than importing what loads them.
        entries = (f"rlhf_exp.stages.{stage}", "rlhf_exp.stages.data_module")
        digests = {
            path: digest
            for entry in entries
            for path, digest in code_digests(entry, PACKAGE, notes=notes).items()
        }
        _first_seen[stage] = {
            path: digest
            for path, digest in sorted(digests.items())
            if not path.startswith(NOT_COMPUTING)
        }
    return _first_seen[stage]
