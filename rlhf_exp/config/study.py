"""Config section `study`: a search over PPO's hyperparameters.

Nothing of it is in a key of the store.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from rlhf_exp.config.fields import setting


class Objective(Enum):
    """Objectives of a study, all on validation prompts.

    `reward_at_kl`: the most reward within `kl_budget`. `penalised_reward`: the most reward minus
    `kl_coef` times KL. `final_reward`: the reward at the end. `win_rate_at_kl`: the most wins over
    the initial policy's answers within `kl_budget`.
    """

    reward_at_kl = "reward_at_kl"
    penalised_reward = "penalised_reward"
    final_reward = "final_reward"
    win_rate_at_kl = "win_rate_at_kl"


class Length(Enum):
    """What all trials have in common with the config: sampled responses, or optimizer steps."""

    responses = "responses"
    steps = "steps"


class PrunerName(Enum):
    """Rules that stop trials early."""

    median = "median"
    asha = "asha"
    hyperband = "hyperband"
    none = "none"


@dataclass
class Axis:
    """One hyperparameter that is searched over.

    Attributes:
        key: Its key in the config.
        low: Smallest value.
        high: Largest value.
        log: Whether it is searched on a logarithmic scale.
        step: Distance of the values; None: any value (of a whole number: 1).
        around: Instead of `low` and `high`: the config's own value, divided and multiplied by this;
            on a logarithmic scale unless there is a step.
        choices: The values themselves, instead of `low` and `high`.
    """

    key: str = MISSING
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    around: float | None = None
    choices: list[float] | None = None


@dataclass
class StudyConfig:
    """A search over PPO's hyperparameters, `sweep=ppo_optuna`; see docs/how-to/sweeps.md."""

    trials: int | None = setting(
        None, "Trials of the study, those of earlier commands included; null: no study.", key=False
    )
    workers: int = setting(1, "Workers that run trials at the same time.", key=False)
    worker: int = setting(0, "Number of this worker; `launch.py` sets it.", key=False)
    space: list[Axis] = setting(
        factory=list,
        doc="What is searched, for each key: `{key, low, high, log, step}`, `{key, around, step}` "
        "or `{key, choices}`.",
        key=False,
    )
    objective: Objective = setting(
        Objective.reward_at_kl, "What is maximised, on validation prompts.", key=False
    )
    kl_budget: float = setting(
        10.0, "Sequence KL in nats that `reward_at_kl` and `win_rate_at_kl` allow for.", key=False
    )
    kl_coef: float = setting(
        0.05, "Weight of the KL in `penalised_reward`, the same for all trials.", key=False
    )
    length: Length = setting(
        Length.responses, "What all trials have as many of as the config has.", key=False
    )
    seed: int = setting(0, "Seed of what is tried.", key=False)
    startup: int = setting(8, "Trials drawn at random before TPE goes by their results.", key=False)
    pruner: PrunerName = setting(PrunerName.median, "Rule that stops trials early.", key=False)
    prune_after: int = setting(5, "Complete trials that the median pruner waits for.", key=False)
    warmup: int = setting(2, "Evaluations of a trial before it can be pruned.", key=False)
    max_failures: int = setting(
        5, "Failed trials in a row after which a worker gives up.", key=False
    )
    finalists: int = setting(
        3, "Best trials that are evaluated on test prompts at the end.", key=False
    )
