"""The DPO stage, trained by TRL in an interpreter of its own: see `engine.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from rlhf_exp.config.experiment import Config
from rlhf_exp.data.batching import response_lengths
from rlhf_exp.engines.process import program_of
from rlhf_exp.models.policy import Policy
from rlhf_exp.stages.context import StageContext, StageResult
from rlhf_exp.stages.dpo_inputs import dpo_pairs, dpo_prompts
from rlhf_exp.stages.engine import engine_run, serve
from rlhf_exp.stages.setup import load_policy_model
from rlhf_exp.stages.training import steps_of
from rlhf_exp.tracking.tracker import Tracker
from rlhf_exp.trl.pair_session import PairSession
from rlhf_exp.trl.plan import WORKER, hand_over_pairs
from rlhf_exp.trl.responses import splitter

_WATCH = ("loss/total", "dpo/accuracy", "eval/kl_sequence")


def run(config: Config, context: StageContext) -> StageResult:
    """Let TRL train, and leave the policy in `context.folder/model`."""
    section = config.dpo
    with engine_run(config, context, program_of(WORKER)) as engine:
        codec = context.materials.codec(context.models["sft"])
        pairs, held_out = dpo_pairs(config, context, codec)
        prompts = dpo_prompts(config, context, codec)
        steps = steps_of(section.steps, section.epochs, len(pairs), section.batch)
        model = load_policy_model(config, context.models["sft"])
        policy = Policy(model, train_blocks=section.train_blocks, value_head=False)
        plan = hand_over_pairs(
            *(engine.handed, policy, codec, pairs, held_out, prompts, section, steps),
            threads=torch.get_num_threads(),
        )
        del model, policy

        def session(
            tracker: Tracker, on_step: Callable[[int, Mapping[str, float]], None]
        ) -> PairSession:
            return PairSession(
                engine.process,
                steps,
                response_lengths(held_out, np.arange(len(held_out))),
                splitter(codec),
                section,
                tracker,
                before_write=context.before_write,
                on_step=on_step,
                given_up=context.given_up,
            )

        result = serve(config, context, engine, plan, steps, session, codec, _WATCH)
    if result.pruned_step is None:
        result.facts.update({"pairs": len(pairs), "cut_prompts": pairs.cut})
    return result
