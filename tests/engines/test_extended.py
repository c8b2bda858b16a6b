"""A run that is extended in the loop: the engine's part of `ppo.continue_from`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from rlhf_exp.distributed.world import world_of
from tests.engines.lab import Evaluations, Run, build_task, loop_settings, run_loop


def test_the_best_weights_of_before_the_end_are_still_there(tmp_path: Path) -> None:
    """Four steps an iteration; evaluations at 0 and 8, at the end 12, and when extended at 16, 24.

    The end's is the best of the shorter run, but the longer run has none at 12: step 8's is best.
    """
    optim = replace(loop_settings(24).optim, schedule="constant")

    with world_of("float32", threads=1) as world:

        def run(folder: str, steps: int, objectives: Sequence[float]) -> Run:
            task = build_task(world)
            task.evaluator = Evaluations(objectives)
            settings = {"eval_every": 8, "keep_checkpoints": 1, "select_best": True}
            own = replace(optim, steps=steps)
            return run_loop(world, tmp_path / folder, task=task, optim=own, **settings)

        whole = run("whole", 24, [0.0, 5.0, 1.0, 2.0])
        first = run("extended", 12, [0.0, 5.0, 9.0])
        longer = run("extended", 24, [1.0, 2.0])
    assert first.outcome is not None
    assert first.outcome.published_step == 12
    assert longer.outcome is not None
    assert whole.outcome is not None
    assert longer.outcome.published_step == whole.outcome.published_step == 8
    assert longer.outcome.metrics == whole.outcome.metrics
    for name, value in whole.weights.items():
        assert torch.equal(value, longer.weights[name]), name
