"""Stages of the workers of `test_leader.py`; the workers import it, so nothing heavy above."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from rlhf_exp.errors import UserError
from rlhf_exp.processes.worker import Worker


def serve(setup: str, worker: Worker, store: Any) -> None:
    """Serve stages, each named by what happens in it."""

    def work(job: dict[str, Any]) -> dict[str, Any]:
        rank = worker.environment.rank
        for name, value in job.get("pids", {}).items():
            (Path(value) / name.format(rank=rank)).write_text(str(os.getpid()))
        return STAGES[job["do"]](worker, setup)

    worker.serve(store, work)


def add(worker: Worker, setup: str) -> dict[str, Any]:
    """Add the ranks up, and tell what this process sees."""
    import torch
    from torch import distributed

    total = torch.tensor([float(worker.environment.rank + 1)])
    distributed.all_reduce(total)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "OMP_NUM_THREADS")
    return {
        "total": total.item(),
        "setup": setup,
        "pid": os.getpid(),
        "threads": torch.get_num_threads(),
        "port": int(os.environ["MASTER_PORT"]) > 0,
        **{name: os.environ[name] for name in names},
    }


def wait_for_all() -> None:
    """Wait in a collective."""
    from torch import distributed

    distributed.barrier()


def bug(worker: Worker, setup: str) -> dict[str, Any]:
    """Fail in rank 1, while the others wait for it."""
    if worker.environment.rank == 1:
        time.sleep(0.3)
        raise ZeroDivisionError("by the test")
    wait_for_all()
    return {}


def mistake(worker: Worker, setup: str) -> dict[str, Any]:
    """Find in rank 1 what is the user's to mend."""
    if worker.environment.rank == 1:
        time.sleep(0.3)
        raise UserError("data.jsonl:17: not JSON")
    wait_for_all()
    return {}


def killed(worker: Worker, setup: str) -> dict[str, Any]:
    """Die in rank 1, while the others wait for it."""
    if worker.environment.rank == 1:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for_all()
    return {}


def train(worker: Worker, setup: str) -> dict[str, Any]:
    """Train until asked to stop."""
    with worker.saving() as interrupted:
        Path(setup).touch()
        while not interrupted():
            time.sleep(0.02)
    return {}


def hang(worker: Worker, setup: str) -> dict[str, Any]:
    """Never end."""
    Path(setup).touch()
    time.sleep(1000)
    return {}


STAGES = {
    "add": add,
    "bug": bug,
    "mistake": mistake,
    "killed": killed,
    "train": train,
    "hang": hang,
}
