"""`hydra/launcher=local`: the points of a multirun on this machine, one by one or side by side.

Side by side, each point is a process: one that is killed takes nothing with it (a pool of joblib's,
or of the standard library's, ends all its workers when one dies).

A point in a process of its own: started, watched, asked to stop.

Points side by side share the visible GPUs out: each has its own while it runs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
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
    distinct,
    done_before,
    failure_of,
    note_failure,
    points_of,
    shared_work,
    show,
    varied,
)
from rlhf_exp.launchers.run_job import run_job
from rlhf_exp.pipeline.plan import PACKAGE, records_of
from rlhf_exp.processes.environment import (
    cores,
    cuda_visible_devices,
    find_launch_environment,
    visible_devices,
)
from rlhf_exp.store.atomic_files import write_json_atomic

POLL_S = 0.1
SAVING_S = 3600.0
SHARED_STARTS = 3


def launch(n_jobs: int, jobs: Sequence[tuple[list[str], Config]]) -> list[float | None]:
    """Run jobs and wait for them.

    Args:
        n_jobs: How many at the same time; -1: as many as there are cores for.
        jobs: Command line and config of each.

    Returns:
        The objective of each.

    Raises:
        UserError: They cannot be run.
        JobsFailed: Points have failed; the others are complete.
        KeyboardInterrupt: The user stopped them; checkpoints hold what was done.
    """
    first = jobs[0][1]
    if n_jobs < 1 and n_jobs != -1:
        raise_problems(
            [Problem("hydra.launcher.n_jobs", str(n_jobs), "must be at least 1, or -1.")]
        )
    if first.plan or first.probe or find_launch_environment() is not None:
        # Started by torchrun, all processes go through the jobs together, and end together.
        return [run_job(config, overrides) for overrides, config in jobs]
    asked = points_of(jobs)
    points = distinct(asked)
    sweep = _Multirun(points, n_jobs)
    if len(points) < len(asked):
        sweep.tell(f"{len(asked) - len(points)} points have the key of an earlier one: run once")
    endings = sweep.run()
    if len(points) > 1 or not points[0].is_worker:
        show(points, endings, sweep.console)
        if points[0].is_worker:
            outputs, name = Path(first.output_dir), sweep.name
            Console().print(Text(f"\n{study_text(outputs, name)}"), soft_wrap=True)
    failed = failure_of(points, endings)
    if failed is not None:
        raise failed
    return [endings[point.key].objective for point in asked]


class _Multirun:
    def __init__(self, points: list[SweepPoint], n_jobs: int) -> None:
        config = points[0].config
        self.points = points
        assert config.name is not None, "checked: a multirun has a name"
        self.name = config.name
        self.records = records_of(config)
        self.folder = Path(config.output_dir) / "sweeps" / self.name / "logs"
        self.names = varied(points)
        self.console = Console(stderr=True)
        # One at a time has all that this process sees.
        self.devices = Devices() if n_jobs == 1 else Devices.seen()
        raise_problems(filter(None, [self.devices.problem(points)]))
        # Where one point needs several processes, fewer points fit.
        each = max(point.config.distributed.processes for point in points)
        self.n_jobs = self.devices.side_by_side(each) if n_jobs == -1 else n_jobs

    def run(self) -> dict[str, JobResult]:
        """Return how each point has ended, by key."""
        done = done_before(self.points, self.records, self.name)
        found = {key: JobResult(record.objective) for key, record in done.items()}
        left = [point for point in self.points if point.key not in done]
        self.tell(f"{self.name}: {len(self.points)} points, {len(done)} of them done")
        if self.n_jobs == 1:
            for point in left:
                found[point.key] = self._here(point)
        else:
            found |= self._side_by_side(left)
        return {point.key: found[point.key] for point in self.points}

    def _here(self, point: SweepPoint) -> JobResult:
        """Run a point in this process."""
        self.tell(f"{self.name}: {self.names[point.key]}")
        began = time.monotonic()
        try:
            objective = run_job(point.config, list(point.overrides))
        except Exception as error:
            text = str(error) if isinstance(error, UserError) else traceback.format_exc()
            note_failure(self.records, self.name, point, text)
            self.tell(f"failed: {text}")
            return JobResult(error=text, seconds=time.monotonic() - began)
        return JobResult(objective, seconds=time.monotonic() - began)

    def _side_by_side(self, left: list[SweepPoint]) -> dict[str, JobResult]:
        """Run what points share, then the points, several at a time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tell(f"logs: {self.folder.absolute()}")
        broken: dict[str, JobResult] = {}
        for level in shared_work(left):
            broken |= self._make_shared(level)
        able, found = [], {}
        for point in left:
            cause = next((broken[one.key] for one in point.steps if one.key in broken), None)
            if cause is None:
                able.append(point)
                continue
            error = f"what it shares with other points failed: {cause.reason}"
            note_failure(self.records, self.name, point, error, cause.log)
            found[point.key] = JobResult(error=error, seconds=0.0, log=cause.log)
        return found | self._batch(able, recorded=True)

    def _make_shared(self, level: list[SweepPoint]) -> dict[str, JobResult]:
        """Make what points share; return what could not be made, by key.

        What was killed is started again, a few times, and goes on from its checkpoint: no point
        could run without it.
        """
        broken: dict[str, JobResult] = {}
        starts = 0
        while level:
            starts += 1
            ended = self._batch(level, recorded=False)
            killed = [point for point in level if ended[point.key].killed]
            level = killed if starts < SHARED_STARTS else []
            for key, one in ended.items():
                if key in [point.key for point in level]:
                    self.tell(f"{key} is started again")
                elif one.error is not None:
                    broken[key] = one
        return broken

    def _batch(self, points: list[SweepPoint], recorded: bool) -> dict[str, JobResult]:
        """Run points, `n_jobs` at a time."""
        waiting, running = list(points), list[PointProcess]()
        endings: dict[str, JobResult] = {}
        width = self._width(points)
        try:
            while waiting or running:
                while waiting and len(running) < width:
                    devices = self.devices.take(waiting[0].config.distributed.processes)
                    if devices is None:
                        break
                    running.append(self._start(waiting.pop(0), recorded, width, devices))
                for one in list(running):
                    ending = one.ending()
                    if ending is not None:
                        running.remove(one)
                        self.devices.give_back(one.devices)
                        endings[one.point.key] = ending
                        self._ended(one.point, ending, recorded)
                time.sleep(POLL_S)
        except BaseException as error:
            _stop(running)
            if isinstance(error, KeyboardInterrupt):
                count = f"{len(running)} points were stopped"
                raise Detached(f"interrupted: {count}; the same command goes on") from error
            raise
        return endings

    def _width(self, points: list[SweepPoint]) -> int:
        """Return how many of these points run at the same time, and say why if they are fewer."""
        width = max(1, min(self.n_jobs, len(points)))
        if not self.devices.names:
            return width
        fitting = len(self.devices.names) // min(one.config.distributed.processes for one in points)
        if fitting < width:
            count = f"{len(self.devices.names)} GPUs are visible"
            self.tell(f"{count}: at most {fitting} of the {width} points run at the same time")
        return min(width, fitting)

    def _start(
        self, point: SweepPoint, recorded: bool, width: int, devices: list[str]
    ) -> PointProcess:
        processes = point.config.distributed.processes
        threads = point.config.distributed.threads or max(1, cores() // (width * processes))
        section = replace(point.config.distributed, threads=threads)
        sized = replace(point, config=replace(point.config, distributed=section))
        started = PointProcess(sized, self.folder, recorded, threads, devices)
        where = f" on GPU {', '.join(devices)}" if devices else ""
        what = self._words(point, recorded)
        self.tell(f"{point.steps[-1].stage} {point.key} runs{where}: {what}")
        return started

    def _ended(self, point: SweepPoint, ending: JobResult, recorded: bool) -> None:
        what = f"{point.steps[-1].stage} {point.key}"
        if ending.error is None:
            objective = "" if ending.objective is None else f", objective {ending.objective:.4g}"
            self.tell(f"{what} is done after {ending.seconds:.0f} s{objective}")
            return
        self.tell(f"{what} has failed: {ending.reason}\n  {ending.log}")
        if recorded:
            note_failure(self.records, self.name, point, ending.error, ending.log)

    def _words(self, point: SweepPoint, recorded: bool) -> str:
        return self.names[point.key] if recorded else "shared by the points"

    def tell(self, text: str) -> None:
        """Say something to the user."""
        self.console.print(Text(text), soft_wrap=True)


def _stop(running: list[PointProcess]) -> None:
    """Let processes save and leave; at the second Ctrl-C, end them."""
    try:
        for one in running:
            one.interrupt()
        wait_all(running, SAVING_S)
    finally:
        for one in running:
            one.kill()


TAIL = 15


@dataclass(frozen=True)
class PointWork:
    """What the process does, as JSON values.

    Attributes:
        config: The config.
        overrides: The command line, for the record.
        recorded: Whether it is a point with a record and a report of its own.
        result: File for how it ends: `objective`, or `error`.
    """

    config: dict[str, Any]
    overrides: tuple[str, ...]
    recorded: bool
    result: str


class PointProcess:
    """One point being worked on.

    Its output goes to a log; it ends by itself, with its work saved, when this process is gone.

    Args:
        point: The point.
        folder: Where its log is, and its result for a moment.
        recorded: Whether it is a point, or what points share.
        threads: Threads of a process where the config does not say.
        devices: The GPUs that it sees; none: what this process sees.
    """

    def __init__(
        self,
        point: SweepPoint,
        folder: Path,
        recorded: bool,
        threads: int,
        devices: Sequence[str] = (),
    ) -> None:
        self.point, self.devices = point, list(devices)
        self.log = folder / f"{point.key}.log"
        self._result = folder / f".{point.key}.result.json"
        self._result.unlink(missing_ok=True)
        self._began = time.monotonic()
        order = folder / f".{point.key}.work.json"
        work = PointWork(to_dict(point.config), point.overrides, recorded, str(self._result))
        write_json_atomic(order, asdict(work))
        # Libraries that start threads of their own see these; torch is told by the config.
        environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        environment |= cuda_visible_devices(self.devices)
        # The code that runs here, whatever is installed or lies in the current folder.
        given = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
        environment["PYTHONPATH"] = os.pathsep.join([str(PACKAGE.parent), *given])
        with self.log.open("a", encoding="utf-8") as out:
            out.write(f"== {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(point.overrides)}\n")
            out.flush()
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rlhf_exp.launchers.local_job", str(order)],
                # Nothing is ever written to it: its end tells the child that this process is gone.
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                env={**os.environ, **environment},
                # A Ctrl-C of the terminal is this process's, which passes it on.
                start_new_session=True,
            )

    def ending(self) -> JobResult | None:
        """Return how it has ended; `None` while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        assert self._process.stdin is not None
        self._process.stdin.close()
        seconds = time.monotonic() - self._began
        try:
            found = json.loads(self._result.read_text(encoding="utf-8"))
        except FileNotFoundError:
            error = f"{tail(self.log)}\n{_how(code)}".strip()
            return JobResult(None, error, seconds, self.log, killed=code < 0)
        self._result.unlink()
        return JobResult(found.get("objective"), found.get("error"), seconds, self.log)

    def interrupt(self) -> None:
        """Ask it to save and leave, as Ctrl-C does; a second time, to leave at once."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """End it; its work since the last checkpoint is lost."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def wait_all(running: Sequence[PointProcess], seconds: float) -> bool:
    """Wait until all have ended; return whether they have."""
    end = time.monotonic() + seconds
    while any(one.ending() is None for one in running):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def tail(path: Path) -> str:
    """Return the last lines of a log."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-TAIL:])


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code} and no result"
    return f"killed by {signal.Signals(-code).name}"


class Devices:
    """The visible GPUs, of which running points hold some; without any, nothing is shared out.

    Args:
        names: The visible GPUs.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = tuple(names)
        self._free = list(names)

    @classmethod
    def seen(cls) -> Devices:
        """Return those of this process."""
        return cls(visible_devices())

    def problem(self, points: Sequence[SweepPoint]) -> Problem | None:
        """Return what is wrong if a point needs more GPUs than there are."""
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
        """Return GPUs of its own for a point, one a process; `None` while too few are free."""
        if not self.names:
            return []
        if len(self._free) < processes:
            return None
        taken, self._free = self._free[:processes], self._free[processes:]
        return taken

    def give_back(self, names: Sequence[str]) -> None:
        """Take back what a point held that has ended."""
        free = {*self._free, *names}
        self._free = [name for name in self.names if name in free]
