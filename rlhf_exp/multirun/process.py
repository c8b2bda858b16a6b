"""A point in a process of its own: started, watched, asked to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_exp.config.load import to_dict
from rlhf_exp.distributed.devices import only
from rlhf_exp.multirun.endings import Ending
from rlhf_exp.multirun.points import Point
from rlhf_exp.pipeline.plan import PACKAGE
from rlhf_exp.store.files import write_json_atomic

TAIL = 15


@dataclass(frozen=True)
class Work:
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
        point: Point,
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
        work = Work(to_dict(point.config), point.overrides, recorded, str(self._result))
        write_json_atomic(order, asdict(work))
        # Libraries that start threads of their own see these; torch is told by the config.
        environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        environment |= only(self.devices)
        # The code that runs here, whatever is installed or lies in the current folder.
        given = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
        environment["PYTHONPATH"] = os.pathsep.join([str(PACKAGE.parent), *given])
        with self.log.open("a", encoding="utf-8") as out:
            out.write(f"== {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(point.overrides)}\n")
            out.flush()
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rlhf_exp.multirun.job", str(order)],
                # Nothing is ever written to it: its end tells the child that this process is gone.
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                env={**os.environ, **environment},
                # A Ctrl-C of the terminal is this process's, which passes it on.
                start_new_session=True,
            )

    def ending(self) -> Ending | None:
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
            return Ending(None, error, seconds, self.log, killed=code < 0)
        self._result.unlink()
        return Ending(found.get("objective"), found.get("error"), seconds, self.log)

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
