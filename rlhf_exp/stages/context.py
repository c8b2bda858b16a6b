"""The interface between stages and the pipeline: a stage's job, context and result.

A `StageJob` and a `StageResult` are plain values, which cross processes. A `StageContext` holds the
job together with objects of the process that runs it. This module is free of torch, because every
command imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from rlhf_exp.config.experiment import Config

if TYPE_CHECKING:
    from rlhf_exp.config.training import TrainingConfig
    from rlhf_exp.distributed.world import World
    from rlhf_exp.search.pruning import RunningTrial
    from rlhf_exp.stages.data_module import DataModule
    from rlhf_exp.store.lease import Claim
    from rlhf_exp.training.task import Task

MODEL = "model"
"""Folder of the model in an artifact."""

SNAPSHOTS = "snapshots"
"""Folder of the models of other steps in an artifact."""


def snapshot_name(step: int) -> str:
    """Return the name of a step's folder in `SNAPSHOTS`."""
    return f"step-{step:08d}"


@dataclass(frozen=True)
class StageJob:
    """One stage's work, as plain values: all that a process needs for it beside the config.

    Attributes:
        stage: Name of the stage.
        key: Key of the result.
        folder: The staging folder.
        cache: Folder of what can be computed again: tokenized sets, scores of original responses.
        models: Model folder or hub id by role (`base`, `sft`, `reward`, `ppo`).
        parents: Keys of the results that it starts from, by role.
        inputs: Digests of the parents' weights, as far as they are in the store.
        claim: The lease under which the result is made; `None` for a result that is not kept.
        probe: Whether only to measure a few iterations.
        trial: The search's trial that the job runs, which the search may prune.
        log: The run's log, if it writes one.
        settings: What sets the run apart, such as `ppo.lr=3e-4`, for names that people read.
    """

    stage: str
    key: str
    folder: str
    cache: str
    models: dict[str, str]
    parents: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    claim: Claim | None = None
    probe: bool = False
    trial: RunningTrial | None = None
    log: str | None = None
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class StageContext:
    """A stage's job and the objects of this process that it is run with.

    Attributes:
        job: The job.
        materials: The data, shared by the stages of one process.
        before_write: Raises if this process may no longer write.
        polite_interrupts: Defers Ctrl-C inside the block; yields whether it was pressed.
        probe: Measures a few iterations, after which the stage ends.
        given_up: Whether the search prunes the run: called after each of PPO's evaluations, in the
            main process, with the step and the number of steps.
    """

    job: StageJob
    materials: DataModule
    before_write: Callable[[], None]
    polite_interrupts: Callable[[], AbstractContextManager[Callable[[], bool]]]
    probe: ProbeRunner | None = None
    given_up: Callable[[int, int], bool] | None = None

    @property
    def stage(self) -> str:
        """Name of the stage."""
        return self.job.stage

    @property
    def key(self) -> str:
        """Key of the result."""
        return self.job.key

    @property
    def folder(self) -> Path:
        """The staging folder."""
        return Path(self.job.folder)

    @property
    def cache(self) -> Path:
        """Folder of what can be computed again."""
        return Path(self.job.cache)

    @property
    def models(self) -> Mapping[str, str]:
        """Model folder or hub id by role."""
        return self.job.models

    @property
    def parents(self) -> Mapping[str, str]:
        """Keys of the results that the stage starts from, by role."""
        return self.job.parents

    @property
    def inputs(self) -> Mapping[str, str]:
        """Digests of the parents' weights, by role."""
        return self.job.inputs


class ProbeRunner(Protocol):
    """Measures a training stage in place of training it; `rlhf_exp.stages.probe` has the only one.

    Attributes:
        iterations: Iterations that are run.
    """

    iterations: int

    def run(
        self,
        section: TrainingConfig,
        steps: int,
        task: Task,
        world: World,
        context: StageContext,
    ) -> NoReturn:
        """Run the probe; leaves the stage by an exception that the caller of the stage expects."""


class StageModule(Protocol):
    """The `run` function of a stage's module."""

    def __call__(self, config: Config, context: StageContext) -> StageResult:
        """Write the result into `context.folder`."""


@dataclass(frozen=True)
class StageResult:
    """The summary of a stage's result; the result itself is in the staging folder.

    Attributes:
        metrics: Final metrics, for the manifest.
        objective: The number that a sweep over this stage maximises.
        run_id: Id of the tracked run.
        facts: Plain values for the report: parameter counts, data, cut prompts.
        measured: A probe's measurements as JSON values; empty otherwise.
        pruned_step: The optimizer step after which a search pruned the run, without a result.
    """

    metrics: dict[str, float]
    objective: float | None = None
    run_id: str | None = None
    facts: dict[str, float | int | str] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    pruned_step: int | None = None
