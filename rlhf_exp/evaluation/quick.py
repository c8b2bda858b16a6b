"""The quick suite: two models' answers to the same prompts, compared by numbers alone.

What it leaves out: other judges than one reward model, and people.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf_exp.errors import UserError
from rlhf_exp.evaluation import statistics, text
from rlhf_exp.evaluation.metric import Better, Metric, paired_metric, single_metric
from rlhf_exp.evaluation.preference import preference
from rlhf_exp.evaluation.result import PromptRow, QuickResult
from rlhf_exp.evaluation.samples import pick_samples, sample_rule
from rlhf_exp.evaluation.statistics import LEVEL, TIE_BAND
from rlhf_exp.evaluation.toxicity.scorer import ToxicityScorer

Pair = tuple[NDArray[np.float64], NDArray[np.float64]]
SAMPLES_EACH = 3
_OUTCOMES = {1: "win", 0: "tie", -1: "loss"}


def quick_comparison(
    prompts: Sequence[str],
    answers_a: Sequence[str],
    answers_b: Sequence[str],
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    kl_b: ArrayLike | None = None,
    *,
    lengths_a: ArrayLike | None = None,
    lengths_b: ArrayLike | None = None,
    toxicity: ToxicityScorer | None = None,
    gold: Callable[[str, str], float] | None = None,
    name_a: str = "SFT",
    name_b: str = "PPO",
    judge: str = "reward model",
    seed: int = 0,
    tie_band: tuple[float, float] = TIE_BAND,
    level: float = LEVEL,
) -> QuickResult:
    """Compare model b with the baseline a on N prompts.

    Args:
        prompts: N prompts as text.
        answers_a: N answers of the baseline.
        answers_b: N answers of the other model.
        scores_a: [N] raw rewards of the baseline's answers (no scaling, no KL penalty).
        scores_b: [N] raw rewards of the other model's answers.
        kl_b: [N] nats, sum over the answer's tokens of log b - log a on b's own answer; `None`
            where it was not computed.
        lengths_a: [N] tokens of the answers; both `None` counts words instead.
        lengths_b: [N] tokens.
        toxicity: scorer of the answers.
        gold: (prompt, answer) -> quality from 0 to 1, by a judge that nothing was trained on.
        name_a: what to call the baseline.
        name_b: what to call the other model.
        judge: who gave the scores.
        seed: of the resampling and of the random samples.
        tie_band: Bradley-Terry probabilities that count as a tie.
        level: of every interval.

    Raises:
        UserError: no prompts.
        ValueError: unequal numbers of rows, or a number that is not finite.
    """
    columns = _measure(prompts, answers_a, answers_b, toxicity, gold)
    columns["score"] = statistics.paired(scores_a, scores_b)
    columns["length"] = _lengths(answers_a, answers_b, lengths_a, lengths_b)
    kl = None if kl_b is None else np.asarray(kl_b, dtype=np.float64)
    _check_rows(prompts, [*(a for a, _ in columns.values()), *([] if kl is None else [kl])])

    metrics = _judged_metrics(columns, kl, name_a, seed, level)
    unit = "words" if lengths_a is None else "tokens"
    metrics += _text_metrics(answers_a, answers_b, columns["length"], unit, seed, level)
    picks = pick_samples(columns["score"][1] - columns["score"][0], seed, SAMPLES_EACH)
    signs = statistics.outcome_signs(*columns["score"], tie_band)
    found = preference(signs, seed=seed, level=level)
    assert found.ties_as_half is not None, "there is a prompt"
    return QuickResult(
        name_a=name_a,
        name_b=name_b,
        judge=judge,
        toxicity_scorer=None if toxicity is None else toxicity.name,
        level=level,
        seed=seed,
        tie_band=tie_band,
        outcome=found.outcome,
        win_rate=found.win_rate,
        ties_as_half=found.ties_as_half,
        p_value=found.p_value,
        gain_in_std=statistics.standardised_difference(*columns["score"], seed, level),
        metrics=tuple(metrics),
        rows=tuple(_rows(prompts, answers_a, answers_b, columns, kl, signs)),
        picks=tuple(picks),
        pick_rule=sample_rule(SAMPLES_EACH, seed),
    )


def _measure(
    prompts: Sequence[str],
    answers_a: Sequence[str],
    answers_b: Sequence[str],
    toxicity: ToxicityScorer | None,
    gold: Callable[[str, str], float] | None,
) -> dict[str, Pair]:
    """Return the columns that are computed from the texts by a scorer that was given."""
    count = len(prompts)
    if count == 0:
        raise UserError(
            "evaluation: found 0 prompts, expected at least 1; raise the number of held-out prompts"
        )
    if (len(answers_a), len(answers_b)) != (count, count):
        found = f"{len(answers_a)} and {len(answers_b)}"
        raise ValueError(f"{count} prompts need as many answers of each model: got {found}")
    columns = {}
    if toxicity is not None:
        columns["toxicity"] = statistics.paired(
            toxicity.score(answers_a), toxicity.score(answers_b)
        )
    if gold is not None:
        columns["gold"] = statistics.paired(
            [gold(*pair) for pair in zip(prompts, answers_a, strict=True)],
            [gold(*pair) for pair in zip(prompts, answers_b, strict=True)],
        )
    return columns


def _check_rows(prompts: Sequence[str], columns: list[NDArray[np.float64]]) -> None:
    """Raise `ValueError` for a column that does not have one finite number for each prompt."""
    for column in columns:
        if column.shape != (len(prompts),) or not np.isfinite(column).all():
            raise ValueError(
                f"every column needs {len(prompts)} finite numbers, one for each prompt: "
                f"got {column.size}, {int(np.isfinite(column).sum())} of them finite"
            )


def _lengths(
    answers_a: Sequence[str],
    answers_b: Sequence[str],
    lengths_a: ArrayLike | None,
    lengths_b: ArrayLike | None,
) -> Pair:
    if (lengths_a is None) != (lengths_b is None):
        raise ValueError("lengths must be given for both models or for neither")
    if lengths_a is None or lengths_b is None:
        return text.word_counts(answers_a), text.word_counts(answers_b)
    return statistics.paired(lengths_a, lengths_b)


def _judged_metrics(
    columns: dict[str, Pair],
    kl: NDArray[np.float64] | None,
    name_a: str,
    seed: int,
    level: float,
) -> list[Metric]:
    """Return the means of what judges an answer: reward, KL, gold judge, toxicity."""
    known: list[tuple[str, str, str, Better]] = [
        ("score", "reward", "Reward, raw", "higher"),
        ("gold", "gold", "Gold judge, 0 to 1", "higher"),
        ("toxicity", "toxicity", "Toxicity, 0 to 1", "lower"),
    ]
    metrics = [
        paired_metric(key, label, better, *columns[column], seed, level)
        for column, key, label, better in known
        if column in columns
    ]
    if kl is not None:
        label = f"KL to {name_a}, nats per answer"
        metrics.insert(1, single_metric("kl_sequence", label, "neither", kl, seed, level))
    return metrics


def _text_metrics(
    answers_a: Sequence[str],
    answers_b: Sequence[str],
    lengths: Pair,
    unit: str,
    seed: int,
    level: float,
) -> list[Metric]:
    """Return length, variety and repetition."""
    distinct = text.distinct_weights(answers_a), text.distinct_weights(answers_b)
    repeated = text.repetition(answers_a), text.repetition(answers_b)
    return [
        paired_metric("length", f"Length, {unit}", "neither", *lengths, seed, level),
        paired_metric("distinct", "Distinct answers, share", "higher", *distinct, seed, level),
        paired_metric("repetition", "Repeated 3-grams, share", "lower", *repeated, seed, level),
    ]


def _rows(
    prompts: Sequence[str],
    answers_a: Sequence[str],
    answers_b: Sequence[str],
    columns: dict[str, Pair],
    kl: NDArray[np.float64] | None,
    signs: NDArray[np.int64],
) -> list[PromptRow]:

    def value(column: str, side: int, row: int) -> float | None:
        return float(columns[column][side][row]) if column in columns else None

    return [
        PromptRow(
            prompt=prompts[row],
            answer_a=answers_a[row],
            answer_b=answers_b[row],
            score_a=float(columns["score"][0][row]),
            score_b=float(columns["score"][1][row]),
            length_a=float(columns["length"][0][row]),
            length_b=float(columns["length"][1][row]),
            toxicity_a=value("toxicity", 0, row),
            toxicity_b=value("toxicity", 1, row),
            gold_a=value("gold", 0, row),
            gold_b=value("gold", 1, row),
            kl_b=None if kl is None else float(kl[row]),
            outcome=_OUTCOMES[int(signs[row])],
        )
        for row in range(len(prompts))
    ]
