"""The PPO stage, trained by trlx in an interpreter of its own: see `engine.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from rlhf_exp.config.experiment import Config
from rlhf_exp.config.training import Scale
from rlhf_exp.engines.process import program_of
from rlhf_exp.engines.session import RunInputs, Session
from rlhf_exp.stages.context import StageContext, StageResult
from rlhf_exp.stages.engine import engine_run, serve
from rlhf_exp.stages.ppo_inputs import original_scores, ppo_prompts, set_prompt_rows
from rlhf_exp.stages.scorers import scorer_for
from rlhf_exp.stages.setup import load_policy_model
from rlhf_exp.tracking.tracker import Tracker
from rlhf_exp.trlx.convert import old_name
from rlhf_exp.trlx.metrics import dialect
from rlhf_exp.trlx.plan import WORKER, hand_over

_WATCH = ("eval/reward_mean", "eval/kl_sequence", "throughput/samples_per_s")


def run(config: Config, context: StageContext) -> StageResult:
    """Let trlx train, and leave the policy in `context.folder/model`."""
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
        plan = hand_over(
            *(engine.handed, model, codec, prompts, validation, section, steps, threads)
        )
        del model
        inputs = RunInputs(scorer, prompts, originals, validation, section, codec)

        def session(
            tracker: Tracker, on_step: Callable[[int, Mapping[str, float]], None]
        ) -> Session:
            return Session(
                engine.process,
                steps,
                inputs,
                dialect(section.reward.scale is Scale.running),
                tracker,
                before_write=context.before_write,
                on_step=on_step,
                given_up=context.given_up,
            )

        # trlx's value head has two layers and no reader here.
        result = serve(
            *(config, context, engine, plan, steps, session, codec, _WATCH), name_of=old_name
        )
    if result.pruned_step is None:
        facts = {"prompts": len(prompts), "cut_prompts": prompts.cut}
        result.facts.update(facts | context.materials.facts())
    return result
