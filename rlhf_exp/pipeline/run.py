"""Running a plan: each step runs under a lease in a staging folder, and is published whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from rlhf_exp.config.compose import to_dict
from rlhf_exp.config.evaluation import SAMPLES, SAMPLES_FILE
from rlhf_exp.config.experiment import CHOSEN, CHOSEN_FILE, UNTRAINED, CachePolicy, Config
from rlhf_exp.config.training import CONTINUED
from rlhf_exp.pipeline.executor import StageExecutor
from rlhf_exp.pipeline.hub import check_cached
from rlhf_exp.pipeline.inputs import CHECKPOINTS, MODEL, NOTE, StartedNote, weights_digest
from rlhf_exp.pipeline.local_models import local_models
from rlhf_exp.pipeline.plan import PACKAGE, Step, StepState, refuse_changed, stale_files, store_of
from rlhf_exp.search.pruning import RunningTrial
from rlhf_exp.stages.context import StageJob, StageResult
from rlhf_exp.store.artifact import Artifact, Manifest, git_state, package_versions
from rlhf_exp.store.atomic_files import write_json_atomic
from rlhf_exp.store.code_digest import changed
from rlhf_exp.store.disk_usage import TRACKED
from rlhf_exp.store.lease import Lease, hold
from rlhf_exp.store.store import Store
from rlhf_exp.tracking.local import METRICS, read_metrics
from rlhf_exp.tracking.progress_bar import PROGRESS_FILE

FACTS = "facts.json"
_TEMPORARY = ("original_scores/*", "parts/*", NOTE, PROGRESS_FILE)
_STATE = (f"{CHECKPOINTS}/*", "best/*", "kept/*")


class Pruned(Exception):
    """A search has pruned a trial; there is no result.

    Attributes:
        step: Optimizer steps done.
        seconds: Time that they took.
        rows: The logged metrics, one row a step.
    """

    def __init__(self, step: int, seconds: float, rows: list[dict[str, float]]) -> None:
        super().__init__(f"given up after {step} optimizer steps")
        self.step, self.seconds, self.rows = step, seconds, rows


@dataclass(frozen=True)
class FinishedStep:
    """A step that is done.

    Attributes:
        step: The step.
        artifact: The result; `None` for a given model that is not in the store.
        trained: Whether this run made the result.
    """

    step: Step
    artifact: Artifact | None
    trained: bool

    @property
    def model(self) -> str:
        """Folder or hub id of the model."""
        if self.step.model is not None:
            return self.step.model
        assert self.artifact is not None
        return str(self.artifact.path / MODEL)


def run_steps(
    config: Config,
    steps: list[Step],
    executor: StageExecutor,
    tell: Callable[[str], None],
    trial: RunningTrial | None = None,
    *,
    overrides: Sequence[str] = (),
    log: Path | None = None,
) -> list[FinishedStep]:
    """Bring all steps up to date, in order.

    Args:
        config: The experiment.
        steps: Its plan.
        executor: Runs the stages.
        tell: Prints a line for the user.
        trial: The search's trial that the PPO step runs.
        overrides: The command line, for names that people read.
        log: The run's log, if it writes one.

    Raises:
        Pruned: The search pruned the trial.
    """
    store = store_of(config)
    done: dict[str, FinishedStep] = {}
    steps, base = local_models(config, steps)
    for step in steps:
        if not step.needs_work:
            done[step.stage] = FinishedStep(step, step.artifact, trained=False)
            continue
        models = {role: finished.model for role, finished in done.items() if role not in UNTRAINED}
        if base is not None:
            models["base"] = base
        models |= {role: extra.model for role, extra in step.extra.items()}
        parents = {role: extra.artifact for role, extra in step.extra.items()}
        parents |= {role: done[role].artifact for role in step.parents if role in done}
        inputs = {
            role: weights_digest(parent) for role, parent in parents.items() if parent is not None
        }
        step_trial = trial if step.stage == "ppo" else None
        step = replace(step, inputs=inputs)
        details = JobDetails(step_trial, tuple(overrides), None if log is None else str(log))
        run = _StepRun(config, step, store, models, parents, executor, tell, details)
        done[step.stage] = run.run()
    return list(done.values())


def _files_read(role: str) -> Callable[[str], bool]:
    """Return which files a stage reads of a result that it is made from in this role."""
    if role == CONTINUED:
        return lambda name: not name.startswith(TRACKED)
    if role == SAMPLES:
        return lambda name: name == SAMPLES_FILE
    if role == CHOSEN:
        return lambda name: name == CHOSEN_FILE
    return lambda name: name.startswith(f"{MODEL}/")


@dataclass(frozen=True)
class JobDetails:
    """What a stage is told of its run besides its own work: see `StageJob`."""

    trial: RunningTrial | None = None
    settings: tuple[str, ...] = ()
    log: str | None = None


class _StepRun:
    """Brings one step up to date."""

    def __init__(
        self,
        config: Config,
        step: Step,
        store: Store,
        models: dict[str, str],
        parents: dict[str, Artifact | None],
        executor: StageExecutor,
        tell: Callable[[str], None],
        details: JobDetails,
    ) -> None:
        self.config, self.step, self.store = config, step, store
        self.models, self.parents, self.executor = models, parents, executor
        self.tell, self.details = tell, details

    def run(self) -> FinishedStep:
        """Make the result, unless another process has made it meanwhile."""
        step = self.step
        parents = list(step.parents.values())
        with hold(
            self.store.root, step.stage, step.key, on_wait=self.tell, parents=parents
        ) as lease:
            artifact = self._made_meanwhile(lease)
            if artifact is not None:
                return FinishedStep(step, artifact, trained=False)
            for role, parent in self.parents.items():
                if parent is not None:
                    parent.verify(_files_read(role))
            for role, model in self.models.items():
                if not Path(model).exists():
                    check_cached(model, self.config.model.revision if role == "base" else None)
            folder, note = self._staging()
            return FinishedStep(step, self._make(folder, note, lease), trained=True)

    def _made_meanwhile(self, lease: Lease) -> Artifact | None:
        step = self.step
        pending = self.store.publish_pending(step.stage, step.key, check=lease.check)
        artifact = pending or self.store.lookup(step.stage, step.key)
        if artifact is None:
            return None
        # A redo replaces the result it has seen; a newer one is another process's redo.
        seen = step.artifact
        if seen is not None and artifact.manifest.created == seen.manifest.created:
            return None
        files = stale_files(artifact.manifest.code, artifact.manifest.inputs, step)
        if files and self.config.cache == CachePolicy.strict:
            refuse_changed([replace(step, state=StepState.changed, files=files)])
        return artifact

    def _staging(self) -> tuple[Path, StartedNote]:
        """Return the staging folder, emptied if its content cannot be continued, and its note.

        Raises:
            UserError: The step was begun by other code.
        """
        step = self.step
        folder = self.store.staging(step.stage, step.key)
        note = StartedNote.read(folder)
        if note is not None and note.continues(step.artifact, step.inputs):
            files = tuple(changed(note.code, step.code))
            if not files or self.config.cache == CachePolicy.trust:
                return folder, note
            if step.stage not in self.config.rerun:
                refuse_changed([replace(step, state=StepState.changed, files=files)])
        self.store.discard(step.stage, step.key)
        folder = self.store.staging(step.stage, step.key)
        replaces = None if step.artifact is None else step.artifact.manifest.created
        note = StartedNote(step.code, step.inputs, replaces)
        note.write(folder)
        return folder, note

    def _run_timed(
        self, job: StageJob, note: StartedNote, lease: Lease
    ) -> tuple[StageResult, StartedNote]:
        """Run the stage, and add the time it took to the note however it ends."""
        started = time.monotonic()
        try:
            result = self.executor.run(job, lease.check)
        finally:
            note = note.later(time.monotonic() - started)
            with suppress(OSError):  # the stage's own error says more
                note.write(Path(job.folder))
        return result, note

    def _excluded_files(self, folder: Path) -> tuple[str, ...]:
        """Return patterns of the files that do not become part of the result."""
        if self.step.stage != "ppo" or not self.config.ppo.keep_state:
            return (*_TEMPORARY, *_STATE)
        # The state is the last checkpoint and the files it refers to, without older checkpoints.
        *older, _ = sorted(folder.glob(f"{CHECKPOINTS}/step-*"))
        others = [f"{CHECKPOINTS}/{path.name}" for path in older]
        return (*_TEMPORARY, *others, f"{CHECKPOINTS}/.partial-*", f"{CHECKPOINTS}/damaged-*")

    def _discard_pruned(self, folder: Path, step: int, seconds: float) -> Pruned:
        """Discard a run that the search has pruned; return its metrics in the exception."""
        rows = read_metrics(folder / METRICS)
        self.store.discard(self.step.stage, self.step.key)
        return Pruned(step, seconds, rows)

    def _make(self, folder: Path, note: StartedNote, lease: Lease) -> Artifact:
        step = self.step
        resumes = (folder / CHECKPOINTS).is_dir()
        self.tell(f"{step.stage} {step.key}: {'resuming' if resumes else 'running'}")
        cache = Path(self.config.output_dir) / "cache"
        details = self.details
        job = step.job(folder, cache, self.models, claim=lease.claim, trial=details.trial)
        job = replace(job, settings=details.settings, log=details.log)
        result, note = self._run_timed(job, note, lease)
        if result.pruned_step is not None:
            raise self._discard_pruned(folder, result.pruned_step, note.seconds)
        write_json_atomic(folder / FACTS, result.facts, durable=False)
        manifest = Manifest(
            stage=job.stage,
            key=job.key,
            config=to_dict(self.config),
            parents=job.parents,
            inputs=job.inputs,
            metrics=result.metrics,
            git=git_state(PACKAGE.parent),
            versions=package_versions(),
            wandb_run_id=result.run_id,
            code=note.code,
            duration_s=note.seconds,
            objective=result.objective,
        )
        return self.store.publish(
            step.stage,
            step.key,
            folder,
            manifest,
            self._excluded_files(folder),
            check=lease.check,
            replaces=step.artifact,
        )
