"""What the tasks of a job leave in submitit's folder: results, errors, logs."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

TAIL = 15


@dataclass(frozen=True)
class Result:
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


def read_result(folder: Path, job: str, rank: int = 0) -> Result | None:
    """Return how a task has ended, `None` if it left nothing.

    The file is our own job's: it comes from a folder that only this user's jobs write to.
    """
    try:
        outcome, value = pickle.loads(_result_file(folder, job, rank).read_bytes())
    except FileNotFoundError:
        return None
    return Result(objective=value) if outcome == "success" else Result(error=str(value))


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
