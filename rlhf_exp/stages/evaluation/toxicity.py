"""The toxicity part: all models continue the same prompts, and a scorer reads what they say."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_exp.config.evaluation import PROFANITY, TOXICITY, ToxicityFormat, parts_of
from rlhf_exp.config.experiment import Config
from rlhf_exp.data.rows import Turn
from rlhf_exp.evaluation.statistics import LEVEL
from rlhf_exp.evaluation.toxicity.prompts import ToxicityPrompt, load_prompts, sample_prompts
from rlhf_exp.evaluation.toxicity.scorers import ToxicityScorer
from rlhf_exp.evaluation.toxicity.summary import (
    Agreement,
    ToxicitySummary,
    agreement,
    summarise_splits,
)
from rlhf_exp.stages.evaluation.bench import Bench, EvalPrompt, PartResult
from rlhf_exp.stages.evaluation.toxicity_scorer import check_scorer, shared_scores, toxicity_scorer

SUMMARY, SCORES = "toxicity.json", "toxicity_scores.json"
"""What was found, and the score of every continuation: by model, for each prompt a list."""

log = logging.getLogger(__name__)

Floats = NDArray[np.float64]


def check(config: Config) -> None:
    """Raise for a scorer, or for data of this part, that would not be found.

    Raises:
        UserError: Naming what is missing and the remedy.
    """
    section = config.eval.toxicity
    check_scorer(section)
    if config.eval.samples is None and TOXICITY in parts_of(config.eval.suite):
        load_prompts(section.data, section.revision)


def run(bench: Bench) -> PartResult:
    """Have all models continue the prompts, score what they say, and summarise."""
    section = bench.config.eval.toxicity
    scorer = toxicity_scorer(bench.config, bench.world)
    asked = bench.asked(TOXICITY, lambda: _prompts(bench.config))
    own = {name: getattr(section, name) for name in ("temperature", "top_p", "top_k")}
    manner = bench.manner(
        max_new_tokens=section.max_new_tokens,
        count=section.generations,
        stop=section.format is ToxicityFormat.dialogue,
        **{name: value for name, value in own.items() if value is not None},
    )
    scores, sampling = {}, manner.sampling
    for contestant in bench.contestants:
        answers = bench.answers(TOXICITY, contestant, asked, manner)
        sampling = dict(answers[0].sampling)
        flat = shared_scores(scorer, [answer.text for answer in answers], bench.world)
        scores[contestant.name] = flat.reshape(len(asked), section.generations)
    agreements = _agreements(bench, scorer, [one.facts for one in asked])
    return bench.alone(lambda: _conclude(bench.config, scorer, asked, scores, sampling, agreements))


def _prompts(config: Config) -> list[EvalPrompt]:
    section = config.eval.toxicity
    rows = load_prompts(section.data, section.revision)
    drawn = sample_prompts(rows, section.prompts, section.seed)
    if len(drawn) < section.prompts:
        log.warning(
            "eval.toxicity.prompts=%d: %s has only %d different ones",
            section.prompts,
            section.data,
            len(drawn),
        )
    return [_asked(row, section.format) for row in drawn]


def _asked(row: ToxicityPrompt, how: ToxicityFormat) -> EvalPrompt:
    """Return a prompt, with what the data set says of it."""
    text = row.prompt.text
    facts: dict[str, Any] = {"text": text, "toxicity": row.prompt.toxicity}
    if row.continuation is not None:
        facts["continuation"] = row.continuation.text
        facts["continuation_toxicity"] = row.continuation.toxicity
    if how is ToxicityFormat.raw:
        return EvalPrompt(text=text, facts=facts)
    return EvalPrompt(history=(Turn("human", text.strip()),), facts=facts)


def _agreements(
    bench: Bench, scorer: ToxicityScorer, facts: Sequence[Any]
) -> tuple[Agreement, ...]:
    """Compare the scorer with the data set's own scores, where it has any."""
    prompts = [(one["text"], one["toxicity"]) for one in facts if "text" in one]
    after = [
        (one["continuation"], one["continuation_toxicity"])
        for one in facts
        if "continuation" in one
    ]
    kinds = {"prompts": prompts, "continuations": after, "both": prompts + after}
    scores = shared_scores(scorer, [text for text, _ in kinds["both"]], bench.world)
    known = dict(zip([text for text, _ in kinds["both"]], scores, strict=True))
    found = (
        agreement(name, [known[text] for text, _ in texts], [own for _, own in texts])
        for name, texts in kinds.items()
    )
    return tuple(one for one in found if one.count)


def _conclude(
    config: Config,
    scorer: ToxicityScorer,
    asked: Sequence[EvalPrompt],
    scores: dict[str, Floats],
    sampling: dict[str, Any],
    agreements: tuple[Agreement, ...],
) -> PartResult:
    section, stored = config.eval.toxicity, config.eval.samples is not None
    own = [one.facts.get("toxicity") for one in asked]
    summary = ToxicitySummary(
        scorer=scorer.name,
        lexical=section.scorer == PROFANITY,
        data=None if stored else section.data,
        generations=section.generations,
        max_new_tokens=sampling.get("max_new_tokens"),
        temperature=sampling.get("temperature"),
        format=None if stored else section.format.name,
        level=LEVEL,
        seed=config.eval.seed,
        models=tuple(scores),
        splits=summarise_splits(scores, own, config.eval.seed),
        agreement=agreements,
        top_p=sampling.get("top_p", 1.0),
        top_k=sampling.get("top_k", 0),
    )
    each = {model: np.round(values, 6).tolist() for model, values in scores.items()}
    return PartResult(summary.scalars(), {SUMMARY: summary.to_json(), SCORES: each})
