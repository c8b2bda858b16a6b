"""The stages that a config needs, and the module of each."""

from __future__ import annotations

from rlhf_exp.config.evaluation import ROLES, Suite, needs_reward
from rlhf_exp.config.experiment import STAGES, Config, EngineName, StageName
from rlhf_exp.config.training import RewardInit, RolloutEngineName, ValueInit


def stages_of(config: Config) -> tuple[str, ...]:
    """Return the stages that the config's stage needs, itself included, in order."""
    needed = {
        StageName.sft: {"sft"},
        StageName.reward: {"sft", "reward"},
        StageName.dpo: {"sft", "dpo"},
        StageName.best_of: {"sft", "reward", "best_of"},
        StageName.ppo: {"sft", "reward", "ppo"},
        StageName.eval: _evaluated(config),
        StageName.pipeline: {"sft", "reward", "ppo", *_evaluated(config)},
    }[config.stage]
    if config.eval.suite == Suite.none:
        needed.discard("eval")
    judged = config.ppo.reward.model_scores or config.ppo.value_init == ValueInit.reward
    if not judged and config.stage not in (StageName.reward, StageName.sft, StageName.dpo):
        needed.discard("reward")
    if config.stage == StageName.reward and config.reward.init == RewardInit.base:
        needed.discard("sft")
    return tuple(stage for stage in STAGES if stage in needed)


def module_of(config: Config, stage: str) -> str:
    """Return the module in `rlhf_exp.stages` of a stage: each engine has its own."""
    engine = engine_of(config, stage)
    return stage if engine is EngineName.native else f"{engine.name}_{stage}"


def engine_of(config: Config, stage: str) -> EngineName:
    """Return who does a stage."""
    engine = config.engine.name
    return engine if stage in engine.stages else EngineName.native


def sampler_of(config: Config, stage: str) -> RolloutEngineName:
    """Return who samples in a stage; best-of-n and the evaluation sample as PPO does."""
    section = config.dpo if stage == "dpo" else config.ppo
    return section.generation.engine


def _evaluated(config: Config) -> set[str]:
    """Return the stages of an evaluation: of the compared models and of the reward model."""
    section = config.eval
    if section.samples is not None:
        return {"eval"}
    needed = {"eval", *(role for role in ROLES if role in section.models)}
    if needs_reward(section):
        needed.add("reward")
    if "ppo" in needed and config.ppo.use is None:
        needed |= {"sft", "reward"}
    if "dpo" in needed and config.dpo.use is None:
        needed.add("sft")
    if "reward" in needed and config.reward.use is None and config.reward.init == RewardInit.sft:
        needed.add("sft")
    return needed
