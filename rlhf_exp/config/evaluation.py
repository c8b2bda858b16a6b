"""`eval`: the evaluation suite."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from rlhf_exp.config.eval_judge import EvalJudgeConfig
from rlhf_exp.config.eval_reward_quality import RewardQualityConfig
from rlhf_exp.config.eval_toxicity import ToxicityConfig
from rlhf_exp.config.fields import setting


class Suite(Enum):
    """Evaluation suites."""

    none = "none"
    quick = "quick"
    blog = "blog"
    toxicity = "toxicity"
    reward_quality = "reward_quality"
    human = "human"
    full = "full"


ROLES = ("sft", "ppo")
"""Models that the pipeline makes, as `eval.models` names them."""

REFEREE = "referee"
"""Role of the second reward model, which no policy was trained on."""

SAMPLES, SAMPLES_FILE = "samples", "samples.jsonl"
"""Role and file of the answers that an evaluation leaves, and can be computed from again."""

PREFERENCE, TOXICITY, REWARD_QUALITY, PEOPLE = "preference", "toxicity", "reward_quality", "people"
_PARTS = {
    Suite.none: (),
    Suite.quick: (PREFERENCE,),
    Suite.blog: (PREFERENCE, TOXICITY),
    Suite.toxicity: (TOXICITY,),
    Suite.reward_quality: (REWARD_QUALITY,),
    Suite.human: (PREFERENCE, PEOPLE),
    Suite.full: (PREFERENCE, TOXICITY, REWARD_QUALITY, PEOPLE),
}


def parts_of(suite: Suite) -> tuple[str, ...]:
    """Return what a suite consists of, in the order it is done."""
    return _PARTS[suite]


def needs_reward(suite: Suite) -> bool:
    """Whether a suite scores answers by the reward that PPO maximised."""
    return bool({PREFERENCE, REWARD_QUALITY} & set(parts_of(suite)))


def scores_toxicity(suite: Suite) -> bool:
    """Whether a suite says how toxic answers are, by `eval.toxicity.scorer`."""
    return bool({PREFERENCE, TOXICITY} & set(parts_of(suite)))


@dataclass
class EvalConfig:
    """Two or more models on held-out prompts."""

    suite: Suite = setting(Suite.quick, "What is evaluated.")
    models: list[str] = setting(
        factory=lambda: list(ROLES),
        doc="Models to compare, the baseline first: sft, ppo, a run, key, folder or hub id.",
        key=False,  # their weights count, not what they are called
    )
    samples: str | None = setting(
        None,
        "Evaluate the answers that this run (or samples.jsonl) holds; no model is loaded.",
        key=False,
    )
    prompts: int = setting(200, "Held-out prompts (test split).")
    temperature: float = setting(1.0, "Sampling temperature; 0: the most probable token.")
    top_p: float = setting(
        1.0, "Sample from the most probable tokens that add up to this only; 1: all.", neutral=1.0
    )
    top_k: int = setting(0, "Sample from so many most probable tokens only; 0: all.", neutral=0)
    max_new_tokens: int | None = setting(None, "Longest response; null: PPO's.")
    batch: int = setting(64, "Rows decoded together.", key=False)
    tie_low: float = setting(0.4, "Preference probability from which a pair is a tie.")
    tie_high: float = setting(0.6, "Preference probability up to which a pair is a tie.")
    seed: int = setting(0, "Seed of sampling and of the bootstrap.")
    judge: EvalJudgeConfig = setting(factory=EvalJudgeConfig)
    toxicity: ToxicityConfig = setting(factory=ToxicityConfig)
    reward_quality: RewardQualityConfig = setting(factory=RewardQualityConfig)
