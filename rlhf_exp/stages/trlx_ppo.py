"""The PPO stage, done by trlx in an interpreter of its own.

Data, reward, evaluation and what is published are those of `ppo.py`; what lies between, sampling
and training, is trlx's. A run that is interrupted begins again.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from rlhf_exp.config.experiment import Config
from rlhf_exp.config.training import Select
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.distributed.world import World
from rlhf_exp.models.policy import Policy
from rlhf_exp.stages.context import StageContext, StageResult
from rlhf_exp.stages.ppo_inputs import (
    original_scores,
    ppo_prompts,
    round_up_to_iterations,
)
from rlhf_exp.stages.scorers import scorer_for
from rlhf_exp.stages.training import (
    load_policy_model,
    record_model,
    save_models,
    tracker_for,
    world_for,
)
from rlhf_exp.tracking.progress_bar import StageProgress
from rlhf_exp.tracking.tracker import finishing
from rlhf_exp.training.trainer import TrainingResult
from rlhf_exp.trlx.convert import take_back
from rlhf_exp.trlx.session import Judged, Session, TrlxProcess
from rlhf_exp.trlx.settings import WEIGHTS, TrlxSettings, hand_over

HANDED, LOG = "trlx", "trlx.log"
"""Folder of what the worker is given, while it works; file of what it prints, which stays."""
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
        libraries = process.greet()
        originals = None
        if config.ppo.reward.delta:
            originals = original_scores(prompts, scorer, config, context, world)
        settings = trlx_settings(config)
        model = load_policy_model(config, context.models["sft"])
        plan = hand_over(handed, model, codec, prompts, validation, settings)
        del model
        select_best = config.ppo.select is Select.best
        judged = Judged(scorer, prompts, originals, validation, config.ppo, select_best, codec)
        outcome, facts = _train(config, context, world, process, settings, judged, plan)
    shutil.rmtree(handed)
    if outcome.pruned:
        return StageResult({}, pruned_step=outcome.last_step)
    listed = ", ".join(f"{name} {version}" for name, version in libraries.items())
    facts |= {"prompts": len(prompts), "cut_prompts": prompts.cut, "libraries": listed}
    return StageResult(outcome.metrics, outcome.objective, outcome.run_id, facts)


def _train(
    config: Config,
    context: StageContext,
    world: World,
    process: TrlxProcess,
    settings: TrlxSettings,
    judged: Judged,
    plan: Path,
) -> tuple[TrainingResult, dict[str, float | int | str]]:
    """Serve the worker to its end; return the outcome and facts for the report."""
    with (
        StageProgress(
            f"{context.stage} (trlx)", settings.steps, _WATCH, shown=world.is_main
        ) as progress,
        finishing(tracker_for(config, context, None, world)) as tracker,
    ):
        session = Session(
            process,
            settings,
            judged,
            tracker,
            before_write=context.before_write,
            on_step=progress.update,
            given_up=context.given_up,
        )
        outcome = session.run(plan)
        if not outcome.pruned:
            weights = context.folder / HANDED / WEIGHTS
            _publish(config, context, world, judged.codec, outcome, weights)
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
    """Leave the stage's model: what training started from, with the weights it ended with."""
    model = load_policy_model(config, context.models["sft"])
    take_back(model, weights)
    # trlx's value head has two layers and no reader here.
    policy = Policy(model, value_head=False)
    save_models(config, context, world, policy, codec.tokenizer, outcome)


def trlx_settings(config: Config) -> TrlxSettings:
    """Return the run's sizes and coefficients."""
    section = config.ppo
    return TrlxSettings(
        steps=round_up_to_iterations(section.steps, section.updates),
        rollouts=section.rollouts,
        batch=section.batch,
        epochs=section.epochs,
        chunk=section.generation.batch,
        seq_length=section.seq_length,
        max_new_tokens=section.generation.max_new_tokens,
        train_blocks=section.train_blocks,
        lr=section.lr,
        schedule=section.schedule.value,
        betas=(section.betas[0], section.betas[1]),
        weight_decay=section.weight_decay,
        grad_norm=section.grad_norm,
        gamma=section.gamma,
        lam=section.lam,
        clip_range=section.clip_range,
        clip_range_value=section.clip_range_value,
        vf_coef=section.vf_coef,
        kl_coef=section.kl.coef,
        kl_target=section.kl.target,
        kl_horizon=section.kl.horizon,
        reward_clip=section.reward.clip,
        scale=section.reward.scale.value,
        missing_eos_penalty=section.reward.missing_eos_penalty,
        eval_prompts=section.eval_prompts,
        eval_every=section.eval_every,
        seed=section.seed,
        threads=torch.get_num_threads(),
    )
