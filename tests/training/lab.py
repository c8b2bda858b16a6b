"""A PPO run small enough for a test: random 2-layer model, random prompts, a counting reward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_exp.algo.advantages import RewardScaler
from rlhf_exp.algo.kl import AdaptiveKL
from rlhf_exp.config.training import (
    GenerationConfig,
    KlConfig,
    PpoConfig,
    PpoRewardConfig,
    Schedule,
    Select,
)
from rlhf_exp.data.tokenized import RaggedArray, TokenizedPrompts
from rlhf_exp.distributed.world import World
from rlhf_exp.models.architecture import Architecture
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.pretrained import build_causal_lm
from rlhf_exp.models.reference import build_reference
from rlhf_exp.rollout.ahead_engine import AheadEngine
from rlhf_exp.rollout.engine import RolloutEngine, RolloutRequest
from rlhf_exp.rollout.native_engine import NativeEngine
from rlhf_exp.rollout.sampler import SamplingParams
from rlhf_exp.tracking.tracker import NullTracker
from rlhf_exp.training.ppo import ExperienceCollector, PpoTask
from rlhf_exp.training.result import EvaluationResult, TrainingResult
from rlhf_exp.training.task import Task
from rlhf_exp.training.trainer import TrainingContext, train

VOCABULARY, EOS, PAD = 48, 1, 0
LIKED = 7
"""The reward counts this token."""

SECTION = PpoConfig(
    seed=3,
    rollouts=8,
    batch=4,
    micro_batch=None,
    lr=5e-3,
    schedule=Schedule.linear,
    warmup_steps=2,
    betas=[0.9, 0.95],
    weight_decay=0.01,
    grad_norm=1.0,
    epochs=2,
    gamma=1.0,
    lam=0.95,
    clip_range=0.2,
    clip_range_value=0.2,
    vf_coef=1.0,
    entropy_coef=0.0,
    kl=KlConfig(stop=None),
    reward=PpoRewardConfig(clip=10.0, missing_eos_penalty=0.0),
    generation=GenerationConfig(temperature=1.0, batch=8),
    eval_every=4,
    checkpoint_every=4,
    keep_checkpoints=2,
    select=Select.last,
)


class RecordingTracker(NullTracker):
    """Keeps what was logged."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.exit_code: int | None = None

    def log(self, metrics: Mapping[str, float], step: int, *, more: bool = False) -> None:
        self.rows.append({"global_step": float(step), **metrics})

    def finish(self, exit_code: int = 0) -> None:
        self.exit_code = exit_code


def count_liked(tokens: Tensor, prompt_lengths: Tensor, content_lengths: Tensor) -> Tensor:
    """Score a response by how often it says `LIKED`."""
    place = torch.arange(tokens.shape[1])
    inside = (place >= prompt_lengths[:, None]) & (
        place < (prompt_lengths + content_lengths)[:, None]
    )
    return ((tokens == LIKED) & inside).sum(1).float()


def prompts(count: int = 12) -> TokenizedPrompts:
    """Return prompts of 3 to 6 tokens with responses of 2."""
    drawn = np.random.default_rng(0)
    rows = [drawn.integers(2, VOCABULARY, size=3 + number % 4).tolist() for number in range(count)]
    answers = [[LIKED, EOS] for _ in rows]
    return TokenizedPrompts(RaggedArray.of(rows), RaggedArray.of(answers), cut=0, cut_responses=0)


def build_task(
    world: World,
    section: PpoConfig = SECTION,
    train_blocks: int | None = 1,
    originals: Tensor | None = None,
    scorer: Callable[..., Tensor] = count_liked,
    capture: bool = True,
    ahead: bool = False,
) -> PpoTask:
    """Return a task over a fresh random model, always the same."""
    shape = Architecture("gpt_neox", 2, 32, 2, 64, VOCABULARY, 64)
    model = build_causal_lm(shape, seed=5, eos_id=EOS, pad_id=PAD)
    policy = Policy(model, train_blocks=train_blocks, seed=1, value_head=section.uses_values)
    policy.to(world.device)
    params = SamplingParams(6, section.generation.temperature, 8, EOS, PAD)
    request = RolloutRequest(params, section.seed, capture=capture and not ahead)
    engine: RolloutEngine = NativeEngine(policy)
    beforehand = AheadEngine(NativeEngine(policy, torch.float32), request) if ahead else None
    engine = beforehand or engine

    collector = ExperienceCollector(
        policy,
        build_reference(policy),
        partial(engine.answer, request=request),
        scorer,
        prompts(),
        originals,
        RewardScaler("running"),
        AdaptiveKL(0.1, target=1.0, horizon=100),
        section,
        world,
        correction=2.0 if ahead else None,
        ahead=beforehand,
    )
    return PpoTask(
        policy,
        engine,
        collector,
        Evaluations(range(1000)),
        section,
        world,
    )


class Evaluations:
    """Stands in for the validator: its objectives are the given ones, in order."""

    def __init__(self, objectives: Iterable[float]) -> None:
        self.objectives = iter(objectives)
        self.unit: float | None = None
        self.initial: list[float] | None = None

    def __call__(self) -> EvaluationResult:
        objective = float(next(self.objectives))
        self.unit = 2.0 + objective if self.unit is None else self.unit
        self.initial = [objective, 0.1] if self.initial is None else self.initial
        return EvaluationResult({"eval/number": 0.0}, objective)


@dataclass
class Run:
    """What a test looks at after a run."""

    task: Task
    tracker: RecordingTracker
    outcome: TrainingResult | None
    weights: dict[str, Tensor]


def run_loop(
    world: World,
    folder: Path,
    steps: int = 12,
    task: Task | None = None,
    interrupted: Callable[[], bool] = lambda: False,
    given_up: Callable[[int, int], bool] | None = None,
    **changes: Any,
) -> Run:
    """Run the loop in `folder`, from its checkpoint if there is one."""
    task = task or build_task(world)
    tracker = RecordingTracker()
    context = TrainingContext(
        world=world,
        folder=folder,
        tracker=lambda resume: tracker,
        on_step=lambda step, metrics: None,
        before_write=lambda: None,
        interrupted=interrupted,
        given_up=given_up,
    )
    outcome = train(task, replace(SECTION, **changes), steps, context)
    weights = {name: p.detach().clone() for name, p in task.module.named_parameters()}
    return Run(task, tracker, outcome, weights)
