"""The best-of-n part: the baseline answers each prompt n times, and the reward picks the best.

The answers are sampled once, the largest n to each prompt, and kept (`kept_samples`). From them
come the expectations for every n, beside the other models at their KL (`evaluation/frontier.py`),
and one policy whose answers can be read and judged like any other model's: the best of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
from numpy.typing import NDArray

from rlhf_exp.config.evaluation import BEST_OF, PREFERENCE, REFEREE, parts_of, scores_toxicity
from rlhf_exp.evaluation.answers import Answer, sampling_words
from rlhf_exp.evaluation.comparison import ACCURACY
from rlhf_exp.evaluation.frontier import (
    REWARD,
    BestOfCurve,
    Measure,
    model_to_json,
    point_to_json,
    scalars,
)
from rlhf_exp.evaluation.overoptimisation import best_of_n_kl
from rlhf_exp.stages.evaluation.evaluation import (
    EvaluatedModel,
    Evaluation,
    PartResult,
    test_prompts,
)
from rlhf_exp.stages.evaluation.gold_judge import gold_judge
from rlhf_exp.stages.evaluation.toxicity_scorer import shared_scores, toxicity_scorer

FILE = "best_of.json"

Floats = NDArray[np.float64]
# Answers to one prompt have noise of their own, which those of the preference part must not share.
_SEED_OFFSET = 1_000_000
_MEASURES = (
    Measure(REWARD, "Reward, raw", "higher"),
    Measure(REFEREE, "Referee's reward, raw", "higher"),
    Measure("gold", "Gold judge, 0 to 1", "higher"),
    Measure(ACCURACY, "Accuracy, share right", "higher"),
    Measure("toxicity", "Toxicity, 0 to 1", "lower"),
    Measure("length", "Length, tokens", "neither"),
)


def sampled_answers(evaluation: Evaluation) -> list[Answer]:
    """Return the baseline's answers with their reward, all those to the first prompt first.

    Sampled at the first call; all processes take part.
    """
    done = [answer for answer in evaluation.collected if _is_sample(evaluation, answer)]
    if done:
        return done
    section = evaluation.config.eval
    generation = evaluation.generation(
        seed=section.seed + _SEED_OFFSET,
        count=max(section.best_of),
        score=True,
        referee=True,
        keep=True,
    )
    prompts = test_prompts(evaluation, BEST_OF)
    return evaluation.answers(BEST_OF, evaluation.baseline, prompts, generation)


def _is_sample(evaluation: Evaluation, answer: Answer) -> bool:
    return (answer.part, answer.model) == (BEST_OF, evaluation.baseline.name)


def best_answers(evaluation: Evaluation) -> list[Answer]:
    """Return the best answer to each prompt, as those of a model named `best-of-N`.

    Of equal rewards the later answer, as `overoptimisation.best_of_n` has it.
    """
    answers, n = sampled_answers(evaluation), max(evaluation.config.eval.best_of)
    sampling = answers[0].sampling  # of stored answers not what the config says
    whole = (sampling.get("top_p", 1.0), sampling.get("top_k", 0)) == (1.0, 0)
    best = [
        max(answers[start : start + n], key=lambda answer: (answer.score, answer.sample))
        for start in range(0, len(answers), n)
    ]
    # A cut distribution has no KL that could stand beside those of other models.
    kl = best_of_n_kl(n) if whole else None
    return [replace(answer, model=f"best-of-{n}", kl=kl) for answer in best]


def run(evaluation: Evaluation) -> PartResult:
    """Compute the curve of best-of-n, and where the other models stand to it."""
    answers = sampled_answers(evaluation)
    others = {model.name: _answers(evaluation, model) for model in evaluation.models[1:]}
    with_kl = {
        name: own for name, own in others.items() if all(answer.kl is not None for answer in own)
    }
    measured = [_measured(evaluation, own) for own in (answers, *with_kl.values())]
    return evaluation.on_main_process(
        lambda: _conclude(evaluation, answers, measured[0], with_kl, measured[1:])
    )


def _answers(evaluation: Evaluation, model: EvaluatedModel) -> list[Answer]:
    """Return a model's answer to each prompt: that of the preference part where there is one."""
    if PREFERENCE in parts_of(evaluation.config.eval):
        return [
            answer
            for answer in evaluation.collected
            if (answer.part, answer.model) == (PREFERENCE, model.name)
        ]
    generation = evaluation.generation(score=True, referee=True, kl=True)
    return evaluation.answers(BEST_OF, model, test_prompts(evaluation, BEST_OF), generation)


def _measured(evaluation: Evaluation, answers: Sequence[Answer]) -> dict[str, Floats]:
    """Return every measure of the answers [N]; all processes take part."""
    columns: dict[str, Sequence[float | None]] = {REWARD: [answer.score for answer in answers]}
    if answers[0].referee is not None:
        columns[REFEREE] = [answer.referee for answer in answers]
    gold = gold_judge(evaluation.config)
    if gold is not None:
        columns[gold.key] = [gold.score(answer.prompt, answer.text) for answer in answers]
    if scores_toxicity(evaluation.config.eval):
        scorer = toxicity_scorer(evaluation.config, evaluation.world)
        texts = [answer.text for answer in answers]
        columns["toxicity"] = shared_scores(scorer, texts, evaluation.world).tolist()
    columns["length"] = [answer.tokens for answer in answers]
    return {key: np.array(values, dtype=np.float64) for key, values in columns.items()}


def _conclude(
    evaluation: Evaluation,
    answers: list[Answer],
    measured: dict[str, Floats],
    others: dict[str, list[Answer]],
    measured_others: Sequence[dict[str, Floats]],
) -> PartResult:
    section = evaluation.config.eval
    most = max(section.best_of)
    values = {key: scores.reshape(-1, most) for key, scores in measured.items()}
    curve = BestOfCurve(values, section.seed)
    points = curve.points(section.best_of)
    models = [
        curve.model(
            name,
            np.array([answer.kl for answer in own], dtype=np.float64),
            {key: scores for key, scores in own_values.items() if key in values},
        )
        for (name, own), own_values in zip(others.items(), measured_others, strict=True)
    ]
    texts = [answer.text for answer in answers]
    distinct = [
        len(set(texts[start : start + most])) / most for start in range(0, len(texts), most)
    ]
    content = {
        "baseline": evaluation.baseline.name,
        "judge": evaluation.config.ppo.reward.kind,
        "samples": most,
        "prompts": len(distinct),
        "distinct": float(np.mean(distinct)),
        "sampling": sampling_words(answers[0].sampling),
        "measures": [asdict(measure) for measure in _MEASURES if measure.key in values],
        "points": [point_to_json(point) for point in points],
        "models": [model_to_json(model) for model in models],
    }
    return PartResult(scalars(points, models), {FILE: content})
