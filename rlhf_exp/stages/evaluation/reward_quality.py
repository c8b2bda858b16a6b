"""The reward-quality part: whether the reward deserves trust, and how far it can be pushed.

Held-out pairs say how often the reward agrees with people, and by what it is misled. The answers of
optimised policies, and the best of n answers of the baseline, say whether judges that nothing was
trained on see the gains that the reward sees.

Who judges answers in the reward-quality part: the reward itself, and who was not maximised.
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
from rlhf_exp.evaluation.overoptimisation import PolicyPoint, StartingPolicy, TrainingPath, sizes_of
from rlhf_exp.evaluation.reward_quality import (
    PairQuality,
    distributions,
    pair_quality,
    proportion_of,
    rank_correlation,
    scores_by_length,
)
from rlhf_exp.stages.evaluation.bench import (
    BLANK,
    CHOSEN,
    REJECTED,
    Bench,
    EvalPrompt,
    EvaluatedModel,
    PartResult,
    test_prompts,
)
from rlhf_exp.stages.evaluation.gold_judge import gold_judge
from rlhf_exp.stages.reward import pairs_of
from rlhf_exp.store.artifact import MANIFEST, Manifest

FILE = "reward_quality.json"

WHOLE: dict[str, Any] = {"top_p": 1.0, "top_k": 0}
"""A KL, estimated from answers or known of the best of n, is one of whole distributions."""

Pairs = dict[str, list[Answer]]


def run(bench: Bench) -> PartResult:
    """Score held-out pairs, and the answers of every model at every step that is kept."""
    section = bench.config.eval.reward_quality
    asked = test_prompts(bench, REWARD_QUALITY)[: section.prompts]
    many = bench.manner(**WHOLE, count=section.best_of, score=True, referee=True)
    start = bench.answers(REWARD_QUALITY, bench.baseline, asked, many)
    others = {one: _answers(bench, one, asked) for one in bench.contestants[1:]}
    # After the models' answers: what comes first in the samples are the models under evaluation.
    held_out = lambda: bench.context.materials.corpus.preferences.test  # noqa: E731
    pairs = bench.pairs(REWARD_QUALITY, lambda: held_out()[: section.pairs])
    return bench.alone(lambda: _conclude(bench, pairs, start, others))


def _answers(
    bench: Bench, contestant: EvaluatedModel, asked: Sequence[EvalPrompt]
) -> dict[str, list[Answer]]:
    """Return one answer to each prompt by a model, the published one first, by the model's name."""
    manner = bench.manner(**WHOLE, score=True, referee=True, kl=True)
    models = [contestant, *bench.snapshots(REWARD_QUALITY, contestant)]
    return {one.name: bench.answers(REWARD_QUALITY, one, asked, manner) for one in models}


def _conclude(
    bench: Bench,
    pairs: Pairs,
    start: list[Answer],
    others: dict[EvaluatedModel, dict[str, list[Answer]]],
) -> PartResult:
    judges = answer_scorers(bench.config, start)
    quality = [_quality(judge, pairs) for judge in judges] if pairs[CHOSEN] else []
    paths = _paths(bench, judges, start, others)
    published = {one.name: answers[one.name] for one, answers in others.items()}
    kinds = {bench.baseline.name: start, **published}
    plain = {
        "judges": [judge.name for judge in judges],
        "referee": about_referee(bench),
        "pairs": [found.to_json() for found in quality],
        "agreement": _agreement(judges, pairs),
        "answers": [_of_model(name, answers, judges) for name, answers in kinds.items()],
        "distributions": asdict(_spread(judges[0], pairs, kinds)),
        "prompts": len({answer.row for answer in start}),
        "best_of": len({answer.sample for answer in start}),
        "paths": [path.to_json() for path in paths],
    }
    return PartResult(_metrics(judges, quality, paths), {FILE: plain})


def _quality(judge: AnswerScorer, pairs: Pairs) -> PairQuality:
    lengths = [[answer.tokens for answer in pairs[side]] for side in (CHOSEN, REJECTED)]
    scores = [judge.scores(pairs[side]) for side in (CHOSEN, REJECTED, BLANK)]
    return pair_quality(judge.name, *scores, *lengths)


def _agreement(judges: list[AnswerScorer], pairs: Pairs) -> dict[str, Any]:
    """Return in how many pairs each other judge prefers the side that the reward prefers."""
    found = {}
    for judge in judges[1:] if pairs[CHOSEN] else []:
        both = [
            one.scores(pairs[CHOSEN]) - one.scores(pairs[REJECTED]) for one in (judges[0], judge)
        ]
        decided = (both[0] != 0) & (both[1] != 0)
        found[judge.name] = proportion_of(
            np.sign(both[0])[decided] == np.sign(both[1])[decided]
        ).to_json()
    return found


def _of_model(name: str, answers: list[Answer], judges: list[AnswerScorer]) -> dict[str, Any]:
    """Return how the reward of a model's answers goes with length, and with other judges."""
    reward = judges[0].scores(answers)
    tokens = [answer.tokens for answer in answers]
    return {
        "model": name,
        "tokens": float(np.mean(tokens)),
        "length_spearman": rank_correlation(reward, tokens),
        "by_length": [asdict(one) for one in scores_by_length(reward, tokens)],
        "judges_spearman": {
            judge.name: rank_correlation(reward, judge.scores(answers)) for judge in judges[1:]
        },
    }


def _spread(judge: AnswerScorer, pairs: Pairs, kinds: dict[str, list[Answer]]) -> Any:  # noqa: ANN401
    sides = {side: pairs[side] for side in (CHOSEN, REJECTED) if pairs[side]}
    return distributions({name: judge.scores(found) for name, found in {**sides, **kinds}.items()})


def _paths(
    bench: Bench,
    judges: list[AnswerScorer],
    answers: list[Answer],
    others: dict[EvaluatedModel, dict[str, list[Answer]]],
) -> list[TrainingPath]:
    """Return reward against KL for best-of-n, and for each model with its snapshots."""
    count = len({answer.sample for answer in answers})
    scores = {judge.name: judge.scores(answers).reshape(-1, count) for judge in judges}
    start = StartingPolicy(scores, bench.config.eval.seed)
    best = start.best_of(sizes_of(count))
    paths = [best] if best is not None else []
    for contestant, found in others.items():
        points = [
            _point(start, judges, name, given)
            for name, given in found.items()
            if all(answer.kl is not None for answer in given)
        ]
        if points:
            paths.append(start.path(contestant.name, points))
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
    found: dict[str, float | None] = {}
    for one in quality:
        prefix = f"reward_quality/{keys[one.judge]}"
        found[f"{prefix}/accuracy"] = one.accuracy.value
        found[f"{prefix}/accuracy_length_controlled"] = one.length.controlled_accuracy
        found[f"{prefix}/auc"] = one.auc
        found[f"{prefix}/calibration_error"] = one.calibration.error
        found[f"{prefix}/length_correlation"] = one.length.within
    for path in paths:
        # The published model rather than a snapshot; of best-of-n the largest n.
        shown = next((one for one in path.points if one.label == path.name), path.points[-1])
        prefix = f"reward_quality/{path.name.replace(' ', '_')}"
        found[f"{prefix}/kl"] = shown.kl
        for name, gain in shown.gains.items():
            found[f"{prefix}/gain/{keys[name]}"] = gain.mean
    return {name: float(value) for name, value in found.items() if value is not None}


Floats = NDArray[np.float64]


@dataclass(frozen=True)
class AnswerScorer:
    """Gives answers a number.

    Attributes:
        key: In names of metrics.
        name: In the report.
        score: The number of one answer.
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
    found = [AnswerScorer("reward", config.ppo.reward.kind, lambda answer: answer.score)]
    if answers[0].referee is not None:
        found.append(AnswerScorer(REFEREE, "referee", lambda answer: answer.referee))
    gold = gold_judge(config)
    if gold is not None:
        found.append(
            AnswerScorer("gold", "gold judge", lambda answer: gold(answer.prompt, answer.text))
        )
    return found


def about_referee(bench: Bench) -> dict[str, Any] | None:
    """Return what is known of the second reward model: name, seed, part, and what pairs it shares.

    `shared` is the share of the reward model's training pairs that the referee was trained on too;
    `None` where either is not this project's, or they were trained on different data.
    """
    if REFEREE not in bench.context.models:
        return None
    configs = [_config(bench.context.models.get(role)) for role in (REFEREE, "reward")]
    referee, reward = configs
    known: dict[str, Any] = {"name": str(bench.config.eval.reward_quality.referee)}
    known |= {name: (referee or {}).get("reward", {}).get(name) for name in ("seed", "part")}
    return {**known, "shared": _shared(bench, referee, reward)}


def _config(model: str | None) -> Mapping[str, Any] | None:
    path = None if model is None else Path(model).parent / MANIFEST
    return Manifest.read(path.parent).config if path is not None and path.is_file() else None


def _shared(
    bench: Bench, referee: Mapping[str, Any] | None, reward: Mapping[str, Any] | None
) -> float | None:
    here = to_dict(bench.config)["data"]
    if referee is None or reward is None or not referee["data"] == reward["data"] == here:
        return None
    rows = bench.context.materials.corpus.preferences.train
    own, other = (
        {row.origin for row in pairs_of(rows, config["reward"].get("part"))}
        for config in (reward, referee)
    )
    return len(own & other) / len(own)
