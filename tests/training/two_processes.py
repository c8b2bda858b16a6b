"""One process of a run of several; started by `test_processes.py` with torchrun's variables."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import distributed

from rlhf_exp.distributed.world import world_of
from rlhf_exp.processes.failures import exit_after, note_group
from tests.training.lab import run_loop


def main(folder: Path) -> int:
    """Run the lab and leave rank 0's weights and log in `folder`."""
    several = int(os.environ["WORLD_SIZE"]) > 1
    if several:
        note_group()
        distributed.init_process_group("gloo")
    with world_of("float32", threads=1, strategy="ddp" if several else "single") as world:
        run = run_loop(world, folder / "run", steps=8)
        if world.is_main:
            rows = [row for row in run.tracker.rows if "loss/total" in row]
            torch.save({"weights": run.weights, "rows": rows}, folder / "result.pt")
    return 0


if __name__ == "__main__":
    exit_after(lambda: main(Path(sys.argv[1])))
