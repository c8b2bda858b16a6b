"""Two models' answers to the same prompts, compared by numbers alone: the quick suite.

The judge is one reward model; other judges and people are left out. Every row is kept, so that each
number can be recomputed without the models. Besides rewards, surface statistics (variety,
repetition, length) catch the collapse that a reward hides: a policy that answers every prompt with
one well-scored sentence. The qualitative table shows prompts chosen by a stated rule.

Legend: N prompts.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf_exp.errors import UserError
from rlhf_exp.evaluation import statistics
from rlhf_exp.evaluation.preference import (
    Better,
    Metric,
    PreferenceResult,
    TableRow,
    estimate_from_json,
    estimate_to_json,
    format_estimate,
    paired_metric,
    single_metric,
    summarise_preference,
    table_row,
)
from rlhf_exp.evaluation.statistics import LEVEL, TIE_BAND, Estimate, Interval, WinCounts

if TYPE_CHECKING:
    # Reports read results without torch, which the scorers need.
    from rlhf_exp.evaluation.toxicity.scorers import ToxicityScorer

Floats = NDArray[np.float64]
Pair = tuple[Floats, Floats]
ACCURACY = "accuracy"
"""Key of the metric of a rule that says whether an answer is right."""
SAMPLES_EACH = 3
GAIN = "largest gain"
LOSS = "largest loss"
RANDOM = "random"
_OUTCOMES = {1: "win", 0: "tie", -1: "loss"}


@dataclass(frozen=True)
class GoldJudge:
    """A judge by rules, which know the data, and not by a model.

    Attributes:
        key: of its metric: `gold`, or `ACCURACY`.
        label: of its metric, with the range.
        score: returns the mark of an answer to a prompt, from 0 to 1.
    """

    key: str
    label: str
    score: Callable[[str, str], float]


@dataclass(frozen=True)
class ModelComparison:
    """Model b compared with the baseline a.

    Attributes:
        name_a: the baseline.
        name_b: the other model.
        judge: name of the source of the scores.
        toxicity_scorer: name of the scorer of toxicity, if there is one.
        level: confidence level of every interval.
        seed: seed of the resampling and of the random samples.
        tie_band: Bradley-Terry probabilities that count as a tie.
        outcome: wins, ties and losses of b.
        win_rate: exact interval of the share of wins among decided comparisons.
        ties_as_half: share of wins, a tie as half of one, with its bootstrap interval.
        p_value: exact two-sided sign test, ties left out.
        gain_in_std: reward difference in standard deviations of the baseline's rewards; `None`
            if these do not vary.
        metrics: means with their intervals.
        rows: one for each prompt.
        picks: rows chosen for the side-by-side table.
        pick_rule: the rule by which they were chosen, in words.
        sampling: how answers were sampled, in words; empty if unknown.
    """

    name_a: str
    name_b: str
    judge: str
    toxicity_scorer: str | None
    level: float
    seed: int
    tie_band: tuple[float, float]
    outcome: WinCounts
    win_rate: Interval
    ties_as_half: Estimate
    p_value: float
    gain_in_std: Estimate | None
    metrics: tuple[Metric, ...]
    rows: tuple[PromptRow, ...]
    picks: tuple[Pick, ...]
    pick_rule: str
    sampling: str = ""

    @property
    def preference(self) -> PreferenceResult:
        """The summary of the outcomes, as for any other judge."""
        return PreferenceResult(self.outcome, self.p_value, self.win_rate, self.ties_as_half)

    def metric(self, key: str) -> Metric | None:
        """Return the metric of that key, or `None` if it was not measured."""
        return next((metric for metric in self.metrics if metric.key == key), None)

    def table(self) -> list[TableRow]:
        """Return the numbers in words, for the terminal and the report."""
        rows = [table_row(metric) for metric in self.metrics]
        gain = format_estimate(self.gain_in_std, signed=True)
        reward = Metric("", "", "higher", None, None, self.gain_in_std)
        rows.insert(1, TableRow(f"Reward gain, {self.name_a} std", "", "", gain, reward.verdict))
        return rows

    def scalars(self) -> dict[str, float]:
        """Return the finite numbers under flat names, for trackers and manifests."""
        scalars: dict[str, float] = {
            "eval/outcome/wins": self.outcome.wins,
            "eval/outcome/ties": self.outcome.ties,
            "eval/outcome/losses": self.outcome.losses,
            "eval/outcome/win_rate": self.outcome.win_rate,
            "eval/outcome/ties_as_half": self.ties_as_half.mean,
            "eval/outcome/p_value": self.p_value,
        }
        if self.gain_in_std is not None:
            scalars["eval/reward/gain_in_std"] = self.gain_in_std.mean
        for metric in self.metrics:
            for side in ("a", "b", "difference"):
                estimate = getattr(metric, side)
                if estimate is not None:
                    scalars[f"eval/{metric.key}/{side}"] = estimate.mean
        return {name: float(value) for name, value in scalars.items() if math.isfinite(value)}

    def to_json(self) -> dict[str, Any]:
        """Return plain values that `json.dumps(..., allow_nan=False)` takes."""
        plain = asdict(self)
        plain["ties_as_half"] = estimate_to_json(self.ties_as_half)
        plain["gain_in_std"] = estimate_to_json(self.gain_in_std)
        for metric, record in zip(self.metrics, plain["metrics"], strict=True):
            for side in ("a", "b", "difference"):
                record[side] = estimate_to_json(getattr(metric, side))
        # A round trip turns tuples into lists and proves that nothing else is left.
        checked: dict[str, Any] = json.loads(json.dumps(plain, allow_nan=False))
        return checked

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> ModelComparison:
        """Undo `to_json`."""
        ties_as_half = estimate_from_json(plain["ties_as_half"])
        assert ties_as_half is not None
        values = dict(plain) | {
            "tie_band": tuple(plain["tie_band"]),
            "outcome": WinCounts(**plain["outcome"]),
            "win_rate": Interval(**plain["win_rate"]),
            "ties_as_half": ties_as_half,
            "gain_in_std": estimate_from_json(plain["gain_in_std"]),
            "metrics": tuple(_metric_from_json(record) for record in plain["metrics"]),
            "rows": tuple(PromptRow(**record) for record in plain["rows"]),
            "picks": tuple(Pick(**record) for record in plain["picks"]),
        }
        return cls(**values)


def _metric_from_json(plain: Mapping[str, Any]) -> Metric:
    sides = {side: estimate_from_json(plain[side]) for side in ("a", "b", "difference")}
    return Metric(**{**plain, **sides})


@dataclass(frozen=True)
class PromptRow:
    """One prompt, the answers of both models, and the measurements of each.

    `kl_b` is in nats over the whole answer; `outcome` is b's: `win`, `tie` or `loss`. Lengths are
    in tokens, or in words where no token counts were given. `terms_a` and `terms_b` are the scores
    of each term of a sum of rewards.
    """

    prompt: str
    answer_a: str
    answer_b: str
    score_a: float
    score_b: float
    length_a: float
    length_b: float
    toxicity_a: float | None
    toxicity_b: float | None
    gold_a: float | None
    gold_b: float | None
    kl_b: float | None
    outcome: str
    terms_a: Mapping[str, float] = field(default_factory=dict)
    terms_b: Mapping[str, float] = field(default_factory=dict)


def compare_models(
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
    gold: GoldJudge | None = None,
    terms: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    name_a: str = "SFT",
    name_b: str = "PPO",
    judge: str = "reward model",
    seed: int = 0,
    tie_band: tuple[float, float] = TIE_BAND,
    level: float = LEVEL,
) -> ModelComparison:
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
        gold: a judge by rules, if the data have one.
        terms: [N] scores of the baseline's answers and of the other model's, for each term of a sum
            of rewards, before weights.
        name_a: the baseline's name in tables.
        name_b: the other model's name in tables.
        judge: name of the source of the scores.
        seed: seed of the resampling and of the random samples.
        tie_band: Bradley-Terry probabilities that count as a tie.
        level: confidence level of every interval.

    Raises:
        UserError: no prompts.
        ValueError: unequal numbers of rows, or a number that is not finite.
    """
    columns = _measure(prompts, answers_a, answers_b, toxicity, gold)
    columns["score"] = statistics.paired(scores_a, scores_b)
    columns["length"] = _lengths(answers_a, answers_b, lengths_a, lengths_b)
    term_columns = {name: statistics.paired(*pair) for name, pair in (terms or {}).items()}
    kl = None if kl_b is None else np.asarray(kl_b, dtype=np.float64)
    _check_rows(prompts, [*(a for a, _ in columns.values()), *([] if kl is None else [kl])])

    metrics = _judged_metrics(columns, kl, gold, name_a, seed, level)
    metrics[1:1] = [
        paired_metric(f"term/{name}", f"Reward term {name}, raw", "higher", *pair, seed, level)
        for name, pair in term_columns.items()
    ]
    unit = "words" if lengths_a is None else "tokens"
    metrics += _text_metrics(answers_a, answers_b, columns["length"], unit, seed, level)
    picks = pick_samples(columns["score"][1] - columns["score"][0], seed, SAMPLES_EACH)
    signs = statistics.outcome_signs(*columns["score"], tie_band)
    preference = summarise_preference(signs, seed=seed, level=level)
    assert preference.ties_as_half is not None, "there is a prompt"
    return ModelComparison(
        name_a=name_a,
        name_b=name_b,
        judge=judge,
        toxicity_scorer=None if toxicity is None else toxicity.name,
        level=level,
        seed=seed,
        tie_band=tie_band,
        outcome=preference.outcome,
        win_rate=preference.win_rate,
        ties_as_half=preference.ties_as_half,
        p_value=preference.p_value,
        gain_in_std=statistics.standardised_difference(*columns["score"], seed, level),
        metrics=tuple(metrics),
        rows=tuple(_rows(prompts, answers_a, answers_b, columns, term_columns, kl, signs)),
        picks=tuple(picks),
        pick_rule=sample_rule(SAMPLES_EACH, seed),
    )


def _measure(
    prompts: Sequence[str],
    answers_a: Sequence[str],
    answers_b: Sequence[str],
    toxicity: ToxicityScorer | None,
    gold: GoldJudge | None,
) -> dict[str, Pair]:
    """Return the columns that a scorer computes from the texts: toxicity, gold."""
    count = len(prompts)
    if count == 0:
        raise UserError(
            "evaluation: found 0 prompts, expected at least 1; raise the number of held-out prompts"
        )
    if (len(answers_a), len(answers_b)) != (count, count):
        counts = f"{len(answers_a)} and {len(answers_b)}"
        raise ValueError(f"{count} prompts need as many answers of each model: got {counts}")
    columns = {}
    if toxicity is not None:
        columns["toxicity"] = statistics.paired(
            toxicity.score(answers_a), toxicity.score(answers_b)
        )
    if gold is not None:
        columns["gold"] = statistics.paired(
            [gold.score(*pair) for pair in zip(prompts, answers_a, strict=True)],
            [gold.score(*pair) for pair in zip(prompts, answers_b, strict=True)],
        )
    return columns


def _check_rows(prompts: Sequence[str], columns: list[Floats]) -> None:
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
        return word_counts(answers_a), word_counts(answers_b)
    return statistics.paired(lengths_a, lengths_b)


def _judged_metrics(
    columns: dict[str, Pair],
    kl: Floats | None,
    gold: GoldJudge | None,
    name_a: str,
    seed: int,
    level: float,
) -> list[Metric]:
    """Return the means of the judges of an answer: reward, KL, gold judge, toxicity."""
    known: list[tuple[str, str, str, Better]] = [
        ("score", "reward", "Reward, raw", "higher"),
        ("toxicity", "toxicity", "Toxicity, 0 to 1", "lower"),
    ]
    if gold is not None:
        known.insert(1, ("gold", gold.key, gold.label, "higher"))
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
    distinct = distinct_weights(answers_a), distinct_weights(answers_b)
    repeated = repetition(answers_a), repetition(answers_b)
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
    terms: dict[str, Pair],
    kl: Floats | None,
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
            terms_a={name: float(pair[0][row]) for name, pair in terms.items()},
            terms_b={name: float(pair[1][row]) for name, pair in terms.items()},
        )
        for row in range(len(prompts))
    ]


@dataclass(frozen=True)
class Pick:
    """One prompt chosen for the table.

    Attributes:
        rule: `GAIN`, `LOSS` or `RANDOM`.
        row: the prompt's number in the comparison.
    """

    rule: str
    row: int


def pick_samples(difference: ArrayLike, seed: int, each: int = 3) -> list[Pick]:
    """Choose prompts for the side-by-side table; `sample_rule` says the rule in words.

    Args:
        difference: [N] reward of b minus reward of a; equal ones go by row number.
        seed: seed of the random third.
        each: at most this many of each kind.

    Returns:
        Gains (largest first), losses (largest first), random ones (by row); no row twice.
    """
    gains = np.asarray(difference, dtype=np.float64)
    order = np.argsort(-gains, kind="stable")
    best = [int(row) for row in order if gains[row] > 0][:each]
    ascending = np.argsort(gains, kind="stable")
    worst = [int(row) for row in ascending if gains[row] < 0][:each]
    rest = np.setdiff1d(np.arange(len(gains)), [*best, *worst])
    drawn = np.random.default_rng(seed).permutation(rest)[:each]
    return [
        *(Pick(GAIN, row) for row in best),
        *(Pick(LOSS, row) for row in worst),
        *(Pick(RANDOM, int(row)) for row in sorted(drawn)),
    ]


def sample_rule(each: int, seed: int) -> str:
    """Return the rule of `pick_samples` in words."""
    return (
        f"Chosen by rule: the {each} largest gains in reward, the {each} largest losses, "
        f"and {each} of the remaining prompts at random (seed {seed})."
    )


def words(text: str) -> list[str]:
    """Return the lower-case words of a text."""
    return text.lower().split()


def word_counts(texts: Sequence[str]) -> Floats:
    """Return the number of words of each of N texts: [N]."""
    return np.array([len(words(text)) for text in texts], dtype=np.float64)


def distinct_weights(texts: Sequence[str]) -> Floats:
    """Return 1 / (number of texts equal to this one) for each of N texts: [N].

    Texts are equal when their words are. The weights' sum is the number of distinct texts, so their
    mean is the share of distinct texts: a mean over rows, as an interval needs it. A bootstrap must
    resample these weights and not the texts, because drawing a text twice would make a copy of it.
    """
    keys = [" ".join(words(text)) for text in texts]
    copies = Counter(keys)
    return np.array([1 / copies[key] for key in keys], dtype=np.float64)


def distinct_share(texts: Sequence[str]) -> float:
    """Return the share of distinct texts among N: 1 when no two are equal; NaN without texts."""
    return float(distinct_weights(texts).mean()) if texts else float("nan")


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Return the word n-grams of a text, in order."""
    tokens = words(text)
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Return distinct-n: distinct word n-grams over all n-grams of all texts (Li et al., 2016).

    It falls as texts get longer or more, so compare it only between equal numbers of similar texts.
    NaN where no text has n words.
    """
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def repetition(texts: Sequence[str], n: int = 3) -> Floats:
    """Return the share of each text's word n-grams that occurred before in the same text: [N].

    0 for a text of fewer than n words; a text that loops on one phrase comes close to 1.
    """
    shares = []
    for text in texts:
        grams = ngrams(text, n)
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return np.array(shares, dtype=np.float64)
