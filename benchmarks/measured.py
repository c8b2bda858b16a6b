"""Runs of `launch.py` whose processor time and memory are measured, and tables over seeds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rlhf_exp.report.sweep.data import intervals  # noqa: E402
from rlhf_exp.store.run_records import Records  # noqa: E402
from rlhf_exp.tracking.local import read_metrics  # noqa: E402


@dataclass(frozen=True)
class Usage:
    """What a program needed: seconds of processor time, MiB of its largest process."""

    processor_s: float
    peak_mib: float


def run_measured(program: Sequence[str], log: Path) -> Usage:
    """Run a Python program and its processes in the repository's root; its output goes to `log`.

    Raises:
        SystemExit: It has failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        process = subprocess.Popen([sys.executable, *program], cwd=ROOT, stdout=out, stderr=out)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(program)} failed: see the end of {log}")
    return Usage(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def stage_metrics(outputs: Path, name: str, stage: str) -> list[dict[str, float]]:
    """Return the rows that a stage of the newest run of this name that has it has logged."""
    records = Records(outputs / "sweeps").sweep(name)
    record = [one for one in records if stage in one.keys][-1]
    return read_metrics(outputs / "store" / stage / record.keys[stage] / "metrics.jsonl")


def mean_and_interval(values: Sequence[float], digits: int = 2) -> str:
    """Return a mean with its 95 % interval over seeds (Student's t), as a table has it."""
    mean, low, high = (float(one[0]) for one in intervals(np.array(values)[:, None]))
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
