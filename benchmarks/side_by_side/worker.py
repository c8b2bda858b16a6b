"""The harness's handle on a worker process (see `protocol` for what passes between them)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from side_by_side.protocol import Reading
from side_by_side.setting import Setting

BENCHMARKS = Path(__file__).resolve().parent.parent


class WorkerFailed(RuntimeError):
    """A worker ended or answered nonsense; the message holds the end of what it printed."""


def environment(threads: int) -> dict[str, str]:
    """Return a worker's environment: `threads` for torch, and no network."""
    paths = [str(BENCHMARKS), str(BENCHMARKS.parent)]
    settings = {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }
    return os.environ | settings


def prepare(setting: Setting, threads: int) -> None:
    """Write the models and prompts of `setting`, in a process that ends before any measuring."""
    command = [sys.executable, "-m", "side_by_side.prepare", setting.to_json()]
    done = subprocess.run(command, env=environment(threads), capture_output=True, text=True)
    if done.returncode:
        raise WorkerFailed(f"preparing the models failed:\n{done.stderr[-3000:]}")


def linear_rates(setting: Setting, threads: int) -> dict[str, float]:
    """Return the FLOP/s of this machine's linear layers by number format, at the models' width."""
    program = (
        "import json, torch; from rlhf_exp.hardware import linear_rates; "
        f"torch.set_num_threads({threads}); width = {setting.shape.width}; "
        "print(json.dumps(linear_rates(width, 4 * width, torch.device('cpu'))))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment(threads), capture_output=True, text=True)
    if done.returncode:
        raise WorkerFailed(f"measuring the machine failed:\n{done.stderr[-3000:]}")
    rates: dict[str, float] = json.loads(done.stdout)
    return rates


class Worker:
    """One side of the comparison, alive until the `with` block ends.

    Attributes:
        name: the side's name in the tables.
        started_bytes: resident memory with the libraries loaded and no model.
    """

    def __init__(
        self, name: str, python: Path, command: list[str], setting: Setting, log: Path, threads: int
    ) -> None:
        """Start the worker and wait until its models are loaded.

        Args:
            name: the side's name.
            python: interpreter with the side's libraries.
            command: module and options; the setting follows as the last argument.
            setting: the experiment.
            log: file for what the worker prints.
            threads: of torch.
        """
        self.name, self._log_path = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            [str(python), "-m", *command, setting.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment(threads),
        )
        self.started_bytes = int(self._read()["started_bytes"])

    def iterate(self) -> Reading:
        """Do one iteration and return what was measured."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write('{"do": "iterate"}\n')
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; the read below says why
        return Reading(**self._read())

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        text = self._process.stdout.readline()
        if not text:
            code = self._process.wait()
            self._log.flush()
            tail = self._log_path.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise WorkerFailed(f"the worker of {self.name} ended with {code}:\n{tail}")
        return json.loads(text)

    def __enter__(self) -> Self:
        """Return the running worker."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the worker."""
        if self._process.stdin is not None:
            self._process.stdin.close()  # the worker leaves at the end of its input
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()
