"""`eval`: the evaluation suite."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from rlhf_exp.config.fields import setting


class Suite(Enum):
    """Evaluation suites."""

    none = "none"
    quick = "quick"
    blog = "blog"
    toxicity = "toxicity"
    human = "human"
    full = "full"


@dataclass
class EvalConfig:
    """SFT against PPO on held-out prompts."""

    suite: Suite = setting(Suite.quick, "What is evaluated.")
    prompts: int = setting(200, "Held-out prompts (test split).")
    temperature: float = setting(1.0, "Sampling temperature; 0: the most probable token.")
    max_new_tokens: int | None = setting(None, "Longest response; null: PPO's.")
    batch: int = setting(64, "Rows decoded together.", key=False)
    tie_low: float = setting(0.4, "Preference probability from which a pair is a tie.")
    tie_high: float = setting(0.6, "Preference probability up to which a pair is a tie.")
    seed: int = setting(0, "Seed of sampling and of the bootstrap.")
