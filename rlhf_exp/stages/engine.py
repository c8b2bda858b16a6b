"""A stage that another trainer does in an interpreter of its own: its process, its result.

Data, reward, evaluation and publishing are this project's; sampling and training are the library's.
A run that is interrupted begins again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from transformers import PreTrainedModel

from rlhf_exp.config.experiment import Config
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.distributed.world import World
from rlhf_exp.engines.handover import WEIGHTS, take_back
from rlhf_exp.engines.process import EngineProcess
from rlhf_exp.models.policy import Policy
from rlhf_exp.stages.context import StageContext, StageResult
from rlhf_exp.stages.publish import record_model, save_models
from rlhf_exp.stages.setup import load_policy_model, world_for
from rlhf_exp.stages.tracking import stage_progress, tracker_for
from rlhf_exp.tracking.tracker import Tracker, finishing
from rlhf_exp.training.result import TrainingResult


class Session(Protocol):
    """A conversation with a worker.

    Attributes:
        facts: What the worker has said of its model.
    """

    facts: dict[str, int]

    def run(self, plan: Path) -> TrainingResult:
        """Let the worker carry out the plan."""
        ...


class EngineRun(NamedTuple):
    """What a stage is run with.

    Attributes:
        world: One process.
        process: The worker; it may still be starting.
        handed: Folder for what it is handed, not made yet.
    """

    world: World
    process: EngineProcess
    handed: Path


@contextmanager
def engine_run(
    config: Config, context: StageContext, program: Sequence[Path]
) -> Iterator[EngineRun]:
    """Start a worker, and end it; what was handed over stays if it fails, to look at.

    Args:
        config: The experiment.
        context: Context of the stage.
        program: What the worker runs.
    """
    python, engine = config.engine.python, config.engine.name.name
    assert python is not None, "checked with the config"
    handed, log = (context.folder.absolute() / name for name in (engine, f"{engine}.log"))
    shutil.rmtree(handed, ignore_errors=True)  # of an attempt that was cut off
    with world_for(config) as world, EngineProcess(engine, python, log, program) as process:
        yield EngineRun(world, process, handed)
    shutil.rmtree(handed)


def serve(
    config: Config,
    context: StageContext,
    run: EngineRun,
    plan: Path,
    steps: int,
    session: Callable[[Tracker, Callable[[int, Mapping[str, float]], None]], Session],
    codec: Codec,
    watch: tuple[str, ...],
    name_of: Callable[[PreTrainedModel, str], str] = lambda model, name: name,
) -> StageResult:
    """Serve the worker to its end, leave the policy in `context.folder/model`, return the result.

    Args:
        config: The experiment.
        context: Context of the stage.
        run: The worker.
        plan: The file that it reads.
        steps: Optimizer steps.
        session: Makes the conversation, of the tracker and what is told each step's metrics.
        codec: Codec of the policy.
        watch: Metrics of the progress bar.
        name_of: Returns a model's parameter's name in the worker's weights.
    """
    libraries, engine = run.process.greet(), config.engine.name.name
    title = f"{context.stage} ({engine})"
    with (
        stage_progress(context, title, steps, run.world, watch) as progress,
        finishing(tracker_for(config, context, None, run.world)) as tracker,
    ):
        conversation = session(tracker, progress.update)
        outcome = conversation.run(plan)
        if not outcome.pruned:
            model = load_policy_model(config, context.models["sft"])
            take_back(model, run.handed / WEIGHTS, partial(name_of, model))
            policy = Policy(model, value_head=False)
            save_models(config, context, run.world, policy, codec.tokenizer, outcome)
            record_model(context, run.world, outcome, tracker)
    if outcome.pruned:
        return StageResult({}, pruned_step=outcome.last_step)
    listed = ", ".join(f"{name} {version}" for name, version in libraries.items())
    facts: dict[str, float | int | str] = {**conversation.facts, "libraries": listed}
    return StageResult(outcome.metrics, outcome.objective, outcome.run_id, facts)
