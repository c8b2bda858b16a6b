"""How the harness and a worker talk: one line of JSON each way.

A worker is started once and does one iteration for each line it reads, so that two of them can be
measured in alternation without either paying for its start again. What it is asked is
`{"do": "iterate"}`; what it answers is a `Reading`. Libraries print as they like: the worker's
standard output is kept for answers by moving the printing to standard error.

Standard library only: this runs in the peer's environment too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Reading:
    """What a worker measured in one iteration.

    Attributes:
        seconds: by phase: `sample`, `score` (rewards, reference, values, advantages), `update`;
            `total`, which holds what lies between the phases too; and `cpu`, the processor time of
            all threads, which other programs on the machine disturb less.
        peak_bytes: the highest resident memory during the iteration, libraries included.
        samples: responses made.
        tokens: response tokens made.
        updates: optimizer steps taken.
        reward: mean score of the iteration's responses; `None` where nothing is scored.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    samples: int = 0
    tokens: int = 0
    updates: int = 0
    reward: float | None = None


class Line:
    """The worker's end of the line."""

    def __init__(self) -> None:
        """Keep standard output for answers, and send all other printing to standard error."""
        sys.stdout.flush()
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def ready(self, started_bytes: int) -> None:
        """Say that models are loaded; `started_bytes` was resident before any of them was."""
        self._send({"ready": True, "started_bytes": started_bytes})

    def wait(self) -> None:
        """Return when an iteration is asked for; leave the process when no more is wanted."""
        text = sys.stdin.readline()
        if not text or json.loads(text)["do"] != "iterate":
            os._exit(0)  # nothing to save, and a library's exit handlers may take seconds
        reset_peak()
        self._cpu = time.process_time()

    def answer(self, reading: Reading) -> None:
        """Send what the iteration measured, with its processor time."""
        cpu = time.process_time() - self._cpu
        self._send(asdict(replace(reading, seconds=reading.seconds | {"cpu": cpu})))

    def _send(self, content: dict[str, Any]) -> None:
        self._answers.write(json.dumps(content) + "\n")
        self._answers.flush()


def reset_peak() -> None:
    """Start the measurement of peak memory afresh (Linux; elsewhere the peak is the process's)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes() -> int:
    """Return the highest resident memory since `reset_peak`, in bytes."""
    return _status("VmHWM")


def resident_bytes() -> int:
    """Return the resident memory now, in bytes."""
    return _status("VmRSS")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}: memory can be measured on Linux only")
