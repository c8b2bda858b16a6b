"""`eval.judge`: who says which answer is better."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from rlhf_exp.config.fields import setting


class JudgeName(Enum):
    """Judges; people join them through `rlhf-exp annotate`."""

    reward = "reward"
    model = "model"
    llm = "llm"


@dataclass
class EvalJudgeConfig:
    """Judges of the answers, and of pairs that people have judged."""

    names: list[JudgeName] = setting(
        factory=lambda: [JudgeName.reward],
        doc="Judges: reward (that PPO maximised), model (eval.judge.model), llm (eval.judge.llm).",
        neutral=[JudgeName.reward],
    )
    model: str | None = setting(
        None, "Sequence-classification reward model: hub id or folder.", neutral=None
    )
    revision: str | None = setting(None, "Revision of eval.judge.model on the hub.", neutral=None)
    batch: int = setting(16, "Answers that eval.judge.model reads at once.", key=False)
    llm: str | None = setting(None, "Name of a language model at eval.judge.url.", neutral=None)
    url: str | None = setting(
        None, "OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1.", key=False
    )
    key_env: str | None = setting(
        None, "Environment variable with the endpoint's key; null sends none.", key=False
    )
    criterion: str = setting(
        "helpful, honest and harmless",
        "What the better answer is more of, as the LLM is asked.",
        neutral="helpful, honest and harmless",
    )
    request: list[str] = setting(
        factory=list,
        doc="Further fields of each request, as NAME:JSON, such as seed:1; null takes a field out.",
        neutral=[],
    )
    concurrency: int = setting(8, "Requests under way at once.", key=False)
    timeout_s: float = setting(120.0, "Seconds until a request has failed.", key=False)
    retries: int = setting(8, "Times that a failed request is repeated.", key=False)
    labels: str | None = setting(
        None, "File of pairs that people have judged, to compare the judges with.", neutral=None
    )
    pairs: int | None = setting(None, "Most pairs of eval.judge.labels.", neutral=None)
