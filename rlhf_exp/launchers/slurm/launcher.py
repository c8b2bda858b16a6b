"""`hydra/launcher=slurm`: submits the points of a multirun to Slurm, and waits for them."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from rlhf_exp import experiment
from rlhf_exp.config.checks_sweep import JobShape, job_shape, slurm_problems
from rlhf_exp.config.compose import to_dict
from rlhf_exp.config.evaluation import ScorerKind, scores_toxicity
from rlhf_exp.config.experiment import Config
from rlhf_exp.config.launchers import SlurmConfig
from rlhf_exp.config.problems import Problem, raise_problems
from rlhf_exp.config.schema_keys import CONF
from rlhf_exp.errors import Detached, JobsFailed, UserError
from rlhf_exp.function_source import function_module, function_source
from rlhf_exp.launchers.points import (
    SweepPoint,
    finished_records,
    point_of,
    precision_choices,
    record_failure,
    shared_work,
)
from rlhf_exp.launchers.slurm import monitor
from rlhf_exp.launchers.slurm.job import JobWork, perform
from rlhf_exp.launchers.slurm.monitor import JobFailure, JobOutcome, wait
from rlhf_exp.launchers.slurm.submissions import (
    Submission,
    SubmittedJob,
    latest_jobs,
    new_submission,
)
from rlhf_exp.pipeline.hub import missing, needs
from rlhf_exp.pipeline.plan import PACKAGE, records_of
from rlhf_exp.store.artifact import GIT_STATE, git_state
from rlhf_exp.store.run_records import RunRecord
from rlhf_exp.store.sealed import file_digest

_JOB_MODULE = "rlhf_exp.launchers.slurm.job"
_LAUNCH_SCRIPT = "launch.py"
PointOutcome = float | None | Exception


def launch(site: SlurmConfig, jobs: Sequence[tuple[list[str], Config]]) -> list[PointOutcome]:
    """Run jobs on Slurm and wait for them; jobs that are in the queue already are awaited.

    Args:
        site: Slurm's options on this cluster.
        jobs: Command line and config of each.

    Returns:
        The objective of each, or the exception to raise for it.

    Raises:
        UserError: The jobs cannot be submitted.
        Detached: The user pressed Ctrl-C; submitted jobs go on.
    """
    raise_problems(slurm_problems(site, [config for _, config in jobs]))
    points = [point_of(overrides, config) for overrides, config in jobs]
    if site.offline:
        _check_cached(points)
    return _SlurmMultirun(site, points).run()


class _SlurmMultirun:
    """The points of one multirun and their jobs."""

    def __init__(self, site: SlurmConfig, points: list[SweepPoint]) -> None:
        self.site, self.points = site, points
        config = points[0].config
        self.name, self.outputs = config.name or experiment.UNNAMED, Path(config.output_dir)
        self.records = records_of(config)
        self.console = Console(stderr=True)
        self.jobs: list[tuple[Submission, SubmittedJob]] = []

    def run(self) -> list[PointOutcome]:
        done = self._done()
        self._join_queued_jobs()
        present = done.keys() | {job.key for _, job in self.jobs if not job.shared}
        missing = {point.key: point for point in self.points if point.key not in present}
        try:
            if missing:
                with _interrupts_deferred():
                    self._submit(list(missing.values()))
            self._announce_jobs(len(done))
            outcomes_by_job = wait(self.jobs, self.site.poll_s, self._announce, self._on_end)
        except KeyboardInterrupt as error:
            raise Detached(self._detached_message()) from error
        return self._outcomes(done, outcomes_by_job)

    def _done(self) -> dict[str, RunRecord]:
        """Return the records of points that need no job."""
        return finished_records(self.points, self.records, self.name)

    def _join_queued_jobs(self) -> None:
        """Find those jobs of earlier submissions that are still in the queue."""
        known = {
            job.id: (submission, job) for submission, job in latest_jobs(self.outputs, self.name)
        }
        try:
            states = monitor.job_states(known)
        except monitor.Unreachable as error:
            raise_problems([Problem("hydra/launcher", "slurm", f"squeue fails: {error}")])
        queued = [known[number] for number, state in states.items() if not state.ended]
        keys = {point.key for point in self.points}
        self.jobs = [item for item in queued if item[1].shared or item[1].key in keys]

    def _submit(self, points: list[SweepPoint]) -> None:
        """Submit the stages that points share, then the points, each depending on the former."""
        shape = job_shape(self.site, points[0].config)
        assert not isinstance(shape, Problem), "checked"
        submission = new_submission(self.outputs, self.name)
        copy_code(submission.code)
        # Shared stages of an earlier submission are waited for, not run twice.
        queued = {job.key: job.id for _, job in self.jobs if job.shared}
        after: list[str] = []
        for level in [*([] if points[0].config.probe else shared_work(points)), points]:
            shared = level is not points
            new = [point for point in level if not shared or point.key not in queued]
            works = [self._work(point, submission, not shared) for point in new]
            ids = submit(self.site, shape, submission, works, self.name, after) if new else []
            for number, point in zip(ids, new, strict=True):
                ranks = shape.nodes * shape.tasks_per_node
                last = point.steps[-1]
                job = SubmittedJob(number, last.stage, last.key, point.overrides, ranks, shared)
                submission.jobs.append(job)
                self.jobs.append((submission, job))
            submission.write()
            after = [
                *ids,
                *(queued[point.key] for point in level if shared and point.key in queued),
            ]

    def _work(self, point: SweepPoint, submission: Submission, recorded: bool) -> JobWork:
        config = copy_user_functions(point.config, submission.code)
        if self.site.save_each_iteration:
            # PPO saves at the end of an iteration only.
            config = replace(config, ppo=replace(config.ppo, checkpoint_every=1))
        return JobWork(
            config=to_dict(config),
            overrides=point.overrides,
            key=point.key,
            recorded=recorded,
            grace_s=self.site.grace_s,
            max_restarts=self.site.max_restarts,
        )

    def _announce_jobs(self, done: int) -> None:
        counts = [f"{len(self.points)} points"] + ([f"{done} of them done"] if done else [])
        self._announce(f"{self.name}: {', '.join(counts)}; {len(self.jobs)} jobs in the queue")
        for choice in precision_choices(self.points):
            self._announce(choice)
        for submission in {each.folder: each for each, _ in self.jobs}.values():
            self._announce(f"logs: {submission.results}")

    def _detached_message(self) -> str:
        if not self.jobs:
            return "interrupted: nothing has been submitted"
        return (
            f"interrupted: {len(self.jobs)} jobs stay in Slurm's queue and go on by themselves.\n"
            f"  rlhf-exp status {self.name}    how far they are\n"
            f"  rlhf-exp cancel {self.name}    ends them\n"
            "The same command again waits for them."
        )

    def _on_end(self, job: SubmittedJob, outcome: JobOutcome) -> None:
        if not isinstance(outcome, JobFailure):
            self._announce(f"job {job.id} is done: {job.stage} {job.key}")
            return
        self._announce(f"job {job.id} has failed: {job.stage} {job.key}: {outcome.reason}")
        self._announce(f"  {outcome.log}")
        if not job.shared:
            self._record_failure(job, outcome)

    def _record_failure(self, job: SubmittedJob, failure: JobFailure) -> None:
        point = next(point for point in self.points if point.key == job.key)
        record_failure(self.records, self.name, point, failure.error)

    def _outcomes(
        self, done: dict[str, RunRecord], outcomes_by_job: dict[str, JobOutcome]
    ) -> list[PointOutcome]:
        failures = [end for end in outcomes_by_job.values() if isinstance(end, JobFailure)]
        lines = [
            f"\n  {end.job.id} {end.job.stage} {end.job.key}: {end.reason}\n    {end.log}"
            for end in failures
        ]
        failed = JobsFailed(
            f"{len(failures)} of {len(outcomes_by_job)} jobs failed:{''.join(lines)}"
        )
        by_key = {job.key: outcomes_by_job[job.id] for _, job in self.jobs if not job.shared}
        outcomes: list[PointOutcome] = []
        for point in self.points:
            outcome = by_key.get(point.key)
            if isinstance(outcome, JobFailure):
                outcomes.append(failed)
            else:
                outcomes.append(outcome.objective if outcome else done[point.key].objective)
        return outcomes

    def _announce(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)


def _check_cached(points: Sequence[SweepPoint]) -> None:
    """Check that the cache has all that jobs need from the network.

    Raises:
        UserError: Something is missing; with the command that fetches it.
    """
    for point in points:
        absent = missing(Path(point.config.output_dir), needs(point.config, point.steps))
        if absent:
            listed = "".join(f"\n  {need}" for need in absent)
            raise UserError(
                "nodes have no network (hydra.launcher.offline=true), and the cache here lacks:"
                f"{listed}\nFetch it on this machine first: rlhf-exp fetch "
                f"{shlex.join(point.overrides)}"
            )


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Defer Ctrl-C: a job that is in the queue must also be in the list of jobs."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def submit(
    site: SlurmConfig,
    shape: JobShape,
    submission: Submission,
    works: Sequence[JobWork],
    name: str,
    after: Sequence[str] = (),
) -> list[str]:
    """Submit jobs as one array (a single one as a plain job); return Slurm's number of each.

    Args:
        site: Slurm's options on this cluster.
        shape: Nodes, tasks and GPUs of each job.
        submission: The folder of code and results.
        works: The work of each job.
        name: Name of the jobs in the queue.
        after: Numbers of the jobs that must have succeeded before these start.

    Raises:
        UserError: Slurm refuses the jobs; with its message.
    """
    executor = _Executor(submission.results, python=site.interpreter)
    shared = not works[0].recorded
    executor.update_parameters(**_parameters(site, shape, shared), job_name=name)
    executor.update_parameters(setup=[*site.setup, *_environment(site, submission.code)])
    if after:
        # Without the second, jobs stay in the queue for ever when one of `after` has failed.
        extra = executor.parameters["additional_parameters"]
        dependency = {"dependency": "afterok:" + ":".join(after), "kill-on-invalid-dep": "yes"}
        executor.update_parameters(additional_parameters={**extra, **dependency})
    try:
        jobs = executor.map_array(perform, works)
    except (FailedJobError, FailedSubmissionError) as error:
        lines = [line for line in str(error).splitlines() if "sbatch: error" in line]
        raise UserError(
            "\n  ".join(["sbatch refuses the job:", *(lines or [str(error)])])
        ) from error
    return [job.job_id for job in jobs]


class _Executor(SlurmExecutor):
    """submitit's executor, with this project's entry module in each task."""

    @property
    def _submitit_command_str(self) -> str:
        # A notice (USR2) before Python runs would kill the task.
        ignore_notices = """trap "" USR2; exec "$@" """.strip()
        program = str(super()._submitit_command_str).replace("submitit.core._submit", _JOB_MODULE)
        return f"sh -c {shlex.quote(ignore_notices)} sh {program}"


def _parameters(site: SlurmConfig, shape: JobShape, shared: bool) -> dict[str, Any]:
    """Return sbatch's options in submitit's names."""
    gpus: Any = shape.gpus_per_node or None
    if gpus and site.gpu_type:
        gpus = f"{site.gpu_type}:{gpus}"
    parameters = {
        "partition": (site.shared_partition if shared else None) or site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "nodes": shape.nodes,
        "ntasks_per_node": shape.tasks_per_node,
        "gpus_per_node": gpus,
        "cpus_per_task": site.cpus_per_process,
        "mem": None if site.mem_gb is None else f"{int(site.mem_gb * 1024)}M",
        "time": (site.shared_time_min if shared else None) or site.time_min,
        "signal_delay_s": site.signal_delay_s,
        "array_parallelism": site.concurrent_jobs,
        "stderr_to_stdout": True,
        # A dead task ends the others, which would otherwise wait for it until their time limit.
        "srun_args": ["--kill-on-bad-exit=1", *site.srun],
        "additional_parameters": {"requeue": True, **site.sbatch},
    }
    # submitit's default `wckey` is unknown to some sites.
    return {key: value for key, value in parameters.items() if value is not None} | {"wckey": None}


def _environment(site: SlurmConfig, code: Path) -> list[str]:
    """Return shell lines that make jobs run the copied code, whatever their working folder."""
    lines = [
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1",
    ]
    if site.offline:
        lines.append("export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1")
    return lines


def copy_code(target: Path) -> None:
    """Copy `launch.py`, `conf/` and `rlhf_exp/` to a new folder, and record the state of git.

    So jobs that start later run the code as it was submitted.
    """
    root = PACKAGE.parent
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    target.mkdir(parents=True)
    for folder in (PACKAGE, CONF):
        shutil.copytree(folder, target / folder.name, ignore=ignored)
    if (root / _LAUNCH_SCRIPT).is_file():
        shutil.copy2(root / _LAUNCH_SCRIPT, target / _LAUNCH_SCRIPT)
    (target / GIT_STATE).write_text(json.dumps(git_state(root)), encoding="utf-8")


def copy_user_functions(config: Config, target: Path) -> Config:
    """Copy the user's functions beside the code; return the config with their new paths.

    A function's content is part of the key and its path is not, so keys do not change.
    """
    data, reward, toxicity = config.data, config.ppo.reward, config.eval.toxicity
    if data.reader is not None:
        data = replace(data, reader=_copy_function(data.reader, target))
    if reward.function is not None:
        reward = replace(reward, function=_copy_function(reward.function, target))
    terms = [
        term
        if term.function is None
        else replace(term, function=_copy_function(term.function, target))
        for term in reward.terms
    ]
    reward = replace(reward, terms=terms)
    if toxicity.scorer_kind is ScorerKind.function and scores_toxicity(config.eval):
        toxicity = replace(toxicity, scorer=_copy_function(toxicity.scorer, target))
    return replace(
        config,
        data=data,
        ppo=replace(config.ppo, reward=reward),
        eval=replace(config.eval, toxicity=toxicity),
    )


def _copy_function(reference: str, target: Path) -> str:
    if function_module(reference) is not None:
        return reference  # it may import others of its package
    file, name = function_source(reference)
    copy = target / "functions" / file_digest(file)[:16] / file.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(file, copy)
    return f"{copy}:{name}"
