"""Killing processes of a run at random moments, and what must be left of them: nothing."""

from __future__ import annotations

import os
import random
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PATIENCE_S = 20.0


def environment() -> dict[str, str]:
    """Return the environment of a started run."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def rows(outputs: Path, stage: str) -> int:
    """Return how many lines of metrics the unfinished work on a stage has."""
    lines = 0
    for path in (outputs / "store" / ".staging").glob(f"{stage}-*/metrics.jsonl"):
        with suppress(FileNotFoundError):  # published under our eyes
            lines += len(path.read_text().splitlines())
    return lines


def drafts(outputs: Path, stage: str) -> bool:
    """Return whether a checkpoint of a stage is being written."""
    staging = outputs / "store" / ".staging"
    return any(staging.glob(f"{stage}-*/checkpoints/.partial-*"))


def leftovers(outputs: Path) -> list[str]:
    """Return what a finished run must not leave: leases, staging folders, drafts."""
    store = outputs / "store"
    found = [*(store / ".leases").glob("*"), *(store / ".staging").glob("*")]
    found += [*store.rglob(".partial-*"), *store.rglob("*.lock")]
    return sorted(path.relative_to(store).as_posix() for path in found)


def survivors(marker: Path) -> list[psutil.Process]:
    """Return the processes that have `marker` on their command line or in their working folder."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(marker) in " ".join(process.cmdline()) or process.cwd() == str(marker):
                found.append(process)
    return found


def workers(parent: psutil.Process) -> list[psutil.Process]:
    """Return the workers that a process has started, but no helper of multiprocessing."""
    return [one for one in parent.children() if "spawn_main" in " ".join(one.cmdline())]


@dataclass
class Monkey:
    """Kills random processes of a command, and runs it again.

    Attributes:
        command: The command.
        folder: Its working folder, of nobody else: that is how its processes are known.
        outputs: Its results.
        seed: Of what is drawn.
        victims: What was killed: `parent`, `worker`, or `writer` (a worker while a checkpoint is
            being written).
        exits: The exit codes of the command.
    """

    command: list[str]
    folder: Path
    outputs: Path
    seed: int
    victims: list[str] = field(default_factory=list)
    exits: list[int] = field(default_factory=list)

    def run(self, kills: int) -> None:
        """Kill so many times, unless the work is done before; then let it end.

        Raises:
            AssertionError: A process outlives its run, or the last run fails.
        """
        drawn = random.Random(self.seed)
        while len(self.victims) < kills and self._once(drawn):
            print(f"kill {len(self.victims)}: {self.victims[-1]}, {self.exits[-1]}", flush=True)
        if not self.exits or self.exits[-1]:
            self.exits.append(self._start().wait(600))
        assert self.exits[-1] == 0, self
        self._nobody_left()

    def _start(self) -> subprocess.Popen[bytes]:
        with (self.folder / "log.txt").open("ab") as log:
            return subprocess.Popen(
                self.command, cwd=self.folder, env=environment(), stdout=log, stderr=log
            )

    def _once(self, drawn: random.Random) -> bool:
        """Run and kill; return whether there was something to kill."""
        run = self._start()
        parent = psutil.Process(run.pid)
        writing = self._wait(run, drawn)
        with suppress(subprocess.TimeoutExpired):
            # A checkpoint of a small model takes a few milliseconds.
            self.exits.append(run.wait(drawn.uniform(0.0, 0.002 if writing else 0.5)))
            return False
        with suppress(psutil.Error):
            started = workers(parent)
            victim = drawn.choice(started if writing and started else [parent, *started])
            writing = writing and drafts(self.outputs, "ppo")
            victim.kill()
            kind = "writer" if writing else "worker"
            self.victims.append("parent" if victim == parent else kind)
        self.exits.append(run.wait(300))
        self._nobody_left()
        return bool(self.exits[-1])

    def _wait(self, run: subprocess.Popen[bytes], drawn: random.Random) -> bool:
        """Wait for the moment to kill; return whether it is that of a checkpoint."""
        before, moment = rows(self.outputs, "ppo"), drawn.random()
        if moment < 0.3:  # while starting, most of the time
            with suppress(subprocess.TimeoutExpired):
                run.wait(drawn.uniform(0.0, 10.0))
            return False
        more, writing = drawn.randint(1, 3), moment < 0.6
        while run.poll() is None:
            ready = not writing or drafts(self.outputs, "ppo")
            if ready and rows(self.outputs, "ppo") >= before + more:
                return writing
            time.sleep(0.0005 if writing else 0.01)
        return False

    def _nobody_left(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while (left := survivors(self.folder)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, (self, [process.cmdline() for process in left])
