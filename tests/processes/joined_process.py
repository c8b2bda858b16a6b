"""One of several processes started together; `test_joined.py` starts it with torchrun's variables.

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
from rlhf_exp.processes import leader as leader_module
from rlhf_exp.processes.environment import find_launch_environment
from rlhf_exp.processes.failures import WorkerFailed, exit_after
from tests.processes.targets import wait_for_all


def add(rank: int) -> dict[str, Any]:
    """Add the ranks up."""
    import torch
    from torch import distributed

    total = torch.tensor([float(rank + 1)])
    distributed.all_reduce(total)
    return {"total": total.item()}


def stage(order: dict[str, Any]) -> dict[str, Any]:
    """Do what the order says, in one rank or all."""
    place = find_launch_environment()
    assert place is not None
    if order["do"] == "add":
        return add(place.rank)
    if place.rank == order["rank"]:
        time.sleep(0.3)
        if order["do"] == "bug":
            raise ZeroDivisionError("by the test")
        if order["do"] == "mistake":
            raise UserError("data.jsonl:17: not JSON")
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for_all()
    return {}


def lead(leader: leader_module.Leader, orders: list[dict[str, Any]], objective: float) -> list[Any]:
    """Lead an experiment; a planning error if there are no orders."""
    try:
        if not orders:
            raise UserError("no such plan")
        if orders[-1]["do"] == "die idle":
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        if orders[-1]["do"] == "wait":
            time.sleep(60)
        found = [leader.run(order, stage) for order in orders]
    except BaseException as error:
        leader.end(error)
        raise
    leader.end(None, objective=objective)
    return found


def main(scenario: list[list[dict[str, Any]]], folder: Path) -> int:
    """Do one experiment after another; write what came of it."""
    place = find_launch_environment()
    assert place is not None
    (folder / f"pid{place.rank}").write_text(str(os.getpid()))
    report: list[Any] = []
    try:
        for number, orders in enumerate(scenario):
            if place.rank == 0:
                report += lead(leader_module.leader(place), orders, number + 0.5)
                continue
            member, store = leader_module.member(place)
            if orders and orders[-1].get("quits") == place.rank:
                os.kill(os.getpid(), signal.SIGKILL)
            report.append(member.serve(store, stage)["objective"])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WorkerFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    (folder / f"report{place.rank}").write_text(json.dumps(report))
    return 0


if __name__ == "__main__":
    exit_after(lambda: main(json.loads(sys.argv[1]), Path(sys.argv[2])))
