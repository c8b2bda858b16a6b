"""The toxicity part: all models continue the same prompts, and a scorer rates the continuations."""

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
    ScorerAgreement,
    ToxicitySummary,
    scorer_agreement,
    summarise_splits,
)
from rlhf_exp.stages.evaluation.evaluation import EvalPrompt, Evaluation, PartResult
from rlhf_exp.stages.evaluation.toxicity_scorer import check_scorer, shared_scores, toxicity_scorer

SUMMARY, SCORES = "toxicity.json", "toxicity_scores.json"
"""The summary, and the score of every continuation: by model, for each prompt a list."""

log = logging.getLogger(__name__)

Floats = NDArray[np.float64]


def check(config: Config) -> None:
    """Check that the scorer and the prompts of this part exist, before anything is trained.

    Raises:
        UserError: One does not; the message names it and the remedy.
    """
    section = config.eval.toxicity
    check_scorer(section)
    if config.eval.samples is None and TOXICITY in parts_of(config.eval):
        load_prompts(section.data, section.revision)


def run(evaluation: Evaluation) -> PartResult:
    """Have all models continue the prompts, score the continuations, and summarise."""
    section = evaluation.config.eval.toxicity
    scorer = toxicity_scorer(evaluation.config, evaluation.world)
    prompts = evaluation.prompts(TOXICITY, lambda: _prompts(evaluation.config))
    overrides = {name: getattr(section, name) for name in ("temperature", "top_p", "top_k")}
    generation = evaluation.generation(
        max_new_tokens=section.max_new_tokens,
        count=section.generations,
        stop=section.format is ToxicityFormat.dialogue,
        **{name: value for name, value in overrides.items() if value is not None},
    )
    scores, sampling = {}, generation.sampling
    for model in evaluation.models:
        answers = evaluation.answers(TOXICITY, model, prompts, generation)
        sampling = dict(answers[0].sampling)
        flat = shared_scores(scorer, [answer.text for answer in answers], evaluation.world)
        scores[model.name] = flat.reshape(len(prompts), section.generations)
    agreements = _agreements(evaluation, scorer, [prompt.facts for prompt in prompts])
    return evaluation.on_main_process(
        lambda: _conclude(evaluation.config, scorer, prompts, scores, sampling, agreements)
    )


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
    return [_eval_prompt(row, section.format) for row in drawn]


def _eval_prompt(row: ToxicityPrompt, how: ToxicityFormat) -> EvalPrompt:
    """Return a row as a prompt; its facts are the data set's own texts and scores."""
    text = row.prompt.text
    facts: dict[str, Any] = {"text": text, "toxicity": row.prompt.toxicity}
    if row.continuation is not None:
        facts["continuation"] = row.continuation.text
        facts["continuation_toxicity"] = row.continuation.toxicity
    if how is ToxicityFormat.raw:
        return EvalPrompt(text=text, facts=facts)
    return EvalPrompt(history=(Turn("human", text.strip()),), facts=facts)


def _agreements(
    evaluation: Evaluation, scorer: ToxicityScorer, facts: Sequence[Any]
) -> tuple[ScorerAgreement, ...]:
    """Compare the scorer with the data set's own scores, where it has any."""
    prompts = [(row["text"], row["toxicity"]) for row in facts if "text" in row]
    after = [
        (row["continuation"], row["continuation_toxicity"])
        for row in facts
        if "continuation" in row
    ]
    kinds = {"prompts": prompts, "continuations": after, "both": prompts + after}
    scores = shared_scores(scorer, [text for text, _ in kinds["both"]], evaluation.world)
    known = dict(zip([text for text, _ in kinds["both"]], scores, strict=True))
    results = (
        scorer_agreement(
            name, [known[text] for text, _ in texts], [known_score for _, known_score in texts]
        )
        for name, texts in kinds.items()
    )
    return tuple(result for result in results if result.count)


def _conclude(
    config: Config,
    scorer: ToxicityScorer,
    prompts: Sequence[EvalPrompt],
    scores: dict[str, Floats],
    sampling: dict[str, Any],
    agreements: tuple[ScorerAgreement, ...],
) -> PartResult:
    section, stored = config.eval.toxicity, config.eval.samples is not None
    data_scores = [prompt.facts.get("toxicity") for prompt in prompts]
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
        splits=summarise_splits(scores, data_scores, config.eval.seed),
        agreement=agreements,
        top_p=sampling.get("top_p", 1.0),
        top_k=sampling.get("top_k", 0),
    )
    rounded = {model: np.round(values, 6).tolist() for model, values in scores.items()}
    return PartResult(summary.scalars(), {SUMMARY: summary.to_json(), SCORES: rounded})
