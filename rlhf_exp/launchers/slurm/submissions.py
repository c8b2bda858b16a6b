"""The jobs submitted under a name, and the results that their tasks leave.

A submission is a folder `<output_dir>/sweeps/<name>/slurm/<time>/`. `submission.json` lists its
jobs, for `launch.py`, `status` and `cancel`; beside it are the code that the jobs run, `code/`, and
their logs and results, `jobs/`, which is submitit's folder.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from rlhf_exp.errors import UserError
from rlhf_exp.store.atomic_files import write_json_atomic

_FILE = "submission.json"
_TAIL_LINES = 15


@dataclass(frozen=True)
class SubmittedJob:
    """A submitted job.

    Attributes:
        id: Slurm's number, such as `12`, or `12_3`.
        stage: The last stage that it runs.
        key: The key of that stage.
        overrides: Its command line.
        ranks: Number of its tasks.
        shared: Whether it runs stages that several points share.
    """

    id: str
    stage: str
    key: str
    overrides: tuple[str, ...]
    ranks: int
    shared: bool


@dataclass
class Submission:
    """Jobs that were submitted together.

    Attributes:
        folder: The folder of the list of jobs, their code and their logs.
        jobs: The jobs so far.
        cancelled: Slurm's numbers of the jobs that the user cancelled.
    """

    folder: Path
    jobs: list[SubmittedJob] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)

    @property
    def code(self) -> Path:
        """The copy of the code that the jobs run."""
        return self.folder / "code"

    @property
    def results(self) -> Path:
        """Submitit's folder: scripts, logs and results."""
        return self.folder / "jobs"

    def log(self, job: SubmittedJob, rank: int = 0) -> Path:
        """Return the log of one of its jobs."""
        return log_file(self.results, job.id, rank)

    def write(self) -> None:
        """Write the list of jobs."""
        content = {"jobs": [asdict(job) for job in self.jobs], "cancelled": self.cancelled}
        write_json_atomic(self.folder / _FILE, content)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a submission.

        Raises:
            UserError: The file is damaged.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            jobs = [
                SubmittedJob(**{**job, "overrides": tuple(job["overrides"])})
                for job in content["jobs"]
            ]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}: not a readable list of jobs ({error}); `squeue` shows them"
            ) from error
        return cls(path.parent, jobs, list(content["cancelled"]))


def new_submission(output_dir: Path, name: str) -> Submission:
    """Create the folder of a submission."""
    root = _root(output_dir, name)
    root.mkdir(parents=True, exist_ok=True)
    stamp, number = datetime.now(UTC).strftime("%Y-%m-%d-%H%M%S"), 0
    while True:
        folder = root / (f"{stamp}-{number}" if number else stamp)
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
            continue
        return Submission(folder)


def submissions(output_dir: Path, name: str) -> list[Submission]:
    """Return the submissions under a name, the oldest first."""
    return [Submission.read(path) for path in sorted(_root(output_dir, name).glob(f"*/{_FILE}"))]


def submitted_names(output_dir: Path) -> list[str]:
    """Return the names under which jobs have been submitted."""
    paths = (Path(output_dir) / "sweeps").glob(f"*/slurm/*/{_FILE}")
    return sorted({path.parents[2].name for path in paths})


def latest_jobs(output_dir: Path, name: str) -> Iterator[tuple[Submission, SubmittedJob]]:
    """Yield the latest job of each key under a name, with its submission."""
    latest: dict[str, tuple[Submission, SubmittedJob]] = {}
    for submission in submissions(output_dir, name):
        latest |= {job.key: (submission, job) for job in submission.jobs}
    yield from latest.values()


def _root(output_dir: Path, name: str) -> Path:
    return (Path(output_dir) / "sweeps" / name / "slurm").absolute()


@dataclass(frozen=True)
class TaskResult:
    """The result that a task left in submitit's folder.

    Attributes:
        objective: Its return value.
        error: The traceback of its exception.
    """

    objective: float | None = None
    error: str | None = None


def read_result(folder: Path, job: str, rank: int = 0) -> TaskResult | None:
    """Return a task's result, `None` if it left none.

    Unpickling is safe: only this user's jobs write to the folder.
    """
    try:
        outcome, value = pickle.loads(_result_file(folder, job, rank).read_bytes())
    except FileNotFoundError:
        return None
    return TaskResult(objective=value) if outcome == "success" else TaskResult(error=str(value))


def first_error(folder: Path, job: str, ranks: int) -> tuple[int, str] | None:
    """Return rank and traceback of the first task of a job that left an error."""
    for rank in range(ranks):
        result = read_result(folder, job, rank)
        if result is not None and result.error is not None:
            return rank, result.error
    return None


def remove_result(folder: Path, job: str, rank: int) -> None:
    """Remove the result of an earlier start of the job, which is not this start's."""
    path = _result_file(folder, job, rank)
    for old in (path, path.with_name(f"{path.name}.save_tmp")):
        old.unlink(missing_ok=True)


def _result_file(folder: Path, job: str, rank: int) -> Path:
    return folder / f"{job}_{rank}_result.pkl"


def log_file(folder: Path, job: str, rank: int = 0) -> Path:
    """Return the file of a task's output."""
    return folder / f"{job}_{rank}_log.out"


def log_tail(path: Path) -> str:
    """Return the last lines of a log; empty without one."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-_TAIL_LINES:])
