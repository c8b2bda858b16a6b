"""One process of a run of several; started by `test_processes.py` with torchrun's variables."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed

from rlhf_exp.config.training import (
    AdvantageEstimator,
    KlConfig,
    KlEstimator,
    KlPlace,
    LossMean,
)
from rlhf_exp.distributed.world import world_of
from rlhf_exp.processes.failures import exit_after, note_group
from tests.training.lab import SECTION, build_task, run_loop

ESTIMATORS = {
    "gae": SECTION,
    # Groups of 3, of 9 responses: the second lies in both of two processes.
    "rloo": replace(
        SECTION, advantage=AdvantageEstimator.rloo, samples_per_prompt=3, rollouts=9, batch=5
    ),
    "grpo": replace(
        SECTION,
        advantage=AdvantageEstimator.grpo,
        samples_per_prompt=3,
        rollouts=9,
        batch=5,
        loss_mean=LossMean.sequences,
        kl=KlConfig(where=KlPlace.loss, estimator=KlEstimator.k3, unbiased=False),
    ),
    "reinforce_pp": replace(SECTION, advantage=AdvantageEstimator.reinforce_pp),
}


def main(folder: Path) -> int:
    """Run the lab with each of `ESTIMATORS`; leave rank 0's weights and logs in `folder`."""
    several = int(os.environ["WORLD_SIZE"]) > 1
    if several:
        note_group()
        distributed.init_process_group("gloo")
    with world_of("float32", threads=1, strategy="ddp" if several else "single") as world:
        found = {}
        for name, section in ESTIMATORS.items():
            run = run_loop(world, folder / name, steps=8, task=build_task(world, section))
            rows = [row for row in run.tracker.rows if "loss/total" in row]
            found[name] = {"weights": run.weights, "rows": rows}
        if world.is_main:
            torch.save(found, folder / "result.pt")
    return 0


if __name__ == "__main__":
    exit_after(lambda: main(Path(sys.argv[1])))
