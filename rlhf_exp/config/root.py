"""The root of the config: every section at once, whatever the stage."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from rlhf_exp.config.data import DataConfig
from rlhf_exp.config.evaluation import EvalConfig
from rlhf_exp.config.fields import setting
from rlhf_exp.config.model import ModelConfig
from rlhf_exp.config.ppo import PpoConfig
from rlhf_exp.config.reward import RewardConfig
from rlhf_exp.config.running import DistributedConfig, EngineConfig, TrackingConfig
from rlhf_exp.config.sft import SftConfig
from rlhf_exp.config.study import StudyConfig


class Stage(Enum):
    """What to bring up to date."""

    sft = "sft"
    reward = "reward"
    ppo = "ppo"
    eval = "eval"
    pipeline = "pipeline"


class Cache(Enum):
    """What happens to a result in the store whose code has changed since."""

    strict = "strict"
    trust = "trust"


@dataclass
class Config:
    """One experiment."""

    stage: Stage = setting(Stage.pipeline, "What to bring up to date.", key=False)
    name: str | None = setting(None, "Name of the run or multirun in reports.", key=False)
    seed: int = setting(0, "Seed of every stage that sets none of its own.", key=False)
    plan: bool = setting(False, "Print what would run, and stop.", key=False)
    probe: bool = setting(False, "Run two full-size iterations and report.", key=False)
    cache: Cache = setting(
        Cache.strict, "`trust`: reuse results although the code has changed.", key=False
    )
    rerun: list[str] = setting(
        factory=list, doc="Stages to run again although the store has their results.", key=False
    )
    output_dir: str = setting("outputs", "Folder of the store, reports and run records.", key=False)
    model: ModelConfig = setting(factory=ModelConfig)
    data: DataConfig = setting(factory=DataConfig)
    sft: SftConfig = setting(factory=SftConfig)
    reward: RewardConfig = setting(factory=RewardConfig)
    ppo: PpoConfig = setting(factory=PpoConfig)
    engine: EngineConfig = setting(factory=EngineConfig)
    distributed: DistributedConfig = setting(factory=DistributedConfig)
    eval: EvalConfig = setting(factory=EvalConfig)
    tracking: TrackingConfig = setting(factory=TrackingConfig)
    study: StudyConfig = setting(factory=StudyConfig)
