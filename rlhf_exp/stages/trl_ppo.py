"""The PPO stage's RLOO and GRPO, trained by TRL in an interpreter of its own: see `engine.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rlhf_exp.algo.advantages import RewardScaler, clip_scores
from rlhf_exp.config.experiment import Config
from rlhf_exp.config.training import PpoConfig
from rlhf_exp.engines.process import program_of
from rlhf_exp.engines.session import RunInputs, Session
from rlhf_exp.models.policy import Policy
from rlhf_exp.stages.context import StageContext, StageResult
from rlhf_exp.stages.engine import engine_run, serve
from rlhf_exp.stages.ppo_inputs import original_scores, ppo_prompts, set_prompt_rows
from rlhf_exp.stages.scorers import scorer_for
from rlhf_exp.stages.setup import load_policy_model
from rlhf_exp.tracking.tracker import Tracker
from rlhf_exp.trl.metrics import dialect
from rlhf_exp.trl.plan import WORKER, hand_over_rollouts
from rlhf_exp.trl.responses import splitter

_WATCH = ("eval/reward_mean", "eval/kl_sequence", "throughput/samples_per_s")


def run(config: Config, context: StageContext) -> StageResult:
    """Let TRL train, and leave the policy in `context.folder/model`."""
    section = config.ppo
    with engine_run(config, context, program_of(WORKER)) as engine:
        codec = context.materials.codec(context.models["sft"])
        prompts, validation = ppo_prompts(config, context, codec)
        scorer = scorer_for(config, context, codec, engine.world)
        set_prompt_rows(scorer, context, prompts, validation)
        originals = None
        if section.reward.delta:
            originals = original_scores(prompts, scorer, config, context, engine.world)
        steps = section.iterations * section.updates
        threads = torch.get_num_threads()
        model = load_policy_model(config, context.models["sft"])
        policy = Policy(model, train_blocks=section.train_blocks, value_head=False)
        plan = hand_over_rollouts(
            *(engine.handed, policy, codec, prompts, validation, section, steps, threads)
        )
        del model, policy
        inputs = RunInputs(
            *(scorer, prompts, originals, validation, section, codec),
            shape=_shape(section),
            split=splitter(codec),
        )

        def session(
            tracker: Tracker, on_step: Callable[[int, Mapping[str, float]], None]
        ) -> Session:
            return Session(
                engine.process,
                steps,
                inputs,
                dialect(section),
                tracker,
                before_write=context.before_write,
                on_step=on_step,
                given_up=context.given_up,
            )

        result = serve(config, context, engine, plan, steps, session, codec, _WATCH)
    if result.pruned_step is None:
        facts = {"prompts": len(prompts), "cut_prompts": prompts.cut}
        result.facts.update(facts | context.materials.facts())
    return result


def _shape(section: PpoConfig) -> Callable[[Tensor], Tensor]:
    """Return what clips and scales an iteration's scores [n], as the native engine does."""
    scaler, clip = RewardScaler(section.reward.scale.value), section.reward.clip

    def shape(scores: Tensor) -> Tensor:
        return scaler.scale(scores if clip is None else clip_scores(scores, clip))

    return shape
