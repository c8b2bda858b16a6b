"""What a late stage needs from outside is looked at before an early one begins."""

from __future__ import annotations

from collections.abc import Iterable

from rlhf_exp.config.eval_toxicity import ScorerKind
from rlhf_exp.config.evaluation import TOXICITY, parts_of, scores_toxicity
from rlhf_exp.config.root import Config
from rlhf_exp.pipeline.plan import Step


def look_ahead(config: Config, steps: Iterable[Step]) -> None:
    """Raise for data or a scorer that the evaluation would not find after hours of training.

    Raises:
        UserError: Naming what is missing and the remedy.
    """
    if not any(step.stage == "eval" and step.needs_work for step in steps):
        return
    usual = config.eval.toxicity.scorer_kind is ScorerKind.profanity
    if TOXICITY in parts_of(config.eval.suite) or (
        scores_toxicity(config.eval.suite) and not usual
    ):
        from rlhf_exp.stages.parts import toxicity

        toxicity.check(config)
