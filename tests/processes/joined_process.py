"""One of several processes started together; `test_leader.py` starts it with torchrun's variables.

Usage: python -m tests.processes.joined_process SCENARIO FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rlhf_exp.errors import UserError
from rlhf_exp.processes.environment import find_launch_environment
from rlhf_exp.processes.failures import WorkerFailed, exit_after
from rlhf_exp.processes.leader import Leader, joined_leader, joined_worker
from tests.processes.targets import wait_for_all


def add(rank: int) -> dict[str, Any]:
    """Add the ranks up."""
    import torch
    from torch import distributed

    total = torch.tensor([float(rank + 1)])
    distributed.all_reduce(total)
    return {"total": total.item()}


def stage(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job, in one rank or in all."""
    environment = find_launch_environment()
    assert environment is not None
    if job["do"] == "add":
        return add(environment.rank)
    if environment.rank == job["rank"]:
        time.sleep(0.3)
        if job["do"] == "bug":
            raise ZeroDivisionError("by the test")
        if job["do"] == "mistake":
            raise UserError("data.jsonl:17: not JSON")
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for_all()
    return {}


def lead(leader: Leader, jobs: list[dict[str, Any]], objective: float) -> list[Any]:
    """Lead an experiment; a planning error if there are no jobs."""
    try:
        if not jobs:
            raise UserError("no such plan")
        if jobs[-1]["do"] == "die idle":
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        if jobs[-1]["do"] == "wait":
            time.sleep(60)
        results = [leader.run(job, stage) for job in jobs]
    except BaseException as error:
        leader.end(error)
        raise
    leader.end(None, objective=objective)
    return results


def main(scenario: list[list[dict[str, Any]]], folder: Path) -> int:
    """Do one experiment after another; write what came of it."""
    environment = find_launch_environment()
    assert environment is not None
    (folder / f"pid{environment.rank}").write_text(str(os.getpid()))
    report: list[Any] = []
    try:
        for number, jobs in enumerate(scenario):
            if environment.rank == 0:
                report += lead(joined_leader(environment), jobs, number + 0.5)
                continue
            worker, store = joined_worker(environment)
            if jobs and jobs[-1].get("quits") == environment.rank:
                os.kill(os.getpid(), signal.SIGKILL)
            report.append(worker.serve(store, stage)["objective"])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WorkerFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    (folder / f"report{environment.rank}").write_text(json.dumps(report))
    return 0


if __name__ == "__main__":
    exit_after(lambda: main(json.loads(sys.argv[1]), Path(sys.argv[2])))
