"""The reward-quality part: whether the reward deserves trust, and how far it can be pushed.

Scores of held-out pairs show how often the reward agrees with people, and what misleads it. The
answers of optimised policies, and the best of n answers of the baseline, show whether judges that
nothing was trained on (a referee, the toy data's gold judge) see the gains that the reward sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_exp.config.compose import to_dict
from rlhf_exp.config.evaluation import REFEREE, REWARD_QUALITY
from rlhf_exp.config.experiment import Config
from rlhf_exp.evaluation.answers import Answer
from rlhf_exp.evaluation.overoptimisation import (
    PolicyPoint,
    StartingPolicy,
    TrainingPath,
    best_of_n_sizes,
)
from rlhf_exp.evaluation.reward_quality import (
    PairQuality,
    distributions,
    pair_quality,
    proportion_of,
    rank_correlation,
    scores_by_length,
)
from rlhf_exp.stages.data_module import pairs_of
from rlhf_exp.stages.evaluation.evaluation import (
    BLANK,
    CHOSEN,
    REJECTED,
    EvalPrompt,
    EvaluatedModel,
    Evaluation,
    PartResult,
    test_prompts,
)
from rlhf_exp.stages.evaluation.gold_judge import gold_judge
from rlhf_exp.store.artifact import MANIFEST, Manifest

FILE = "reward_quality.json"

WHOLE: dict[str, Any] = {"top_p": 1.0, "top_k": 0}
"""Sampling from whole distributions: only between these is there a KL, of answers or best-of-n."""

Pairs = dict[str, list[Answer]]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class AnswerScorer:
    """A judge that gives each answer a number.

    Attributes:
        key: Its name in metrics.
        name: Its name in the report.
        score: Returns the number of one answer.
    """

    key: str
    name: str
    score: Callable[[Answer], float | None]

    def scores(self, answers: Sequence[Answer]) -> Floats:
        """Return the scores [N] of answers."""
        return np.array([self.score(answer) for answer in answers], dtype=np.float64)


def answer_scorers(config: Config, answers: Sequence[Answer]) -> list[AnswerScorer]:
    """Return the reward first, then the judges that nothing was trained on.

    Args:
        config: The experiment.
        answers: Some answers, whose scores say whether there is a second reward model.
    """
    scorers = [AnswerScorer("reward", config.ppo.reward.kind, lambda answer: answer.score)]
    if answers[0].referee is not None:
        scorers.append(AnswerScorer(REFEREE, "referee", lambda answer: answer.referee))
    gold = gold_judge(config)
    if gold is not None:
        scorers.append(
            AnswerScorer(
                "gold", "gold judge", lambda answer: gold.score(answer.prompt, answer.text)
            )
        )
    return scorers


def run(evaluation: Evaluation) -> PartResult:
    """Score held-out pairs, and the answers of every model at every step with a snapshot."""
    section = evaluation.config.eval.reward_quality
    prompts = test_prompts(evaluation, REWARD_QUALITY)[: section.prompts]
    best_of_n = evaluation.generation(**WHOLE, count=section.best_of, score=True, referee=True)
    start = evaluation.answers(REWARD_QUALITY, evaluation.baseline, prompts, best_of_n)
    others = {model: _answers(evaluation, model, prompts) for model in evaluation.models[1:]}
    # After the models' answers: the first in `samples.jsonl` must be the models under evaluation.
    held_out = lambda: evaluation.context.materials.corpus.preferences.test  # noqa: E731
    pairs = evaluation.pairs(REWARD_QUALITY, lambda: held_out()[: section.pairs])
    return evaluation.on_main_process(lambda: _conclude(evaluation, pairs, start, others))


def _answers(
    evaluation: Evaluation, model: EvaluatedModel, prompts: Sequence[EvalPrompt]
) -> dict[str, list[Answer]]:
    """Return one answer to each prompt by a model, the published one first, by the model's name."""
    generation = evaluation.generation(**WHOLE, score=True, referee=True, kl=True)
    models = [model, *evaluation.snapshots(REWARD_QUALITY, model)]
    return {
        step.name: evaluation.answers(REWARD_QUALITY, step, prompts, generation) for step in models
    }


def _conclude(
    evaluation: Evaluation,
    pairs: Pairs,
    start: list[Answer],
    others: dict[EvaluatedModel, dict[str, list[Answer]]],
) -> PartResult:
    judges = answer_scorers(evaluation.config, start)
    quality = [_quality(judge, pairs) for judge in judges] if pairs[CHOSEN] else []
    paths = _paths(evaluation, judges, start, others)
    published = {model.name: answers[model.name] for model, answers in others.items()}
    kinds = {evaluation.baseline.name: start, **published}
    content = {
        "judges": [judge.name for judge in judges],
        "referee": describe_referee(evaluation),
        "pairs": [judge_quality.to_json() for judge_quality in quality],
        "agreement": _agreement(judges, pairs),
        "answers": [_model_statistics(name, answers, judges) for name, answers in kinds.items()],
        "distributions": asdict(_distributions(judges[0], pairs, kinds)),
        "prompts": len({answer.row for answer in start}),
        "best_of": len({answer.sample for answer in start}),
        "paths": [path.to_json() for path in paths],
    }
    return PartResult(_metrics(judges, quality, paths), {FILE: content})


def _quality(judge: AnswerScorer, pairs: Pairs) -> PairQuality:
    lengths = [[answer.tokens for answer in pairs[side]] for side in (CHOSEN, REJECTED)]
    scores = [judge.scores(pairs[side]) for side in (CHOSEN, REJECTED, BLANK)]
    return pair_quality(judge.name, *scores, *lengths)


def _agreement(judges: list[AnswerScorer], pairs: Pairs) -> dict[str, Any]:
    """Return in how many pairs each other judge prefers the side that the reward prefers."""
    agreement = {}
    for judge in judges[1:] if pairs[CHOSEN] else []:
        margins = [
            scorer.scores(pairs[CHOSEN]) - scorer.scores(pairs[REJECTED])
            for scorer in (judges[0], judge)
        ]
        decided = (margins[0] != 0) & (margins[1] != 0)
        agreement[judge.name] = proportion_of(
            np.sign(margins[0])[decided] == np.sign(margins[1])[decided]
        ).to_json()
    return agreement


def _model_statistics(
    name: str, answers: list[Answer], judges: list[AnswerScorer]
) -> dict[str, Any]:
    """Return how the reward of a model's answers goes with length, and with other judges."""
    reward = judges[0].scores(answers)
    tokens = [answer.tokens for answer in answers]
    return {
        "model": name,
        "tokens": float(np.mean(tokens)),
        "length_spearman": rank_correlation(reward, tokens),
        "by_length": [asdict(length_bin) for length_bin in scores_by_length(reward, tokens)],
        "judges_spearman": {
            judge.name: rank_correlation(reward, judge.scores(answers)) for judge in judges[1:]
        },
    }


def _distributions(judge: AnswerScorer, pairs: Pairs, kinds: dict[str, list[Answer]]) -> Any:  # noqa: ANN401
    sides = {side: pairs[side] for side in (CHOSEN, REJECTED) if pairs[side]}
    return distributions(
        {name: judge.scores(answers) for name, answers in {**sides, **kinds}.items()}
    )


def _paths(
    evaluation: Evaluation,
    judges: list[AnswerScorer],
    answers: list[Answer],
    others: dict[EvaluatedModel, dict[str, list[Answer]]],
) -> list[TrainingPath]:
    """Return reward against KL for best-of-n, and for each model with its snapshots."""
    count = len({answer.sample for answer in answers})
    scores = {judge.name: judge.scores(answers).reshape(-1, count) for judge in judges}
    start = StartingPolicy(scores, evaluation.config.eval.seed)
    best = start.best_of(best_of_n_sizes(count))
    paths = [best] if best is not None else []
    for model, answers_by_step in others.items():
        points = [
            _point(start, judges, name, answers_at_step)
            for name, answers_at_step in answers_by_step.items()
            if all(answer.kl is not None for answer in answers_at_step)
        ]
        if points:
            paths.append(start.path(model.name, points))
    return paths


def _point(
    start: StartingPolicy, judges: list[AnswerScorer], name: str, answers: list[Answer]
) -> PolicyPoint:
    # The estimate from samples can fall below 0 where the models hardly differ.
    kl = max(0.0, float(np.mean([answer.kl for answer in answers])))
    return start.point(name, kl, {judge.name: judge.scores(answers) for judge in judges})


def _metrics(
    judges: list[AnswerScorer], quality: list[PairQuality], paths: list[TrainingPath]
) -> dict[str, float]:
    keys = {judge.name: judge.key for judge in judges}
    metrics: dict[str, float | None] = {}
    for judge_quality in quality:
        prefix = f"reward_quality/{keys[judge_quality.judge]}"
        metrics[f"{prefix}/accuracy"] = judge_quality.accuracy.value
        metrics[f"{prefix}/accuracy_length_controlled"] = judge_quality.length.controlled_accuracy
        metrics[f"{prefix}/auc"] = judge_quality.auc
        metrics[f"{prefix}/calibration_error"] = judge_quality.calibration.error
        metrics[f"{prefix}/length_correlation"] = judge_quality.length.within
    for path in paths:
        # The published model rather than a snapshot; of best-of-n the largest n.
        shown = next((point for point in path.points if point.label == path.name), path.points[-1])
        prefix = f"reward_quality/{path.name.replace(' ', '_')}"
        metrics[f"{prefix}/kl"] = shown.kl
        for name, gain in shown.gains.items():
            metrics[f"{prefix}/gain/{keys[name]}"] = gain.mean
    return {name: float(value) for name, value in metrics.items() if value is not None}


def describe_referee(evaluation: Evaluation) -> dict[str, Any] | None:
    """Return the second reward model's name, seed, part of the data, and share of common pairs.

    `shared` is the share of the reward model's training pairs that the referee was trained on too;
    `None` where either is not this project's, or they were trained on different data.
    """
    if REFEREE not in evaluation.context.models:
        return None
    configs = [_config_of(evaluation.context.models.get(role)) for role in (REFEREE, "reward")]
    referee, reward = configs
    known: dict[str, Any] = {"name": str(evaluation.config.eval.reward_quality.referee)}
    known |= {name: (referee or {}).get("reward", {}).get(name) for name in ("seed", "part")}
    return {**known, "shared": _shared_pairs(evaluation, referee, reward)}


def _config_of(model: str | None) -> Mapping[str, Any] | None:
    path = None if model is None else Path(model).parent / MANIFEST
    return Manifest.read(path.parent).config if path is not None and path.is_file() else None


def _shared_pairs(
    evaluation: Evaluation, referee: Mapping[str, Any] | None, reward: Mapping[str, Any] | None
) -> float | None:
    here = to_dict(evaluation.config)["data"]
    if referee is None or reward is None or not referee["data"] == reward["data"] == here:
        return None
    rows = evaluation.context.materials.corpus.preferences.train
    own, other = (
        {row.origin for row in pairs_of(rows, config["reward"].get("part"))}
        for config in (reward, referee)
    )
    return len(own & other) / len(own)
