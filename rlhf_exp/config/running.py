"""`engine`, `distributed`, `tracking`: who computes, on what, and where runs are recorded."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from rlhf_exp.config.fields import setting
from rlhf_exp.config.model import Dtype


class EngineName(Enum):
    """Who trains."""

    native = "native"
    trlx = "trlx"


class Strategy(Enum):
    """How parameters, gradients and optimizer state are spread over processes."""

    single = "single"
    ddp = "ddp"
    zero1 = "zero1"
    zero2 = "zero2"
    zero3 = "zero3"
    fsdp = "fsdp"


class TrackingMode(Enum):
    """Where Weights & Biases records."""

    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass
class EngineConfig:
    """Who does PPO; the other stages are native."""

    name: EngineName = setting(
        EngineName.native, "Who does PPO: `native` (ours) or `trlx` (the library)."
    )
    python: str | None = setting(
        None, "Interpreter that has trlx; docs/trlx.md says how to make one.", key=False
    )


@dataclass
class DistributedConfig:
    """Strategy and processes."""

    strategy: Strategy = setting(Strategy.single, "Data-parallel or sharding strategy.", key=False)
    processes: int = setting(1, "Processes over all nodes, one per device.", key=False)
    threads: int | None = setting(
        None, "CPU threads of a process; null: cores / processes.", key=False
    )
    precision: Dtype = setting(Dtype.float32, "Precision of forward and backward passes.")
    offload: bool = setting(
        False,
        "Keep the optimizer's state in host memory; zero3 and fsdp: the parameters too.",
        key=False,
    )


@dataclass
class AlertsConfig:
    """When PPO raises an alert, at W&B and in `alerts.jsonl`; training goes on."""

    kl_factor: float | None = setting(
        3.0, "`kl/sequence` above so many times `ppo.kl.target`; null: never.", key=False
    )
    reward_drop: float | None = setting(
        1.0,
        "`reward/mean` over five iterations so many standard deviations of the scores below its "
        "best; null: never.",
        key=False,
    )
    entropy_fraction: float | None = setting(
        0.2,
        "`policy/entropy` below this fraction of the first iteration's; null: never.",
        key=False,
    )


@dataclass
class TrackingConfig:
    """Weights & Biases; the local metrics.jsonl is always written."""

    mode: TrackingMode = setting(TrackingMode.offline, "Where W&B records.", key=False)
    project: str = setting("rlhf-exp", "W&B project.", key=False)
    entity: str | None = setting(None, "W&B user or team; null: your default.", key=False)
    tags: list[str] = setting(factory=list, doc="W&B tags.", key=False)
    alerts: AlertsConfig = setting(factory=AlertsConfig, key=False)
