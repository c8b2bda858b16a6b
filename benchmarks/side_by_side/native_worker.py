"""Our side: the native engine's own loop, measured as its metrics and its tracker report it.

usage: python -m side_by_side.native_worker sample|iterate SETTING_AS_JSON
(run by `benchmarks/ppo.py`)

`sample` answers prompts only, for comparison with `transformers.generate`; `iterate` runs
`rlhf_exp.training.trainer.train`, held between iterations by a tracker.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import GPTNeoXForCausalLM  # noqa: F401 - loaded before memory is first read

from rlhf_exp.algo.advantages import RewardScaler
from rlhf_exp.algo.kl import FixedKL
from rlhf_exp.config.training import (
    GenerationConfig,
    PpoConfig,
    PpoRewardConfig,
    Schedule,
    Select,
)
from rlhf_exp.data.batching import prompts_batch
from rlhf_exp.data.tokenized import RaggedArray, TokenizedPrompts
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.distributed.world import World, world_of
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.pretrained import load_causal_lm
from rlhf_exp.models.reference import build_reference
from rlhf_exp.models.reward_model import RewardModel, share_frozen_trunk
from rlhf_exp.rollout.engine import RolloutRequest
from rlhf_exp.rollout.sampler import SamplingParams
from rlhf_exp.stages.sampling import native_engine
from rlhf_exp.tracking.tracker import NullTracker
from rlhf_exp.training.ppo import ExperienceCollector, PpoTask
from rlhf_exp.training.result import EvaluationResult
from rlhf_exp.training.reward_scorer import ModelScorer, Scorer, SharedTrunkScorer
from rlhf_exp.training.trainer import TrainingContext, train
from side_by_side.protocol import Line, Reading, peak_bytes, resident_bytes
from side_by_side.reward import counted_share
from side_by_side.setting import Setting

FOREVER = 10**9
LAST_TOKEN_OF_SCORED = 0  # put after a response for the reward model; the peer puts nothing


class Held(NullTracker):
    """A tracker that reports each iteration and waits until the next is asked for."""

    def __init__(self, line: Line, setting: Setting, started_bytes: int) -> None:
        """Report over `line`; `started_bytes` was resident before any model was loaded."""
        self._line, self._setting, self._started_bytes = line, setting, started_bytes
        self._begin = 0.0
        self._step = 0

    def log(self, metrics: Mapping[str, float], step: int, *, more: bool = False) -> None:
        """Report an iteration; the first call, before any training, says that all is loaded."""
        if step == 0:
            self._line.ready(self._started_bytes)
        else:
            self._line.answer(self._reading(metrics, step))
        self._step = step
        self._line.wait()
        self._begin = time.perf_counter()

    def _reading(self, metrics: Mapping[str, float], step: int) -> Reading:
        samples = self._setting.rollouts
        return Reading(
            seconds={
                "sample": metrics["time/rollout_s"],
                "score": metrics["time/score_s"] + metrics["time/assess_s"],
                "update": metrics["time/update_s"],
                "total": time.perf_counter() - self._begin,
            },
            peak_bytes=peak_bytes(),
            samples=samples,
            tokens=round(samples * metrics["response/length_mean"]),
            updates=step - self._step,
            reward=metrics["reward/mean"],
        )


def counted_scorer(setting: Setting) -> Scorer:
    """Return the scorer of `reward.counted_share`."""

    def score(tokens: Tensor, prompt_lengths: Tensor, content_lengths: Tensor) -> Tensor:
        whole = tokens[:, : int((prompt_lengths + content_lengths).max())]
        return counted_share(whole, setting.prompt_tokens, setting.shape.vocabulary)[:, -1]

    return score


def model_scorer(setting: Setting, world: World, policy: Policy) -> Scorer:
    """Return the reward model as a scorer, as the PPO stage uses it."""
    codec = cast(Codec, SimpleNamespace(eos_id=LAST_TOKEN_OF_SCORED))
    model = RewardModel.load(setting.path("reward"))
    length = setting.prompt_tokens + setting.response_tokens + 1
    batch = setting.rollouts // setting.minibatches
    branch = share_frozen_trunk(model, policy)
    if branch is None:
        return ModelScorer(model, codec, None, world, batch, length)
    return SharedTrunkScorer(model, branch, codec, world, batch, length)


def load_prompts(setting: Setting) -> TokenizedPrompts:
    """Return the prompts, without original responses."""
    prompts = np.load(setting.path("prompts.npy"))
    none = RaggedArray.of([[]] * len(prompts))
    return TokenizedPrompts(RaggedArray.of(prompts.tolist()), none, cut=0, cut_responses=0)


def request_of(setting: Setting, close: int | None = None) -> RolloutRequest:
    """Return a request for responses that end at no token; `close` as `RolloutRequest` has it."""
    params = SamplingParams(
        max_new_tokens=setting.response_tokens,
        temperature=1.0,
        batch=setting.rollouts,
        eos_id=-1,
        pad_id=LAST_TOKEN_OF_SCORED,
    )
    return RolloutRequest(params, setting.seed, capture=setting.precision == "float32", close=close)


def policy_of(setting: Setting) -> Policy:
    """Return the policy, its value function over its own states, blocks or model."""
    blocks = setting.trained_blocks
    whole = setting.own_values and blocks is None
    return Policy(
        load_causal_lm(setting.path("policy")),
        blocks,
        value_model=load_causal_lm(setting.path("policy")) if whole else None,
        value_branch=setting.own_values and not whole,
    )


def section_of(setting: Setting) -> PpoConfig:
    """Return the setting as the config has it."""
    return PpoConfig(
        seed=setting.seed,
        rollouts=setting.rollouts,
        batch=setting.rollouts // setting.minibatches,
        epochs=setting.epochs,
        lr=setting.lr,
        schedule=Schedule.constant,
        warmup_steps=0,
        betas=[0.9, setting.beta2],
        weight_decay=0.0,
        grad_norm=math.inf,
        gamma=setting.gamma,
        lam=setting.lam,
        clip_range=setting.clip_range,
        clip_range_value=setting.clip_range,
        vf_coef=setting.vf_coef,
        entropy_coef=0.0,
        reward=PpoRewardConfig(clip=None, missing_eos_penalty=0.0),
        generation=GenerationConfig(temperature=1.0, batch=setting.rollouts // setting.minibatches),
        eval_every=FOREVER,
        checkpoint_every=FOREVER,
        keep_checkpoints=1,
        select=Select.last,
    )


def task_of(setting: Setting, world: World) -> PpoTask:
    """Return PPO's task for the setting."""
    policy = policy_of(setting)
    counted = setting.counted_reward
    scorer = counted_scorer(setting) if counted else model_scorer(setting, world, policy)
    close = LAST_TOKEN_OF_SCORED if isinstance(scorer, SharedTrunkScorer) else None
    section = section_of(setting)
    reference = build_reference(policy)
    world.round_frozen(policy)
    engine = native_engine(policy, world)
    collector = ExperienceCollector(
        policy=policy,
        reference=reference,
        sampler=partial(engine.answer, request=request_of(setting, close)),
        scorer=scorer,
        prompts=load_prompts(setting),
        original_scores=None,
        scaler=RewardScaler("none"),
        controller=FixedKL(setting.kl_coef),
        section=section,
        world=world,
        closing_token=close,
    )
    return PpoTask(policy, engine, collector, lambda: EvaluationResult({}, 0.0), section, world)


def iterate(setting: Setting, line: Line, started_bytes: int) -> None:
    """Train until the harness wants no more."""
    held = Held(line, setting, started_bytes)
    with world_of(setting.precision, int(os.environ["OMP_NUM_THREADS"])) as world:
        context = TrainingContext(
            world=world,
            folder=setting.path("native_output"),
            tracker=lambda _: held,
            on_step=lambda *_: None,
            before_write=lambda: None,
            interrupted=lambda: False,
        )
        train(task_of(setting, world), section_of(setting), FOREVER, context)


def sample_only(setting: Setting, line: Line, started_bytes: int) -> None:
    """Answer one iteration's prompts each time the harness asks."""
    policy = Policy(load_causal_lm(setting.path("policy")), None, value_head=False)
    request, prompts = request_of(setting), load_prompts(setting)
    with world_of(setting.precision, int(os.environ["OMP_NUM_THREADS"])) as world:
        world.round_frozen(policy.requires_grad_(False))
        engine = native_engine(policy, world)
    line.ready(started_bytes)
    iteration = 0
    while True:
        line.wait()
        begin = time.perf_counter()
        engine.refresh(iteration)  # as after an update
        numbers = np.arange(iteration * setting.rollouts, (iteration + 1) * setting.rollouts)
        samples = engine.answer(prompts_batch(prompts, numbers % len(prompts), numbers), request)
        took = time.perf_counter() - begin
        tokens = int(samples.response_lengths.sum())
        line.answer(Reading({"sample": took, "total": took}, peak_bytes(), len(samples), tokens))
        iteration += 1


def main() -> None:
    """Do what the command line says."""
    setting = Setting.from_json(sys.argv[2])
    line, started = Line(), resident_bytes()
    torch.manual_seed(setting.seed)
    {"sample": sample_only, "iterate": iterate}[sys.argv[1]](setting, line, started)


if __name__ == "__main__":
    main()
