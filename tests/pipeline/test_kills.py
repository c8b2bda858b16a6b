"""A hundred kills, in every way and at random moments: the same weights, and no row lost."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import psutil
import pytest

from rlhf_exp.tracking.local import STEP, read_metrics
from rlhf_exp.tracking.wandb_log import read_wandb_file, wandb_files
from rlhf_exp.tracking.wandb_sync import starts_of, unsent
from tests.lab import LAUNCH, small
from tests.pipeline.chaos import environment, leftovers, workers

STAGE = ("stage=sft", "sft.steps=60", "sft.eval_every=20", "sft.checkpoint_every=3")
PROCESSES = {1: (), 2: ("distributed=ddp", "distributed.processes=2")}
MOST_KILLS_OF_A_RUN = 4
Way = Callable[[psutil.Process], bool]


def sends(number: int, *, to_all: bool = False) -> Way:
    """Send a signal to the run's first process, or to all as a terminal or a cluster does."""

    def kill(leader: psutil.Process) -> bool:
        for process in [leader, *(leader.children(recursive=True) if to_all else [])]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        return True

    return kill


def kill_one_of(others: Callable[[psutil.Process], list[psutil.Process]]) -> Way:
    """Kill one of the run's other processes."""

    def kill(leader: psutil.Process) -> bool:
        found = others(leader)
        if found:
            random.choice(found).kill()
        return bool(found)

    return kill


def services(leader: psutil.Process) -> list[psutil.Process]:
    """Return W&B's own processes."""
    found = []
    for process in leader.children(recursive=True):
        with suppress(psutil.Error):
            if "wandb-core" in " ".join(process.cmdline()):
                found.append(process)
    return found


WAYS: dict[str, Way] = {
    "KILL": sends(signal.SIGKILL),
    "KILL all": sends(signal.SIGKILL, to_all=True),
    "TERM": sends(signal.SIGTERM),
    "TERM all": sends(signal.SIGTERM, to_all=True),
    "INT": sends(signal.SIGINT),
    "HUP": sends(signal.SIGHUP),
    "HUP all": sends(signal.SIGHUP, to_all=True),
    "KILL W&B": kill_one_of(services),
    "KILL worker": kill_one_of(workers),
}


def start(outputs: Path, overrides: Sequence[str]) -> subprocess.Popen[bytes]:
    arguments = small(outputs, "tracking=offline", *STAGE, *overrides)
    with (outputs.parent / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, str(LAUNCH), *arguments],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def result(outputs: Path) -> Path:
    (folder,) = (outputs / "store" / "sft").iterdir()
    return folder


def weights(outputs: Path) -> str:
    return sha256((result(outputs) / "model" / "model.safetensors").read_bytes()).hexdigest()


def killed_until_done(
    outputs: Path, overrides: Sequence[str], ways: Sequence[str], count: Counter[str]
) -> None:
    """Give one command until it succeeds, and kill it at a random moment each of the first times.

    Nothing but W&B's own death may let it succeed all the same.
    """
    began_at = outputs / "store" / ".staging"
    for way in [*ways, None]:
        run = start(outputs, overrides)
        process = psutil.Process(run.pid)
        if way is not None:
            while not any(began_at.glob("sft-*/wandb/*run-*")) and run.poll() is None:
                time.sleep(0.02)
            time.sleep(random.uniform(0, 3))
            with suppress(psutil.NoSuchProcess):
                family = [process, *process.children(recursive=True)]
                count[way] += WAYS[way](process)
            code = run.wait(120)
            _, alive = psutil.wait_procs([p for p in family if p.is_running()], timeout=10)
            assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == [], way
            if code:
                continue
        assert run.wait(300) == 0, (outputs.parent / "log.txt").read_text()
        return


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("processes", "number"), [(1, 70), (2, 30)])
def test_a_run_killed_in_any_way_ends_with_the_same_weights(
    tmp_path: Path, processes: int, number: int
) -> None:
    random.seed(processes)
    overrides = PROCESSES[processes]
    whole = tmp_path / "whole" / "outputs"
    whole.parent.mkdir()
    assert start(whole, overrides).wait(300) == 0
    names = [name for name in WAYS if processes > 1 or name != "KILL worker"]
    count: Counter[str] = Counter()
    turn = 0
    while count.total() < number:
        outputs = tmp_path / f"run-{turn}" / "outputs"
        outputs.parent.mkdir()
        # Every way in turn, so that each has its share.
        ways = [names[(turn * MOST_KILLS_OF_A_RUN + n) % len(names)] for n in range(4)]
        killed_until_done(outputs, overrides, ways, count)
        turn += 1
        assert weights(outputs) == weights(whole), ways
        rows = [row[STEP] for row in read_metrics(result(outputs) / "metrics.jsonl")]
        assert rows == [row[STEP] for row in read_metrics(result(whole) / "metrics.jsonl")]
        held = [
            row[STEP]
            for log in wandb_files(result(outputs))
            for row in read_wandb_file(log).history
        ]
        assert set(held) == set(rows), ways
        # Each of them would be sent once.
        assert [s for p in unsent(starts_of(result(outputs))) for s in p.steps] == rows, ways
        assert leftovers(outputs) == []
        # A worker's death is told with the place where the run was waiting for it.
        told = (outputs.parent / "log.txt").read_text()
        assert "KILL worker" in ways or "Traceback" not in told, ways
    print(json.dumps(count))
