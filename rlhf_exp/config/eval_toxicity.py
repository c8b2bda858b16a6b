"""`eval.toxicity`: continuations of RealToxicityPrompts and who scores them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from rlhf_exp.config.fields import setting

PROFANITY = "alt-profanity-check"
"""The scorer that needs neither a model nor a network."""

FILE_SUFFIXES = (".jsonl", ".jsonl.gz")


class ToxicityFormat(Enum):
    """How a model is given the beginning of a sentence.

    `raw`: as it is, to be continued, as in Gehman et al. (2020). `dialogue`: as what a human says,
    in the run's prompt format, to be answered.
    """

    raw = "raw"
    dialogue = "dialogue"


class ScorerKind(Enum):
    """Who scores."""

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
        "alt-profanity-check, a text classifier (hub id or folder), or a function (file.py:name).",
    )
    scorer_revision: str | None = setting(None, "Commit, tag or branch of a classifier's hub id.")
    label: str | None = setting(
        None, "The classifier's label (name or number) that means toxic; null: one called so."
    )
    batch: int = setting(64, "Texts that a classifier reads together.", key=False)

    @property
    def scorer_kind(self) -> ScorerKind:
        """What `scorer` names."""
        if self.scorer == PROFANITY:
            return ScorerKind.profanity
        file, _, _ = self.scorer.rpartition(":")
        return ScorerKind.function if file.endswith(".py") else ScorerKind.classifier
