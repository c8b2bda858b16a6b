"""Running a plan: each step under a lease, in its staging folder, published whole."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from rlhf_exp.config.compose import to_dict
from rlhf_exp.config.experiment import CachePolicy, Config
from rlhf_exp.pipeline.executor import StageExecutor, StageJob
from rlhf_exp.pipeline.inputs import CHECKPOINTS, MODEL, NOTE, StartedNote, weights_digest
from rlhf_exp.pipeline.plan import PACKAGE, Step, StepState, refuse_changed, stale_files, store_of
from rlhf_exp.search.pruning import RunningTrial
from rlhf_exp.stages.context import StageResult
from rlhf_exp.store.artifact import Artifact, Manifest, git_state, package_versions
from rlhf_exp.store.code_digest import changed
from rlhf_exp.store.lease import Lease, hold
from rlhf_exp.store.store import Store
from rlhf_exp.tracking.local import METRICS, read_metrics

FACTS = "facts.json"
_DROP = ("original_scores/*", NOTE)
_STATE = (f"{CHECKPOINTS}/*", "best/*", "kept/*")


class Pruned(Exception):
    """A search has given a trial up; there is no result.

    Attributes:
        step: Optimizer steps done.
        seconds: That they took.
        rows: What was logged, by step.
    """

    def __init__(self, step: int, seconds: float, rows: list[dict[str, float]]) -> None:
        super().__init__(f"given up after {step} optimizer steps")
        self.step, self.seconds, self.rows = step, seconds, rows


@dataclass(frozen=True)
class FinishedStep:
    """A step that is done.

    Attributes:
        step: The step.
        artifact: Its result; `None` for a given model that is not in the store.
        trained: Whether this process made it.
    """

    step: Step
    artifact: Artifact | None
    trained: bool

    @property
    def model(self) -> str:
        """Folder or hub id of its model."""
        if self.step.model is not None:
            return self.step.model
        assert self.artifact is not None
        return str(self.artifact.path / MODEL)


def run_steps(
    config: Config,
    steps: list[Step],
    crew: StageExecutor,
    tell: Callable[[str], None],
    trial: RunningTrial | None = None,
) -> list[FinishedStep]:
    """Bring all steps up to date, in order.

    Args:
        config: The experiment.
        steps: Its plan.
        crew: Does the work of a stage.
        tell: Says something to the user.
        trial: The trial of a search that the PPO step is.

    Raises:
        Pruned: The search gave the trial up.
    """
    store = store_of(config)
    done: dict[str, FinishedStep] = {}
    for step in steps:
        if not step.needs_work:
            done[step.stage] = FinishedStep(step, step.artifact, trained=False)
            continue
        models = {role: found.model for role, found in done.items() if role != "eval"}
        if config.model.path is not None:
            models["base"] = config.model.path
        models |= {role: found.model for role, found in step.extra.items()}
        made = {role: found.artifact for role, found in step.extra.items()}
        made |= {role: done[role].artifact for role in step.parents if role in done}
        inputs = {role: weights_digest(one) for role, one in made.items() if one is not None}
        own = trial if step.stage == "ppo" else None
        work = _Work(config, replace(step, inputs=inputs), store, models, crew, tell, own)
        done[step.stage] = work.run()
    return list(done.values())


class _Work:
    """One step being brought up to date."""

    def __init__(
        self,
        config: Config,
        step: Step,
        store: Store,
        models: dict[str, str],
        crew: StageExecutor,
        tell: Callable[[str], None],
        trial: RunningTrial | None,
    ) -> None:
        self.config, self.step, self.store = config, step, store
        self.models, self.crew = models, crew
        self.tell, self.trial = tell, trial

    def run(self) -> FinishedStep:
        """Make the result, unless another process has made it meanwhile."""
        step = self.step
        parents = list(step.parents.values())
        with hold(self.store, step.stage, step.key, on_wait=self.tell, parents=parents) as lease:
            found = self._made_meanwhile(lease)
            if found is not None:
                return FinishedStep(step, found, trained=False)
            folder, begun = self._staging()
            return FinishedStep(step, self._make(folder, begun, lease), trained=True)

    def _made_meanwhile(self, lease: Lease) -> Artifact | None:
        step = self.step
        pending = self.store.publish_pending(step.stage, step.key, check=lease.check)
        found = pending or self.store.lookup(step.stage, step.key)
        if found is None:
            return None
        # A redo replaces the result it has seen; a newer one is another process's redo.
        seen = step.artifact
        if seen is not None and found.manifest.created == seen.manifest.created:
            return None
        files = stale_files(found.manifest.code, found.manifest.inputs, step)
        if files and self.config.cache == CachePolicy.strict:
            refuse_changed([replace(step, state=StepState.changed, files=files)])
        return found

    def _staging(self) -> tuple[Path, StartedNote]:
        """Return the staging folder, emptied if what is in it cannot be continued, and its note.

        Raises:
            UserError: It was begun by other code.
        """
        step = self.step
        folder = self.store.staging(step.stage, step.key)
        begun = StartedNote.read(folder)
        if begun is not None and begun.continues(step.artifact, step.inputs):
            files = tuple(changed(begun.code, step.code))
            if not files or self.config.cache == CachePolicy.trust:
                return folder, begun
            if step.stage not in self.config.rerun:
                refuse_changed([replace(step, state=StepState.changed, files=files)])
        self.store.discard(step.stage, step.key)
        folder = self.store.staging(step.stage, step.key)
        replaces = None if step.artifact is None else step.artifact.manifest.created
        begun = StartedNote(step.code, step.inputs, replaces)
        begun.write(folder)
        return folder, begun

    def _timed(
        self, order: StageJob, begun: StartedNote, lease: Lease
    ) -> tuple[StageResult, StartedNote]:
        """Run the stage, noting the time it took however it ends."""
        began = time.monotonic()
        try:
            result = self.crew.run(order, lease.check)
        finally:
            begun = begun.later(time.monotonic() - began)
            with suppress(OSError):  # what the stage raises says more
                begun.write(Path(order.folder))
        return result, begun

    def _dropped(self, folder: Path) -> tuple[str, ...]:
        """Return patterns of the files that do not become part of the result."""
        if self.step.stage != "ppo" or not self.config.ppo.keep_state:
            return (*_DROP, *_STATE)
        # Of the state, the last checkpoint with what it speaks of; not what is left of others.
        *older, _ = sorted(folder.glob(f"{CHECKPOINTS}/step-*"))
        others = [f"{CHECKPOINTS}/{path.name}" for path in older]
        return (*_DROP, *others, f"{CHECKPOINTS}/.partial-*", f"{CHECKPOINTS}/damaged-*")

    def _given_up(self, folder: Path, step: int, seconds: float) -> Pruned:
        """Discard what a search has given up, all but its metrics."""
        rows = read_metrics(folder / METRICS)
        self.store.discard(self.step.stage, self.step.key)
        return Pruned(step, seconds, rows)

    def _make(self, folder: Path, begun: StartedNote, lease: Lease) -> Artifact:
        step = self.step
        resumes = (folder / CHECKPOINTS).is_dir()
        self.tell(f"{step.stage} {step.key}: {'resuming' if resumes else 'running'}")
        order = StageJob(
            stage=step.stage,
            key=step.key,
            folder=str(folder),
            models=self.models,
            parents=step.parents,
            inputs=step.inputs,
            claim=lease.claim,
            cache=str(Path(self.config.output_dir) / "cache"),
            trial=self.trial,
        )
        result, begun = self._timed(order, begun, lease)
        if result.pruned_step is not None:
            raise self._given_up(folder, result.pruned_step, begun.seconds)
        (folder / FACTS).write_text(json.dumps(result.facts))
        manifest = Manifest(
            stage=step.stage,
            key=step.key,
            config=to_dict(self.config),
            parents=step.parents,
            inputs=step.inputs,
            metrics=result.metrics,
            git=git_state(PACKAGE.parent),
            versions=package_versions(),
            wandb_run_id=result.run_id,
            code=begun.code,
            duration_s=begun.seconds,
            objective=result.objective,
        )
        return self.store.publish(
            step.stage,
            step.key,
            folder,
            manifest,
            self._dropped(folder),
            check=lease.check,
            replaces=step.artifact,
        )
