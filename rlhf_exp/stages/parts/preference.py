"""The preference part: each model against the baseline on held-out prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from rlhf_exp.config.evaluation import PREFERENCE
from rlhf_exp.config.root import Config
from rlhf_exp.evaluation.answers import Answer, sampling_words
from rlhf_exp.evaluation.quick import quick_comparison
from rlhf_exp.evaluation.result import QuickResult
from rlhf_exp.evaluation.toxicity.scorer import Scored
from rlhf_exp.stages.asking import DIALOGUE
from rlhf_exp.stages.bench import Bench, PartResult, test_prompts
from rlhf_exp.stages.gold import gold_judge
from rlhf_exp.stages.judging import JUDGES, Panel
from rlhf_exp.stages.toxicity_scorers import shared_scores, toxicity_scorer

RESULT, OTHERS = "result.json", "comparisons.json"
"""The first comparison, and the list of all of them where there are several."""


def run(bench: Bench) -> PartResult:
    """Answer held-out prompts by all models, and compare each with the first."""
    # Made by the main process before anything is sampled, so that a wrong address costs nothing.
    panels: list[Panel] = []
    bench.alone(lambda: panels.append(Panel(bench)))
    asked = test_prompts(bench, PREFERENCE)
    manner = bench.manner(score=True, kl=True)
    answers = [bench.answers(PREFERENCE, one, asked, manner) for one in bench.contestants]
    scored = _toxicity(bench, [answer.text for one in answers for answer in one])
    return bench.alone(lambda: _conclude(bench.config, answers, scored, panels[0]))


def _toxicity(bench: Bench, texts: list[str]) -> Scored:
    """Have the scorer of the config read the answers, each process its share."""
    scorer = toxicity_scorer(bench.config, bench.world)
    scores = shared_scores(scorer, texts, bench.world).tolist()
    return Scored(scorer.name, dict(zip(texts, scores, strict=True)))


def _conclude(
    config: Config, answers: list[list[Answer]], scored: Scored, panel: Panel
) -> PartResult:
    baseline, *others = answers
    results = [_compare(config, baseline, other, scored) for other in others]
    metrics = results[0].scalars()
    for result in results[1:]:
        prefix = f"eval/{result.name_b}/"
        metrics |= {name.replace("eval/", prefix, 1): v for name, v in result.scalars().items()}
    files: dict[str, Any] = {RESULT: results[0].to_json()}
    if len(results) > 1:
        files[OTHERS] = [result.to_json() for result in results]
    dialogues = [str(answer.facts.get(DIALOGUE, answer.prompt)) for answer in baseline]
    judged, content = panel.report(results, dialogues)
    if content:
        files[JUDGES] = content
    return PartResult(metrics | judged, files, {"eval/side_by_side": _table(results)})


def _compare(
    config: Config, baseline: list[Answer], other: list[Answer], scored: Scored
) -> QuickResult:
    kl = [answer.kl for answer in other if answer.kl is not None]
    found = quick_comparison(
        [answer.prompt for answer in baseline],
        [answer.text for answer in baseline],
        [answer.text for answer in other],
        _scores(baseline),
        _scores(other),
        kl if len(kl) == len(other) else None,
        lengths_a=[answer.tokens for answer in baseline],
        lengths_b=[answer.tokens for answer in other],
        toxicity=scored,
        gold=gold_judge(config),
        name_a=baseline[0].model,
        name_b=other[0].model,
        judge=config.ppo.reward.kind,
        seed=config.eval.seed,
        tie_band=(config.eval.tie_low, config.eval.tie_high),
    )
    return replace(found, sampling=sampling_words(other[0].sampling))


def _scores(answers: list[Answer]) -> np.ndarray:
    return np.array([answer.score for answer in answers], dtype=np.float64)


def _table(results: list[QuickResult]) -> tuple[list[str], list[list[object]]]:
    columns = ["prompt", "baseline", "model", "answer of baseline", "answer of model"]
    columns += ["score of baseline", "score of model", "outcome"]
    rows = []
    for result in results:
        names = [result.name_a, result.name_b]
        for row in result.rows:
            said = [row.answer_a, row.answer_b, row.score_a, row.score_b, row.outcome]
            rows.append([row.prompt, *names, *said])
    return columns, rows
