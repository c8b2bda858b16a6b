"""Executors run the stages of an experiment: in this process, or on all processes of the run.

The leader alone plans, waits for leases, publishes and reports, outside of any process group. The
other processes run its jobs, and exit when it does.

While training, the first Ctrl-C saves at the end of the iteration and the second exits at once.
Everywhere else (loading, waiting for another process, evaluating) there is nothing to save, and
Ctrl-C exits at once. SIGTERM and SIGHUP (a closed terminal) exit at once, too.
"""

from __future__ import annotations

import importlib
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from rlhf_exp.config.compose import to_dict
from rlhf_exp.config.experiment import Config, PrecisionName, StrategyName
from rlhf_exp.config.search_space import TrialValues, trial_config
from rlhf_exp.config.study import StudyConfig
from rlhf_exp.errors import UserError
from rlhf_exp.pipeline.precision import replace_precision
from rlhf_exp.pipeline.stage_graph import module_of
from rlhf_exp.processes.channel import Message
from rlhf_exp.processes.environment import (
    LaunchEnvironment,
    clear_torchrun_variables,
    find_launch_environment,
    is_leader,
    threads_per_process,
)
from rlhf_exp.processes.failures import USER
from rlhf_exp.processes.leader import Leader, StartedWorkers, joined_leader, joined_worker
from rlhf_exp.processes.worker import Worker
from rlhf_exp.run_log import recording
from rlhf_exp.search.pruning import PruningCallback, RunningTrial
from rlhf_exp.signals import exiting_on_signals
from rlhf_exp.stages.context import StageContext, StageJob, StageResult
from rlhf_exp.store.fingerprint import key_of
from rlhf_exp.store.lease import Claim
from rlhf_exp.tracking.create import import_early

if TYPE_CHECKING:
    from torch.distributed import Store

    from rlhf_exp.stages.data_module import DataModule

LeaseCheck = Callable[[], None]
"""Raises if the lease is lost."""
Interrupts = Callable[[], AbstractContextManager[Callable[[], bool]]]
"""Defers Ctrl-C inside the block; yields whether it was pressed."""


class StageExecutor(Protocol):
    """Runs the stages of an experiment; called by the leader."""

    def materials(self, models: Mapping[str, str]) -> DataModule:
        """Return the data that the stages of this process read, loaded once.

        Args:
            models: Folder or hub id by role, of the models that exist.
        """

    def run(self, job: StageJob, check: LeaseCheck) -> StageResult:
        """Run a stage.

        Args:
            job: The stage's job.
            check: Raises if the lease is lost.
        """

    def end(self, error: BaseException | None, objective: float | None = None) -> None:
        """Release the other processes.

        Args:
            error: The error that ended the experiment, if one did.
            objective: The experiment's objective, for the searches of the other processes.
        """


def executor_for(config: Config, environment: LaunchEnvironment | None) -> StageExecutor:
    """Return the executor of an experiment.

    Args:
        config: The experiment.
        environment: The launch environment of this process, rank 0; `None` if it is alone.

    Raises:
        UserError: The other processes do not connect.
    """
    if config.distributed.strategy is StrategyName.single:
        return InProcessExecutor(config)
    if environment is not None:
        return LeaderExecutor(config, joined_leader(environment))
    processes = config.distributed.processes
    threads = with_threads(config, processes).distributed.threads or 1
    workers = StartedWorkers(processes, threads, _serve_started, config)
    return LeaderExecutor(config, Leader(workers))


def checked_launch_environment(config: Config) -> LaunchEnvironment | None:
    """Return the launch environment of this process, checked against the config.

    Raises:
        UserError: Another number of processes was started than the config asks for.
        SystemExit: The same in a process that is not rank 0, which reports it.
    """
    environment = find_launch_environment()
    processes = config.distributed.processes
    if environment is None:
        return None
    if environment.processes != processes:
        if environment.rank:
            raise SystemExit(USER)
        raise UserError(
            f"distributed.processes={processes}, but {environment.starter} has started "
            f"{environment.processes}; start {processes}, or set "
            f"distributed.processes={environment.processes}"
        )
    if config.distributed.strategy is StrategyName.single:
        clear_torchrun_variables()
        return None
    return environment


class InProcessExecutor:
    """Runs stages in this process alone."""

    def __init__(self, config: Config) -> None:
        self.runner = StageRunner(config)

    def materials(self, models: Mapping[str, str]) -> DataModule:
        """See `StageExecutor`."""
        return self.runner.materials(models)

    def run(self, job: StageJob, check: LeaseCheck) -> StageResult:
        """See `StageExecutor`."""
        return self.runner.run(job, polite_interrupts, check)

    def end(self, error: BaseException | None, objective: float | None = None) -> None:
        """Do nothing: there are no other processes."""


class LeaderExecutor:
    """Runs stages on all processes that this one leads.

    Args:
        config: The experiment.
        leader: The leader of the processes.
        study: The config that the other processes were started with, if they run a study's trials.
            They are kept for the next trial, unless this one fails.
        values: The trial's values; empty for the models that all trials share.
    """

    def __init__(
        self,
        config: Config,
        leader: Leader,
        study: Config | None = None,
        values: TrialValues | None = None,
    ) -> None:
        self.leader = leader
        self.runner = StageRunner(with_threads(config, leader.transport.local_processes))
        self.kept = study is not None
        self.header = {
            "config": digest_of(study or config),
            "values": values,
            "precision": (study or config).distributed.precision.name,
        }

    def materials(self, models: Mapping[str, str]) -> DataModule:
        """See `StageExecutor`."""
        return self.runner.materials(models)

    def run(self, job: StageJob, check: LeaseCheck) -> StageResult:
        """See `StageExecutor`."""

        def work(_: object) -> dict[str, Any]:
            return asdict(self.runner.run(job, polite_interrupts, check))

        message = {"job": asdict(job), **self.header}
        with exiting_on_signals(), polite_interrupts(lambda: self.leader.saving) as interrupted:
            return StageResult(**self.leader.run(message, work, interrupted))

    def end(self, error: BaseException | None, objective: float | None = None) -> None:
        """See `StageExecutor`."""
        if error is not None or not self.kept:
            self.leader.end(error, objective=objective)


def work_for_leader(config: Config, environment: LaunchEnvironment) -> float | None:
    """Run the leader's jobs in a process that joined, until the experiment or study is over.

    Args:
        config: The experiment or study.
        environment: The launch environment of this process, which is not rank 0.

    Returns:
        The leader's objective.

    Raises:
        SystemExit: The run failed or was stopped; rank 0 tells the user.
    """
    silence_console()
    worker, store = joined_worker(environment)
    interrupts = partial(polite_interrupts, announce=False)
    objective: float | None = _serve(config, worker, store, interrupts)["objective"]
    return objective


def _serve_started(config: Config, worker: Worker, store: Store) -> None:
    """Run the leader's jobs in a worker that the leader has started."""
    if worker.environment.rank:
        silence_console()
    _serve(config, worker, store, worker.saving)


def _serve(config: Config, worker: Worker, store: Store, interrupts: Interrupts) -> Message:
    """Run the leader's jobs; return its last message."""
    environment, runners = worker.environment, dict[str, StageRunner]()

    def work(message: dict[str, Any]) -> dict[str, Any]:
        nonlocal config
        if config.distributed.precision is PrecisionName.auto:  # the leader has chosen
            config = replace_precision(config, PrecisionName[message["precision"]])
        if message["config"] != digest_of(config):
            raise UserError(
                f"rank {environment.rank} was given another command than rank 0: start all with one"
            )
        name = str(message["values"])
        if name not in runners:
            runners.clear()
            job_config = _config_of_job(config, message["values"])
            runners[name] = StageRunner(with_threads(job_config, environment.local_processes))
        return asdict(runners[name].run(_job_from_json(message["job"]), interrupts))

    return worker.serve(store, work)


def _config_of_job(config: Config, values: TrialValues | None) -> Config:
    """Return the config of a job.

    Args:
        config: The experiment or study.
        values: In a study, the values of the trial; empty for the models that all trials share.
    """
    if values is None:
        return config
    if not values:
        return replace(config, study=StudyConfig())
    return replace(trial_config(config, values), eval=config.eval)


def _job_from_json(values: dict[str, Any]) -> StageJob:
    """Return the job that `asdict` made JSON values of."""
    claim, trial = values["claim"], values["trial"]
    objects = {
        "claim": None if claim is None else Claim(**claim),
        "trial": None if trial is None else RunningTrial.from_json(trial),
        "settings": tuple(values["settings"]),
    }
    return StageJob(**values | objects)


def with_threads(config: Config, local_processes: int) -> Config:
    """Return the config with the number of CPU threads of each process on this machine."""
    threads = threads_per_process(config.distributed.threads, local_processes)
    return replace(config, distributed=replace(config.distributed, threads=threads))


def digest_of(config: Config) -> str:
    """Return a digest by which processes compare their configs."""
    return key_of(to_dict(config))


def silence_console() -> None:
    """Leave the console to rank 0, which also reports this process's errors."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


class StageRunner:
    """Runs one stage after another in this process, with the data loaded once.

    Args:
        config: The experiment.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self._materials: DataModule | None = None

    def materials(self, models: Mapping[str, str]) -> DataModule:
        """Return the data, loaded at the first stage that runs.

        Args:
            models: Folder or hub id by role, of the models that exist.
        """
        if self._materials is None:
            # Late: a run that finds everything done must not load torch.
            from rlhf_exp.stages.data_module import DataModule

            self._materials = DataModule.of_run(self.config, models)
        return self._materials

    def run(
        self, job: StageJob, interrupts: Interrupts, check: LeaseCheck | None = None
    ) -> StageResult:
        """Run a stage.

        Args:
            job: The stage's job.
            interrupts: Handles Ctrl-C while the stage trains.
            check: Raises if this process may no longer write; by default it reads the claim.
        """
        if is_leader() and not job.probe:
            import_early(self.config.tracking.mode.value)
        from rlhf_exp.stages.out_of_memory import explained
        from rlhf_exp.stages.probe import Probe, ProbeFinished

        # By name and late: a plan must not load torch.
        stage = importlib.import_module(f"rlhf_exp.stages.{module_of(self.config, job.stage)}")
        context = StageContext(
            job=job,
            materials=self.materials(job.models),
            before_write=check or (job.claim.check if job.claim else _allow_writing),
            polite_interrupts=_immediate_interrupts if job.probe else interrupts,
            probe=Probe(job.stage) if job.probe else None,
            given_up=PruningCallback(job.trial, Path(job.folder)) if job.trial else None,
        )
        try:
            with (
                recording(job.log if is_leader() else None),
                explained(self.config, job.stage),
            ):
                result: StageResult = stage.run(self.config, context)
        except ProbeFinished as end:
            return StageResult({}, measured=end.measured)
        return result


@contextmanager
def _immediate_interrupts() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C exit at once: there is nothing to save."""
    yield lambda: False


def _allow_writing() -> None:
    """Allow writing without a lease."""


@contextmanager
def polite_interrupts(
    saves: Callable[[], bool] = lambda: True, announce: bool = True
) -> Iterator[Callable[[], bool]]:
    """Defer Ctrl-C inside the block; yield a function that says whether it was pressed.

    Args:
        saves: Whether there is something to save at present; if not, Ctrl-C exits at once.
        announce: Whether to tell the user; only one of several processes does.

    Raises:
        KeyboardInterrupt: At the end of a block in which Ctrl-C was pressed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    interrupted = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set() or not saves():
            raise KeyboardInterrupt
        interrupted.set()
        if announce:
            print(
                "\ninterrupted: saving at the end of this iteration (Ctrl-C again leaves at once, "
                "back to the last checkpoint)",
                file=sys.stderr,
                flush=True,
            )

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted.is_set
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted.is_set():
        # Ctrl-C in the last iteration: the block is done, but the user does not want what follows.
        raise KeyboardInterrupt
