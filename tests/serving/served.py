"""`rlhf-exp serve-reward` as a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.lab import ROOT


class ServedReward:
    """Serves the reward model of a run on a free port; a context manager.

    Attributes:
        url: its address.
        name: what it calls the reward.
    """

    def __init__(self, outputs: Path, run: str, *options: str) -> None:
        command = [sys.executable, "-m", "rlhf_exp.cli", "--outputs", str(outputs)]
        self.command = [*command, "serve-reward", run, "--port", "0", *options]
        self.url, self.name = "", ""

    def __enter__(self) -> ServedReward:
        self.process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            found = re.search(r"ppo\.reward\.url=(\S+) ppo\.reward\.name=(\S+)", line)
            if found:
                self.url, self.name = found.groups()
            if line.startswith("Ctrl-C"):
                break
        assert self.url, "the server did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
