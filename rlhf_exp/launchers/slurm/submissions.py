"""What has been submitted under a name: `<output_dir>/sweeps/<name>/slurm/<time>/submission.json`.

`launch.py`, `status` and `cancel` find a sweep's jobs here. Beside it are the code that the
jobs run, `code/`, and their logs, `jobs/`.

What the tasks of a job leave in submitit's folder: results, errors, logs.
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


@dataclass(frozen=True)
class SubmittedJob:
    """A submitted job.

    Attributes:
        id: Slurm's number, such as `12`, or `12_3`.
        stage: The stage that it brings up to date last.
        key: Its final key.
        overrides: Its command line.
        ranks: Number of its tasks.
        shared: Whether it makes what several points share.
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
        folder: Where everything about them is.
        jobs: The jobs so far.
        cancelled: Slurm's numbers of those that the user cancelled.
    """

    folder: Path
    jobs: list[SubmittedJob] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)

    @property
    def code(self) -> Path:
        """The code that they run."""
        return self.folder / "code"

    @property
    def results(self) -> Path:
        """Scripts, logs and results: the folder of submitit."""
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
    """Make the folder of a submission."""
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
    """Return what has been submitted under a name, the oldest first."""
    return [Submission.read(path) for path in sorted(_root(output_dir, name).glob(f"*/{_FILE}"))]


def submitted_names(output_dir: Path) -> list[str]:
    """Return the names under which something has been submitted."""
    found = (Path(output_dir) / "sweeps").glob(f"*/slurm/*/{_FILE}")
    return sorted({path.parents[2].name for path in found})


def latest_jobs(output_dir: Path, name: str) -> Iterator[tuple[Submission, SubmittedJob]]:
    """Yield the latest job of each final key under a name, with its submission."""
    found: dict[str, tuple[Submission, SubmittedJob]] = {}
    for submission in submissions(output_dir, name):
        found |= {job.key: (submission, job) for job in submission.jobs}
    yield from found.values()


def _root(output_dir: Path, name: str) -> Path:
    return (Path(output_dir) / "sweeps" / name / "slurm").absolute()


TAIL = 15


@dataclass(frozen=True)
class TaskResult:
    """How one task has ended.

    Attributes:
        objective: What it returned.
        error: The traceback of what it raised.
    """

    objective: float | None = None
    error: str | None = None


def log_file(folder: Path, job: str, rank: int = 0) -> Path:
    """Return the file that holds what a task prints."""
    return folder / f"{job}_{rank}_log.out"


def _result_file(folder: Path, job: str, rank: int) -> Path:
    return folder / f"{job}_{rank}_result.pkl"


def forget(folder: Path, job: str, rank: int) -> None:
    """Remove what an earlier start of the job left: it says nothing about this one."""
    path = _result_file(folder, job, rank)
    for old in (path, path.with_name(f"{path.name}.save_tmp")):
        old.unlink(missing_ok=True)


def read_result(folder: Path, job: str, rank: int = 0) -> TaskResult | None:
    """Return how a task has ended, `None` if it left nothing.

    The file is our own job's: it comes from a folder that only this user's jobs write to.
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


def tail(path: Path) -> str:
    """Return the last lines of a log."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-TAIL:])
