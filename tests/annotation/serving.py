"""The server as a process of its own, which can be killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from tests.lab import ROOT


class Served:
    """`rlhf-exp annotate` on a run or a file of pairs; a context manager.

    Attributes:
        links: the annotators' addresses in the order of their names, and the owner's.
    """

    def __init__(self, outputs: Path, run: str, *options: str) -> None:
        self.outputs, self.run, self.options = outputs, run, options
        self.port = 0
        self.links: list[str] = []
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it, on the same port as before."""
        program = [sys.executable, "-m", "rlhf_exp.cli", "--outputs", str(self.outputs)]
        self.process = subprocess.Popen(
            [*program, "annotate", self.run, *self.options, "--port", str(self.port)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        links = []
        for line in self.process.stdout:
            links += re.findall(r"http://\S+", line)
            if line.startswith("Ctrl-C"):
                break
        assert links, "the server did not start"
        assert self.links in ([], links), "a restarted server has other links"
        self.links = links
        self.port = int(re.findall(r":(\d+)/", links[0])[0])

    def kill(self) -> None:
        """SIGKILL it."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Served:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
