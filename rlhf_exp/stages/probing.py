"""A few iterations of a stage, as it is configured, to see what all of them would take."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import NoReturn

from rlhf_exp.distributed.world import World
from rlhf_exp.engines.native.kept import Keep
from rlhf_exp.engines.native.loop import train
from rlhf_exp.engines.native.loop_types import LoopContext, LoopSettings
from rlhf_exp.engines.native.probe import ITERATIONS, Probed, Recorder
from rlhf_exp.engines.native.task import Task
from rlhf_exp.stages.context import StageContext
from rlhf_exp.tracking.progress import Progress


def probe_loop(
    settings: LoopSettings,
    task: Task,
    world: World,
    context: StageContext,
    recorder: Recorder,
) -> NoReturn:
    """Evaluate, train a few iterations, evaluate, write a checkpoint, make the module whole.

    Raises:
        Probed: Always, with `steps` (optimizer steps of the whole stage), `iterations`,
            `evaluations` and `checkpoints` (how many the whole stage has) and `processes` (what
            `Recorder.to_json` returns in each of them, by rank).
    """
    ends = [n for n in range(1, settings.optim.steps + 1) if task.at_boundary(n)]
    last = ends[: ITERATIONS[context.stage]][-1]
    short = replace(
        settings,
        # The schedule's end comes earlier than in the whole stage; that costs nothing.
        optim=replace(settings.optim, steps=last),
        eval_every=last,
        checkpoint_every=last,
        keep=Keep(),
    )
    with (
        Progress(f"{context.stage} (probe)", last, (), shown=world.is_main) as progress,
        context.polite_interrupts() as interrupted,
    ):
        loop = LoopContext(
            world=world,
            folder=context.folder,
            tracker=lambda resume: recorder,
            on_step=progress.update,
            before_write=context.before_write,
            interrupted=interrupted,
        )
        recorder.begin()
        train(task, short, loop)
    raise Probed(
        {
            "steps": settings.optim.steps,
            "iterations": len(ends),
            "evaluations": 1 + _due(ends, settings.eval_every),
            "checkpoints": _due(ends, settings.checkpoint_every),
            "processes": world.collect(recorder.to_json()),
        }
    )


def _due(ends: list[int], every: int) -> int:
    """Return at how many of these steps something is due that is so `every` steps and at last."""
    passed = sum(step // every > before // every for before, step in pairwise([0, *ends]))
    return passed + (ends[-1] // every == ([0, *ends][-2]) // every)
