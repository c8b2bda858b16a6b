"""`hydra/launcher=local`: runs the points of a multirun here, one by one or side by side.

Side by side, each point is a process with its own share of the visible GPUs. A process that is
killed takes nothing with it (a pool of joblib's, or of the standard library's, ends all its workers
when one dies).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from rlhf_exp.config.compose import to_dict
from rlhf_exp.config.experiment import Config
from rlhf_exp.config.problems import Problem, raise_problems
from rlhf_exp.errors import Detached, UserError
from rlhf_exp.launchers.optuna.table import study_text
from rlhf_exp.launchers.points import (
    JobResult,
    SweepPoint,
    differing_overrides,
    distinct,
    finished_records,
    jobs_failed_error,
    points_of,
    precision_choices,
    print_results,
    record_failure,
    shared_work,
)
from rlhf_exp.launchers.run_job import run_job
from rlhf_exp.pipeline.plan import PACKAGE, records_of
from rlhf_exp.processes.environment import (
    cores,
    cuda_visible_devices,
    find_launch_environment,
    visible_devices,
)
from rlhf_exp.redaction import formatted_exception
from rlhf_exp.store.atomic_files import write_json_atomic

POLL_S = 0.1
SAVE_TIMEOUT_S = 3600.0
SHARED_ATTEMPTS = 3
_TAIL_LINES = 15


def launch(n_jobs: int, jobs: Sequence[tuple[list[str], Config]]) -> list[float | None]:
    """Run jobs and wait for them.

    Args:
        n_jobs: Number of jobs at the same time; -1: as many as cores and GPUs allow.
        jobs: Command line and config of each.

    Returns:
        The objective of each.

    Raises:
        UserError: The jobs cannot be run.
        JobsFailed: Points have failed; the others are complete.
        KeyboardInterrupt: The user stopped them; checkpoints hold their work.
    """
    first = jobs[0][1]
    if n_jobs < 1 and n_jobs != -1:
        raise_problems(
            [Problem("hydra.launcher.n_jobs", str(n_jobs), "must be at least 1, or -1.")]
        )
    if first.plan or first.probe or find_launch_environment() is not None:
        # Started by torchrun, all processes go through the jobs together, and end together.
        return [run_job(config, overrides) for overrides, config in jobs]
    requested = points_of(jobs)
    points = distinct(requested)
    sweep = _Multirun(points, n_jobs)
    if len(points) < len(requested):
        sweep.announce(
            f"{len(requested) - len(points)} points have the key of an earlier one: run once"
        )
    results = sweep.run()
    if len(points) > 1 or not points[0].is_worker:
        print_results(points, results, sweep.console)
        if points[0].is_worker:
            outputs, name = Path(first.output_dir), sweep.name
            Console().print(Text(f"\n{study_text(outputs, name)}"), soft_wrap=True)
    failed = jobs_failed_error(points, results)
    if failed is not None:
        raise failed
    return [results[point.key].objective for point in requested]


class _Multirun:
    """The points of one multirun, one by one in this process or side by side in their own."""

    def __init__(self, points: list[SweepPoint], n_jobs: int) -> None:
        config = points[0].config
        self.points = points
        assert config.name is not None, "checked: a multirun has a name"
        self.name = config.name
        self.records = records_of(config)
        self.folder = Path(config.output_dir) / "sweeps" / self.name / "logs"
        self.names = differing_overrides(points)
        self.console = Console(stderr=True)
        # A single point at a time sees all GPUs of this process.
        self.gpus = GpuPool() if n_jobs == 1 else GpuPool.visible()
        raise_problems(filter(None, [self.gpus.problem(points)]))
        # If one point needs several processes, fewer points fit.
        processes = max(point.config.distributed.processes for point in points)
        self.n_jobs = self.gpus.side_by_side(processes) if n_jobs == -1 else n_jobs

    def run(self) -> dict[str, JobResult]:
        """Run the points; return their results by key."""
        done = finished_records(self.points, self.records, self.name)
        results = {key: JobResult(record.objective) for key, record in done.items()}
        left = [point for point in self.points if point.key not in done]
        self.announce(f"{self.name}: {len(self.points)} points, {len(done)} of them done")
        for choice in precision_choices(self.points):
            self.announce(choice)
        if self.n_jobs == 1:
            for point in left:
                results[point.key] = self._run_in_process(point)
        else:
            results |= self._side_by_side(left)
        return {point.key: results[point.key] for point in self.points}

    def _run_in_process(self, point: SweepPoint) -> JobResult:
        """Run a point in this process."""
        self.announce(f"{self.name}: {self.names[point.key]}")
        began = time.monotonic()
        try:
            objective = run_job(point.config, list(point.overrides))
        except Exception as error:
            text = str(error) if isinstance(error, UserError) else formatted_exception(error)
            record_failure(self.records, self.name, point, text)
            self.announce(f"failed: {text}")
            return JobResult(error=text, seconds=time.monotonic() - began)
        return JobResult(objective, seconds=time.monotonic() - began)

    def _side_by_side(self, left: list[SweepPoint]) -> dict[str, JobResult]:
        """Run the stages that points share, then the points, several at a time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.announce(f"logs: {self.folder.absolute()}")
        failed: dict[str, JobResult] = {}
        for level in shared_work(left):
            failed |= self._run_shared(level)
        runnable, results = [], {}
        for point in left:
            cause = next((failed[step.key] for step in point.steps if step.key in failed), None)
            if cause is None:
                runnable.append(point)
                continue
            error = f"what it shares with other points failed: {cause.reason}"
            record_failure(self.records, self.name, point, error, cause.log)
            results[point.key] = JobResult(error=error, seconds=0.0, log=cause.log)
        return results | self._run_points(runnable, recorded=True)

    def _run_shared(self, level: list[SweepPoint]) -> dict[str, JobResult]:
        """Run stages that points share; return the results of those that failed, by key.

        A process that was killed is started again, up to `SHARED_ATTEMPTS` starts, and goes on from
        its checkpoint: no point could run without it.
        """
        failed: dict[str, JobResult] = {}
        starts = 0
        while level:
            starts += 1
            results = self._run_points(level, recorded=False)
            killed = [point for point in level if results[point.key].killed]
            level = killed if starts < SHARED_ATTEMPTS else []
            for key, result in results.items():
                if key in [point.key for point in level]:
                    self.announce(f"{key} is started again")
                elif result.error is not None:
                    failed[key] = result
        return failed

    def _run_points(self, points: list[SweepPoint], recorded: bool) -> dict[str, JobResult]:
        """Run points in processes of their own, at most `n_jobs` at a time."""
        waiting, running = list(points), list[PointProcess]()
        results: dict[str, JobResult] = {}
        width = self._most_at_once(points)
        try:
            while waiting or running:
                while waiting and len(running) < width:
                    gpus = self.gpus.take(waiting[0].config.distributed.processes)
                    if gpus is None:
                        break
                    running.append(self._start(waiting.pop(0), recorded, width, gpus))
                for process in list(running):
                    result = process.poll()
                    if result is not None:
                        running.remove(process)
                        self.gpus.give_back(process.gpus)
                        results[process.point.key] = result
                        self._announce_end(process.point, result, recorded)
                time.sleep(POLL_S)
        except BaseException as error:
            _stop_all(running)
            if isinstance(error, KeyboardInterrupt):
                count = f"{len(running)} points were stopped"
                raise Detached(f"interrupted: {count}; the same command goes on") from error
            raise
        return results

    def _most_at_once(self, points: list[SweepPoint]) -> int:
        """Return how many of these points can run at the same time; announce a limit by GPUs."""
        width = max(1, min(self.n_jobs, len(points)))
        if not self.gpus.names:
            return width
        fewest = min(point.config.distributed.processes for point in points)
        fitting = len(self.gpus.names) // fewest
        if fitting < width:
            count = f"{len(self.gpus.names)} GPUs are visible"
            self.announce(f"{count}: at most {fitting} of the {width} points run at the same time")
        return min(width, fitting)

    def _start(
        self, point: SweepPoint, recorded: bool, width: int, gpus: list[str]
    ) -> PointProcess:
        processes = point.config.distributed.processes
        threads = point.config.distributed.threads or max(1, cores() // (width * processes))
        section = replace(point.config.distributed, threads=threads)
        sized = replace(point, config=replace(point.config, distributed=section))
        started = PointProcess(sized, self.folder, recorded, threads, gpus)
        on_gpus = f" on GPU {', '.join(gpus)}" if gpus else ""
        description = self._description(point, recorded)
        self.announce(f"{point.steps[-1].stage} {point.key} runs{on_gpus}: {description}")
        return started

    def _announce_end(self, point: SweepPoint, result: JobResult, recorded: bool) -> None:
        name = f"{point.steps[-1].stage} {point.key}"
        if result.error is None:
            objective = "" if result.objective is None else f", objective {result.objective:.4g}"
            self.announce(f"{name} is done after {result.seconds:.0f} s{objective}")
            return
        self.announce(f"{name} has failed: {result.reason}\n  {result.log}")
        if recorded:
            record_failure(self.records, self.name, point, result.error, result.log)

    def _description(self, point: SweepPoint, recorded: bool) -> str:
        return self.names[point.key] if recorded else "shared by the points"

    def announce(self, text: str) -> None:
        """Print a line for the user."""
        self.console.print(Text(text), soft_wrap=True)


@dataclass(frozen=True)
class PointJob:
    """The job of a point's process (`local_job.py`), as JSON values.

    Attributes:
        config: The config.
        overrides: The command line, for the record.
        recorded: Whether it is a point, with a record and a report; else stages that points share.
        result: File to write the result to: `objective` or `error`.
    """

    config: dict[str, Any]
    overrides: tuple[str, ...]
    recorded: bool
    result: str


class PointProcess:
    """A point that runs in a process of its own.

    Its output goes to a log. When this process is gone, it saves its work and exits.

    Args:
        point: The point.
        folder: The folder of its log, and for a moment of its job and result files.
        recorded: See `PointJob`.
        threads: CPU threads of each of its processes.
        gpus: The GPUs that it sees; empty: those that this process sees.
    """

    def __init__(
        self,
        point: SweepPoint,
        folder: Path,
        recorded: bool,
        threads: int,
        gpus: Sequence[str] = (),
    ) -> None:
        self.point, self.gpus = point, list(gpus)
        self.log = folder / f"{point.key}.log"
        self._result = folder / f".{point.key}.result.json"
        self._result.unlink(missing_ok=True)
        self._began = time.monotonic()
        job_file = folder / f".{point.key}.work.json"
        job = PointJob(to_dict(point.config), point.overrides, recorded, str(self._result))
        write_json_atomic(job_file, asdict(job))
        # For libraries that start their own threads; torch reads the config.
        environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        environment |= cuda_visible_devices(self.gpus)
        # The code of this process, whatever is installed or lies in the current folder.
        inherited = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
        environment["PYTHONPATH"] = os.pathsep.join([str(PACKAGE.parent), *inherited])
        with self.log.open("a", encoding="utf-8") as out:
            out.write(f"== {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(point.overrides)}\n")
            out.flush()
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rlhf_exp.launchers.local_job", str(job_file)],
                # Never written to: its end tells the child that this process is gone.
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                env={**os.environ, **environment},
                # A Ctrl-C of the terminal goes to this process only, which passes it on.
                start_new_session=True,
            )

    def poll(self) -> JobResult | None:
        """Return its result; `None` while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        assert self._process.stdin is not None
        self._process.stdin.close()
        seconds = time.monotonic() - self._began
        try:
            content = json.loads(self._result.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            error = f"{_log_tail(self.log)}\n{_exit_description(code)}".strip()
            return JobResult(None, error, seconds, self.log, killed=code < 0)
        self._result.unlink()
        return JobResult(content.get("objective"), content.get("error"), seconds, self.log)

    def interrupt(self) -> None:
        """Ask it to save and exit, as Ctrl-C does; the second time, to exit at once."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """Kill it; its work since the last checkpoint is lost."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _stop_all(running: list[PointProcess]) -> None:
    """Let processes save and exit; kill them at the second Ctrl-C."""
    try:
        for process in running:
            process.interrupt()
        wait_all(running, SAVE_TIMEOUT_S)
    finally:
        for process in running:
            process.kill()


def wait_all(running: Sequence[PointProcess], seconds: float) -> bool:
    """Wait until all have ended, at most `seconds`; return whether they have."""
    end = time.monotonic() + seconds
    while any(process.poll() is None for process in running):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _log_tail(path: Path) -> str:
    """Return the last lines of a log file."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-_TAIL_LINES:])


def _exit_description(code: int) -> str:
    """Return how a process without a result has ended."""
    if code >= 0:
        return f"ended with exit code {code} and no result"
    return f"killed by {signal.Signals(-code).name}"


class GpuPool:
    """The visible GPUs, divided among the running points; without GPUs, it does nothing.

    Args:
        names: The visible GPUs, as in `CUDA_VISIBLE_DEVICES`.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = tuple(names)
        self._free = list(names)

    @classmethod
    def visible(cls) -> GpuPool:
        """Return the GPUs that this process sees."""
        return cls(visible_devices())

    def problem(self, points: Sequence[SweepPoint]) -> Problem | None:
        """Return the problem if a point needs more GPUs than there are."""
        most = max(point.config.distributed.processes for point in points)
        if not self.names or most <= len(self.names):
            return None
        return Problem(
            "distributed.processes",
            str(most),
            f"a point needs a GPU for each of its processes, and {len(self.names)} are visible "
            f"({', '.join(self.names)}); set it to at most {len(self.names)}.",
        )

    def side_by_side(self, processes: int) -> int:
        """Return how many points of so many processes fit on cores and GPUs; at least 1."""
        fitting = cores() // processes
        if self.names:
            fitting = min(fitting, len(self.names) // processes)
        return max(1, fitting)

    def take(self, processes: int) -> list[str] | None:
        """Take a GPU for each process of a point; `None` while too few are free."""
        if not self.names:
            return []
        if len(self._free) < processes:
            return None
        taken, self._free = self._free[:processes], self._free[processes:]
        return taken

    def give_back(self, names: Sequence[str]) -> None:
        """Return the GPUs of a point that has ended to the pool."""
        free = {*self._free, *names}
        self._free = [name for name in self.names if name in free]
