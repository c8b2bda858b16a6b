"""From the config's `ppo` section to the settings of the engine."""

from __future__ import annotations

from rlhf_exp.algo.kl import AdaptiveKL, FixedKL, KLController
from rlhf_exp.config.model import Dtype
from rlhf_exp.config.ppo import PpoConfig, Scale, SelectBy
from rlhf_exp.config.root import Config
from rlhf_exp.engines.native.experience import ExperienceSettings
from rlhf_exp.engines.native.ppo import PpoSettings
from rlhf_exp.engines.native.validation import ValidationSettings


def exact(config: Config) -> bool:
    """Whether decoding and a full forward agree: to 1e-4 in fp32, but to 0.02 nats in bf16."""
    return Dtype.float32 == config.distributed.precision == config.model.dtype


def whole_steps(steps: int, updates: int) -> int:
    """Return `steps`, rounded up to whole iterations of so many optimizer steps."""
    return -(-steps // updates) * updates


def controller(section: PpoConfig) -> KLController:
    """Return what sets the KL coefficient."""
    kl = section.kl
    return FixedKL(kl.coef) if kl.target is None else AdaptiveKL(kl.coef, kl.target, kl.horizon)


def ppo_settings(section: PpoConfig) -> PpoSettings:
    """Return the sizes and coefficients of the updates."""
    return PpoSettings(
        rollouts=section.rollouts,
        batch=section.batch,
        micro_batch=section.micro_batch,
        epochs=section.epochs,
        clip_range=section.clip_range,
        clip_range_value=section.clip_range_value,
        vf_coef=section.vf_coef,
        entropy_coef=section.entropy_coef,
        temperature=section.generation.temperature,
        kl_stop=section.kl.stop,
        seed=section.seed,
    )


def experience_settings(config: Config) -> ExperienceSettings:
    """Return how experience is collected."""
    section = config.ppo
    return ExperienceSettings(
        rollouts=section.rollouts,
        temperature=section.generation.temperature,
        gamma=section.gamma,
        lam=section.lam,
        reward_clip=section.reward.clip,
        missing_eos_penalty=section.reward.missing_eos_penalty,
        batch=section.generation.batch,
        reuse_states=exact(config),
        seed=section.seed,
    )


def validation_settings(section: PpoConfig) -> ValidationSettings:
    """Return how validation prompts are answered, and what the best weights are selected by."""
    return ValidationSettings(
        section.eval_prompts,
        section.generation.temperature,
        section.generation.batch,
        section.kl.coef if section.kl.select_coef is None else section.kl.select_coef,
        scaled=section.reward.scale != Scale.none,
        kl_budget=section.kl.budget,
        by_wins=section.select_by is SelectBy.win_rate,
    )
