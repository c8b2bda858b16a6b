"""Config section `eval`: the suite, compared models, sampling, judges, toxicity, reward quality.

It also names the parts of the suites and the roles of the models in an evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from rlhf_exp.config.fields import setting
from rlhf_exp.function_source import names_function


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
    question: str | None = setting(
        None,
        "The criterion of eval.judge.labels whose votes count, of several; null: the first.",
        neutral=None,
    )
    pairs: int | None = setting(None, "Most pairs of eval.judge.labels.", neutral=None)


PROFANITY = "alt-profanity-check"
"""The toxicity scorer that needs neither a model nor a network."""
FILE_SUFFIXES = (".jsonl", ".jsonl.gz")


class ToxicityFormat(Enum):
    """Form in which a model gets the beginning of a sentence.

    `raw`: as it is, to be continued, as in Gehman et al. (2020). `dialogue`: as what a human says,
    in the run's prompt format, to be answered.
    """

    raw = "raw"
    dialogue = "dialogue"


class ScorerKind(Enum):
    """Kinds of toxicity scorers."""

    profanity = "profanity"
    function = "function"
    classifier = "classifier"


@dataclass
class ToxicityConfig:
    """Toxicity of continuations (Gehman et al., 2020)."""

    data: str = setting(
        "allenai/real-toxicity-prompts", "Prompts: a .jsonl or .jsonl.gz file, or a hub id."
    )
    revision: str | None = setting(None, "Commit, tag or branch of the data set on the hub.")
    prompts: int = setting(1000, "Prompts, a sample of the data.")
    seed: int = setting(0, "Seed of the sample.")
    generations: int = setting(5, "Continuations of each prompt (k; the paper has 25).")
    max_new_tokens: int = setting(20, "Longest continuation in tokens (the paper's).")
    temperature: float | None = setting(
        None, "Sampling temperature of continuations; null: eval.temperature.", neutral=None
    )
    top_p: float | None = setting(
        None, "As eval.top_p, of continuations (the paper's: 0.9); null: eval.top_p.", neutral=None
    )
    top_k: int | None = setting(
        None, "As eval.top_k, of continuations; null: eval.top_k.", neutral=None
    )
    format: ToxicityFormat = setting(
        ToxicityFormat.raw, "Continue the text as it is, or answer it as a turn of a dialogue."
    )
    scorer: str = setting(
        PROFANITY,
        "alt-profanity-check, a text classifier (hub id or folder), or a function (file.py:name or "
        "package.module:name).",
    )
    scorer_revision: str | None = setting(None, "Commit, tag or branch of a classifier's hub id.")
    label: str | None = setting(
        None, "The classifier's label (name or number) that means toxic; null: one called so."
    )
    batch: int = setting(64, "Texts that a classifier reads together.", key=False)

    @property
    def scorer_kind(self) -> ScorerKind:
        """The kind of scorer that `scorer` names."""
        if self.scorer == PROFANITY:
            return ScorerKind.profanity
        return ScorerKind.function if names_function(self.scorer) else ScorerKind.classifier


@dataclass
class RewardQualityConfig:
    """Held-out pairs, and the reward of optimised policies against KL."""

    referee: str | None = setting(
        None,
        "A second reward model, not the one PPO maximised: a run, key, folder or hub id.",
        key=False,  # its weights count, not what it is called
    )
    pairs: int = setting(2000, "Most held-out pairs scored.", neutral=2000)
    prompts: int = setting(100, "Held-out prompts for the reward against KL.", neutral=100)
    best_of: int = setting(
        16, "Answers of the baseline to each prompt, for best-of-n; 1: none.", neutral=16
    )


@dataclass
class HarnessConfig:
    """Tasks of EleutherAI's lm-evaluation-harness: what alignment costs elsewhere."""

    tasks: list[str] = setting(
        factory=list,
        doc="Tasks: names that lm-eval knows, .yaml files of your own, or folders of these.",
        neutral=[],
    )
    few_shot: int | None = setting(
        None, "Examples before each document; null: each task's own number.", neutral=None
    )
    limit: int | None = setting(
        None, "Most documents of each task, the first ones; null: all.", neutral=None
    )
    chat_template: bool = setting(False, "Ask in the tokenizer's chat template.", neutral=False)
    batch: int = setting(16, "Rows that a model reads at once.", key=False)


class Suite(Enum):
    """Evaluation suites."""

    none = "none"
    quick = "quick"
    blog = "blog"
    toxicity = "toxicity"
    reward_quality = "reward_quality"
    human = "human"
    harness = "harness"
    full = "full"


ROLES = ("sft", "dpo", "ppo")
"""Models that the stages make, as `eval.models` names them."""
COMPARED = ("sft", "ppo")
"""Models that are compared by default."""
REFEREE = "referee"
"""Role of the second reward model, which no policy was trained on."""
SAMPLES, SAMPLES_FILE = "samples", "samples.jsonl"
"""Role and file of an evaluation's answers, from which it can be computed again."""
PREFERENCE, TOXICITY, REWARD_QUALITY, PEOPLE = "preference", "toxicity", "reward_quality", "people"
BEST_OF, HARNESS = "best_of", "harness"
_PARTS_OF_SUITE: dict[Suite, tuple[str, ...]] = {
    Suite.none: (),
    Suite.quick: (PREFERENCE,),
    Suite.blog: (PREFERENCE, TOXICITY),
    Suite.toxicity: (TOXICITY,),
    Suite.reward_quality: (REWARD_QUALITY,),
    Suite.human: (PREFERENCE, PEOPLE),
    Suite.harness: (HARNESS,),
    Suite.full: (PREFERENCE, TOXICITY, REWARD_QUALITY, PEOPLE),
}


@dataclass
class EvalConfig:
    """Two or more models on held-out prompts."""

    suite: Suite = setting(Suite.quick, "What is evaluated.")
    models: list[str] = setting(
        factory=lambda: list(COMPARED),
        doc="Models to compare, the baseline first: sft, dpo, ppo, a run, key, folder or hub id.",
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
    best_of: list[int] = setting(
        factory=list,
        doc="Numbers n of the baseline's answers to a prompt of which the reward picks the best: "
        "best-of-n as one more policy, such as [1,4,16,64]; empty: none.",
        neutral=[],
    )
    judge: EvalJudgeConfig = setting(factory=EvalJudgeConfig)
    toxicity: ToxicityConfig = setting(factory=ToxicityConfig)
    reward_quality: RewardQualityConfig = setting(factory=RewardQualityConfig)
    harness: HarnessConfig = setting(factory=HarnessConfig)

    @property
    def chooses_best(self) -> bool:
        """Whether best-of-n is evaluated."""
        return bool(self.best_of) and self.suite is not Suite.none


def parts_of(section: EvalConfig) -> tuple[str, ...]:
    """Return the parts of an evaluation in the order they run: the suite's, and those added."""
    parts = _PARTS_OF_SUITE[section.suite]
    if section.chooses_best:
        parts += (BEST_OF,)
    if section.harness.tasks and section.suite not in (Suite.none, Suite.harness):
        parts += (HARNESS,)
    return parts


def needs_reward(section: EvalConfig) -> bool:
    """Return whether answers are scored by the reward that PPO maximised."""
    return bool({PREFERENCE, REWARD_QUALITY, BEST_OF} & set(parts_of(section)))


def uses_referee(section: EvalConfig) -> bool:
    """Return whether a second reward model, if there is one, scores answers."""
    return bool({REWARD_QUALITY, BEST_OF} & set(parts_of(section)))


def scores_toxicity(section: EvalConfig) -> bool:
    """Return whether answers are scored by `eval.toxicity.scorer`."""
    return bool({PREFERENCE, TOXICITY} & set(parts_of(section)))
