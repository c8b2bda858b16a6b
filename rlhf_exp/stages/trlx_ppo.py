"""The PPO stage, trained by trlx in an interpreter of its own.

Data, reward, evaluation and publishing are those of `ppo.py`; sampling and training are trlx's. A
run that is interrupted begins again.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from rlhf_exp.config.experiment import Config
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.distributed.world import World
from rlhf_exp.models.policy import Policy
from rlhf_exp.stages.context import StageContext, StageResult
from rlhf_exp.stages.ppo_inputs import (
    original_scores,
    ppo_prompts,
    set_prompt_rows,
)
from rlhf_exp.stages.publish import record_model, save_models
from rlhf_exp.stages.scorers import scorer_for
from rlhf_exp.stages.setup import load_policy_model, world_for
from rlhf_exp.stages.tracking import stage_progress, tracker_for
from rlhf_exp.tracking.tracker import finishing
from rlhf_exp.training.result import TrainingResult
from rlhf_exp.trlx.convert import take_back
from rlhf_exp.trlx.plan import WEIGHTS, hand_over
from rlhf_exp.trlx.session import RunInputs, Session, TrlxProcess

HANDED, LOG = "trlx", "trlx.log"
"""Folder of the plan, while the worker works; file of its output, which stays."""
_WATCH = ("eval/reward_mean", "eval/kl_sequence", "throughput/samples_per_s")


def run(config: Config, context: StageContext) -> StageResult:
    """Let trlx train, and leave the policy in `context.folder/model`."""
    python = config.engine.python
    assert python is not None, "checked with the config"
    handed, log = (context.folder.absolute() / name for name in (HANDED, LOG))
    shutil.rmtree(handed, ignore_errors=True)  # of an attempt that was cut off
    with world_for(config) as world, TrlxProcess(python, log) as process:
        codec = context.materials.codec(context.models["sft"])
        prompts, validation = ppo_prompts(config, context, codec)
        scorer = scorer_for(config, context, codec, world)
        set_prompt_rows(scorer, context, prompts, validation)
        libraries = process.greet()
        originals = None
        if config.ppo.reward.delta:
            originals = original_scores(prompts, scorer, config, context, world)
        steps = config.ppo.iterations * config.ppo.updates
        threads = torch.get_num_threads()
        model = load_policy_model(config, context.models["sft"])
        plan = hand_over(handed, model, codec, prompts, validation, config.ppo, steps, threads)
        del model
        inputs = RunInputs(scorer, prompts, originals, validation, config.ppo, codec)
        outcome, facts = _train(config, context, world, process, steps, inputs, plan)
    shutil.rmtree(handed)
    if outcome.pruned:
        return StageResult({}, pruned_step=outcome.last_step)
    listed = ", ".join(f"{name} {version}" for name, version in libraries.items())
    facts |= {"prompts": len(prompts), "cut_prompts": prompts.cut, "libraries": listed}
    facts |= context.materials.facts()
    return StageResult(outcome.metrics, outcome.objective, outcome.run_id, facts)


def _train(
    config: Config,
    context: StageContext,
    world: World,
    process: TrlxProcess,
    steps: int,
    inputs: RunInputs,
    plan: Path,
) -> tuple[TrainingResult, dict[str, float | int | str]]:
    """Serve the worker to its end; return the outcome and facts for the report."""
    with (
        stage_progress(context, f"{context.stage} (trlx)", steps, world, _WATCH) as progress,
        finishing(tracker_for(config, context, None, world)) as tracker,
    ):
        session = Session(
            process,
            steps,
            inputs,
            tracker,
            before_write=context.before_write,
            on_step=progress.update,
            given_up=context.given_up,
        )
        outcome = session.run(plan)
        if not outcome.pruned:
            weights = context.folder / HANDED / WEIGHTS
            _publish(config, context, world, inputs.codec, outcome, weights)
            record_model(context, world, outcome, tracker)
    return outcome, dict(session.facts)


def _publish(
    config: Config,
    context: StageContext,
    world: World,
    codec: Codec,
    outcome: TrainingResult,
    weights: Path,
) -> None:
    """Leave the stage's model: the model that training started from, with the trained weights."""
    model = load_policy_model(config, context.models["sft"])
    take_back(model, weights)
    # trlx's value head has two layers and no reader here.
    policy = Policy(model, value_head=False)
    save_models(config, context, world, policy, codec.tokenizer, outcome)
