"""Judgments as `judges.json` holds them, and the agreement of judges with people.

People do not agree with each other either, and no judge can be expected to do better: so the share
of one person's judgments that a judge shares stands beside the share that a second person shares.

People's judgments are read from JSON lines, a JSON list, or gzip of either, in any of these forms:

- votes as `rlhf-exp annotate --export jsonl` writes them: `prompt`, `answer_a`, `answer_b`,
  `winner` (`a`, `tie` or `b`), and `annotator` where there are several; one line a vote;
- several annotators in one row, as in PandaLM's test set: `instruction`, `input`, `response1`,
  `response2`, and `annotator1`, `annotator2`, ... with 0 for a tie, 1 or 2;
- preference data: `chosen` and `rejected`, with or without `prompt`. Which one is shown as a is
  drawn by a hash of the texts, because a judge must not be right by always saying the same.

Legend: N pairs, R people.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf_exp.data.jsonl import UnreadableLine, parse_json, read_jsonl, unpaired_surrogate
from rlhf_exp.data.layouts import parse_row
from rlhf_exp.data.parsing import format_dialogue
from rlhf_exp.data.rows import Preference
from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.agreement import (
    cohen_kappa,
    coincidences,
    confusions,
    majority,
    nominal_alpha,
)
from rlhf_exp.evaluation.judges.llm import TokenUsage, consistent_pairs, first_place_bias
from rlhf_exp.evaluation.judges.protocol import AnswerPair, Verdict
from rlhf_exp.evaluation.preference import (
    PreferenceResult,
    estimate_from_json,
    estimate_to_json,
    summarise_preference,
)
from rlhf_exp.evaluation.statistics import LEVEL, Estimate, estimate_from_sums

Floats = NDArray[np.float64]
_WINNERS = {"a": -1.0, "tie": 0.0, "b": 1.0}
_NUMBERS = {0: 0.0, 1: -1.0, 2: 1.0}
_ANNOTATOR = re.compile(r"annotator_?\d+")
_FORMS = (
    "prompt, answer_a, answer_b and winner; or instruction, response1, response2 and annotator1, "
    "...; or chosen and rejected"
)
_ESTIMATES = ("agreement", "decided", "kappa", "alpha", "with_one")


@dataclass(frozen=True)
class Judgment:
    """One judge's verdicts on the answers of two models to N prompts.

    Attributes:
        kind: `reward`, `model` or `llm`.
        judge: the judge's name.
        verdicts: [N] verdicts.
        preference: their summary.
        usage: a language model's requests and tokens.
    """

    kind: str
    judge: str
    verdicts: tuple[Verdict, ...]
    preference: PreferenceResult
    usage: TokenUsage | None = None

    @classmethod
    def of(
        cls,
        kind: str,
        judge: str,
        verdicts: Sequence[Verdict],
        seed: int = 0,
        level: float = LEVEL,
        usage: TokenUsage | None = None,
    ) -> Judgment:
        """Summarise verdicts."""
        summary = summarise_preference([verdict.sign for verdict in verdicts], None, seed, level)
        return cls(kind, judge, tuple(verdicts), summary, usage)

    @property
    def signs(self) -> list[int]:
        """The verdicts as signs [N]."""
        return [verdict.sign for verdict in self.verdicts]

    def scalars(self) -> dict[str, float]:
        """Return the main numbers under short names, for trackers."""
        summary = self.preference
        half = summary.ties_as_half
        scalars: dict[str, float] = {
            "wins": summary.outcome.wins,
            "ties": summary.outcome.ties,
            "losses": summary.outcome.losses,
            "p_value": summary.p_value,
        }
        if summary.outcome.decided:
            scalars["win_rate"] = summary.outcome.win_rate
        if half is not None:
            scalars["ties_as_half"] = half.mean
        if self.usage is not None:
            scalars["tokens"] = self.usage.prompt_tokens + self.usage.completion_tokens
            scalars["unparsed"] = self.usage.unparsed
            bias, (same, both) = first_place_bias(self.verdicts), consistent_pairs(self.verdicts)
            if bias.first + bias.second:
                scalars["first_place"] = bias.share
            if both:
                scalars["consistent"] = same / both
        return {name: float(value) for name, value in scalars.items()}

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        plain: dict[str, Any] = {
            "kind": self.kind,
            "judge": self.judge,
            "preference": preference_to_json(self.preference),
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
        }
        if self.usage is not None:
            same, both = consistent_pairs(self.verdicts)
            bias = first_place_bias(self.verdicts)
            plain["llm"] = {
                "usage": asdict(self.usage),
                "consistent": same,
                "read": both,
                "first_place": {
                    "first": bias.first,
                    "second": bias.second,
                    "p_value": bias.p_value,
                    "interval": asdict(bias.interval),
                },
            }
        return plain


def preference_to_json(summary: PreferenceResult) -> dict[str, Any]:
    """Return plain values."""
    return {
        "wins": summary.outcome.wins,
        "ties": summary.outcome.ties,
        "losses": summary.outcome.losses,
        "p_value": summary.p_value,
        "win_rate": summary.outcome.win_rate if summary.outcome.decided else None,
        "win_rate_interval": asdict(summary.win_rate),
        "ties_as_half": estimate_to_json(summary.ties_as_half),
        "needed": summary.needed,
        "needed_prompts": summary.needed_prompts,
    }


def compare_judges(judgments: Sequence[Judgment], seed: int = 0) -> list[dict[str, Any]]:
    """Return the agreement of every two judges, the first in the place of the people."""
    return [
        {
            "first": first.judge,
            **judge_quality(second.judge, second.signs, _as_ratings(first), seed).to_json(),
        }
        for first, second in combinations(judgments, 2)
    ]


def against_people(
    comparison: Mapping[str, Any], ratings: ArrayLike, seed: int = 0, level: float = LEVEL
) -> list[JudgeQuality]:
    """Return the agreement of each judge of a run with people who judged the same answers.

    Args:
        comparison: one of the `comparisons` of a `judges.json`.
        ratings: [N, R] people's signs, rows in the order of the verdicts, NaN where there is none.
        seed: seed of the bootstrap.
        level: confidence level of the intervals.
    """
    return [
        judge_quality(judge["judge"], [v["sign"] for v in judge["verdicts"]], ratings, seed, level)
        for judge in comparison["judges"]
    ]


def _as_ratings(judgment: Judgment) -> list[list[float]]:
    return [[float(sign)] for sign in judgment.signs]


@dataclass(frozen=True)
class HumanAgreement:
    """The agreement of people with each other; the interval of each number is over pairs.

    Attributes:
        pairs: number of pairs that anyone judged.
        annotators: names of the people.
        counts: numbers of pairs that a majority gives to a, to neither, and to b.
        agreement: share of equal judgments of two people, over all two of them; `None` where no
            pair was judged twice.
        alpha: Krippendorff's nominal alpha; likewise.
    """

    pairs: int
    annotators: tuple[str, ...]
    counts: tuple[int, int, int]
    agreement: Estimate | None
    alpha: Estimate | None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "pairs": self.pairs,
            "annotators": list(self.annotators),
            "counts": list(self.counts),
            "agreement": estimate_to_json(self.agreement),
            "alpha": estimate_to_json(self.alpha),
        }

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> HumanAgreement:
        """Undo `to_json`."""
        a, tie, b = plain["counts"]
        return cls(
            plain["pairs"],
            tuple(plain["annotators"]),
            (a, tie, b),
            estimate_from_json(plain["agreement"]),
            estimate_from_json(plain["alpha"]),
        )


def people_agreement(
    ratings: ArrayLike, annotators: Sequence[str], seed: int = 0, level: float = LEVEL
) -> HumanAgreement:
    """Return the agreement of people with each other.

    Args:
        ratings: [N, R] signs, NaN where there is no judgment.
        annotators: names of the R people.
        seed: seed of the bootstrap.
        level: confidence level of the intervals.
    """
    table = _judged_rows(ratings)
    verdicts = majority(table)
    pair_counts = coincidences(table)
    agreement = alpha = None
    if pair_counts.any():
        equal, both = _equal_pairs(table)
        agreement = _share(equal, both, seed, level)
        alpha = _estimate_from_matrices(pair_counts, nominal_alpha, seed, level)
    a, tie, b = (int((verdicts == sign).sum()) for sign in (-1, 0, 1))
    return HumanAgreement(len(table), tuple(annotators), (a, tie, b), agreement, alpha)


@dataclass(frozen=True)
class JudgeQuality:
    """The agreement of a judge with people; the interval of each number is over pairs.

    Attributes:
        judge: its name.
        pairs: number of pairs that the judge and people judged.
        confusion: [3][3] numbers of pairs; rows are the majority's a, tie and b, columns the
            judge's.
        agreement: share of pairs with one verdict of judge and majority, ties included.
        decided: the same among pairs that neither calls a tie; `None` where there are none.
        kappa: Cohen's, of judge and majority.
        alpha: Krippendorff's nominal alpha, of judge and majority.
        with_one: share of single people's judgments that the judge shares: to be compared with
            `HumanAgreement.agreement`.
    """

    judge: str
    pairs: int
    confusion: tuple[tuple[int, ...], ...]
    agreement: Estimate
    decided: Estimate | None
    kappa: Estimate
    alpha: Estimate
    with_one: Estimate

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        plain: dict[str, Any] = {
            "judge": self.judge,
            "pairs": self.pairs,
            "confusion": [list(row) for row in self.confusion],
        }
        return plain | {name: estimate_to_json(getattr(self, name)) for name in _ESTIMATES}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> JudgeQuality:
        """Undo `to_json`."""
        estimates = {name: estimate_from_json(plain[name]) for name in _ESTIMATES}
        confusion = tuple(tuple(row) for row in plain["confusion"])
        return cls(plain["judge"], plain["pairs"], confusion, **estimates)  # type: ignore[arg-type]


def judge_quality(
    judge: str, signs: ArrayLike, ratings: ArrayLike, seed: int = 0, level: float = LEVEL
) -> JudgeQuality:
    """Return the agreement of a judge with people.

    Args:
        judge: its name.
        signs: [N] its verdicts: 1 where b is preferred, 0 for a tie, -1 for a.
        ratings: [N, R] people's signs, NaN where there is no judgment; pairs that nobody judged
            are left out.
        seed: seed of the bootstrap.
        level: confidence level of the intervals.
    """
    everything = np.asarray(ratings, dtype=np.float64)
    judged = (~np.isnan(everything)).any(axis=1)
    table, judge_signs = everything[judged], np.asarray(signs, dtype=np.int64)[judged]
    matrices = confusions(majority(table), judge_signs)
    total = matrices.sum(axis=0)
    decided = total[0, 0] + total[0, 2] + total[2, 0] + total[2, 2] > 0
    known = ~np.isnan(table)
    equal = ((table == judge_signs[:, None]) & known).sum(axis=1)
    return JudgeQuality(
        judge=judge,
        pairs=len(table),
        confusion=tuple(tuple(int(count) for count in row) for row in total),
        agreement=_estimate_from_matrices(matrices, _equal_share, seed, level),
        decided=_estimate_from_matrices(matrices, _decided_share, seed, level) if decided else None,
        kappa=_estimate_from_matrices(matrices, cohen_kappa, seed, level),
        alpha=_estimate_from_matrices(
            matrices + matrices.swapaxes(1, 2), nominal_alpha, seed, level
        ),
        with_one=_share(equal, known.sum(axis=1), seed, level),
    )


def _judged_rows(ratings: ArrayLike) -> Floats:
    table = np.asarray(ratings, dtype=np.float64)
    return table[(~np.isnan(table)).any(axis=1)]


def _equal_pairs(table: Floats) -> tuple[Floats, Floats]:
    """Return, for each item, the numbers of pairs of people who agree, and who judged it."""
    equal, both = np.zeros(len(table)), np.zeros(len(table))
    for first, second in combinations(range(table.shape[1]), 2):
        left, right = table[:, first], table[:, second]
        equal += left == right
        both += ~np.isnan(left) & ~np.isnan(right)
    return equal, both


def _share(parts: ArrayLike, wholes: ArrayLike, seed: int, level: float) -> Estimate:
    columns = np.stack([np.asarray(parts), np.asarray(wholes)], axis=1)
    return estimate_from_sums(columns, lambda sums: sums[:, 0] / sums[:, 1], seed, level)


def _estimate_from_matrices(
    matrices: Floats,
    statistic: Any,  # noqa: ANN401 - [..., 3, 3] to [...]
    seed: int,
    level: float,
) -> Estimate:
    def of_sums(sums: Floats) -> Floats:
        values: Floats = statistic(sums.reshape(-1, 3, 3))
        return values

    return estimate_from_sums(matrices.reshape(len(matrices), 9), of_sums, seed, level)


def _equal_share(confusion: Floats) -> Floats:
    values: Floats = np.trace(confusion, axis1=-2, axis2=-1) / confusion.sum(axis=(-2, -1))
    return values


def _decided_share(confusion: Floats) -> Floats:
    right = confusion[..., 0, 0] + confusion[..., 2, 2]
    values: Floats = right / (right + confusion[..., 0, 2] + confusion[..., 2, 0])
    return values


@dataclass(frozen=True)
class JudgedPairs:
    """N pairs that R people have judged.

    Attributes:
        pairs: prompts with two answers.
        ratings: [N, R] signs: 1 where b was preferred, 0 for a tie, -1 for a, NaN for no judgment.
        annotators: the names of the R people.
        unusable: rows of preference data that are no pair of answers to one prompt.
        criterion: the question whose votes these are; `None` if the file names none.
        other_criteria: the file's further questions, whose votes are left out.
    """

    pairs: tuple[AnswerPair, ...]
    ratings: NDArray[np.float64]
    annotators: tuple[str, ...]
    unusable: int = 0
    criterion: str | None = None
    other_criteria: tuple[str, ...] = ()

    def first(self, count: int | None) -> JudgedPairs:
        """Return the first `count` pairs; all of them for `None`."""
        pairs = self.pairs[:count]
        return replace(self, pairs=pairs, ratings=self.ratings[: len(pairs)])

    @property
    def question(self) -> str:
        """The question in words, with those left out; empty if the file names none."""
        if self.criterion is None or not self.other_criteria:
            return self.criterion or ""
        return f"{self.criterion}; the file also has {', '.join(self.other_criteria)}"


def read_judged_pairs(path: Path, option: str, criterion: str | None = None) -> JudgedPairs:
    """Read a file of judged pairs.

    Args:
        path: the file.
        option: the config key or option that named it, for errors.
        criterion: the question whose votes count, if there are several; by default the first found.

    Raises:
        UserError: the file cannot be read, a row has an unknown form, or no vote is on `criterion`.
    """
    criteria: dict[str, None] = {}
    votes: dict[tuple[AnswerPair, str], dict[str, float]] = {}
    unusable = 0
    for origin, record in _read_records(path, option):
        if isinstance(record, UnreadableLine):
            raise UserError(f"{origin}: {record.reason}")
        if not isinstance(record, Mapping):
            raise UserError(f"{origin}: found {type(record).__name__}; expected {_FORMS}")
        if "criterion" in record:
            name = str(record["criterion"])
            criteria[name] = None
            criterion = criterion or name
            if name != criterion:
                continue
        if "chosen" in record and "rejected" in record:
            row_votes = _preference_of_row(record, origin)
            unusable += row_votes is None
        else:
            row_votes = _votes_of_row(record, origin)
        if row_votes is not None:
            pair, signs = row_votes
            # Votes on one pair stand on several lines; any other row is a pair of its own.
            row_key = "" if "winner" in record else origin
            votes.setdefault((pair, row_key), {}).update(signs)
    if not votes:
        about = f" on {criterion!r}" if criterion else ""
        has = f"; it has votes on {', '.join(criteria)}" if criteria else ""
        raise UserError(f"{option}: {path} has no judged pairs{about}{has}; expected {_FORMS}")
    if criterion is not None and criterion not in criteria:
        raise UserError(f"{option}: {path} names no questions, so none can be {criterion!r}")
    names = sorted({name for signs in votes.values() for name in signs}, key=_natural_order)
    ratings = [[signs.get(name, np.nan) for name in names] for signs in votes.values()]
    others = tuple(name for name in criteria if name != criterion)
    pairs = tuple(pair for pair, _ in votes)
    return JudgedPairs(pairs, np.array(ratings), tuple(names), unusable, criterion, others)


def _read_records(path: Path, option: str) -> Iterator[tuple[str, object]]:
    if path.is_file():
        try:
            with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as handle:
                start = handle.read(100).lstrip()
                if start.startswith(b"["):
                    handle.seek(0)
                    content: Any = parse_json(handle.read().decode("utf-8-sig"))
                    rows = enumerate(content, 1)
                    yield from ((f"{path}: row {number}", row) for number, row in rows)
                    return
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise UserError(f"{option}: {path} cannot be read: {error}") from error
    yield from read_jsonl(path, option)


def _votes_of_row(record: Mapping[str, Any], origin: str) -> tuple[AnswerPair, dict[str, float]]:
    try:
        if "winner" in record:
            texts = [record[name] for name in ("prompt", "answer_a", "answer_b")]
            signs = {str(record.get("annotator", "annotator")): _WINNERS[record["winner"]]}
        else:
            parts = [record["instruction"], record.get("input") or ""]
            prompt = "\n\n".join(text.strip() for text in parts if text.strip())
            texts = [prompt, *(_text_of_cell(record[name]) for name in ("response1", "response2"))]
            names = [name for name in record if _ANNOTATOR.fullmatch(name)]
            signs = {n: _NUMBERS[record[n]] for n in names if record[n] is not None}
    except (KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{origin}: {type(error).__name__} {error}; expected {_FORMS}") from error
    if not signs or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{origin}: a text or the judgment is missing; expected {_FORMS}")
    if half := next(filter(None, map(unpaired_surrogate, texts)), None):
        raise UserError(f"{origin}: a text holds half of a character ({half}); mend or remove it")
    return AnswerPair(*texts), signs


def _preference_of_row(
    record: Mapping[str, Any], origin: str
) -> tuple[AnswerPair, dict[str, float]] | None:
    try:
        row = parse_row(record, origin)
    except ValueError:
        return None
    assert isinstance(row, Preference)
    texts = [format_dialogue(row.history), *sorted((row.chosen, row.rejected))]
    b_is_chosen = hashlib.sha256(json.dumps(texts).encode()).digest()[0] & 1 == 1
    answers = (row.rejected, row.chosen) if b_is_chosen else (row.chosen, row.rejected)
    return AnswerPair(texts[0], *answers), {"annotator": 1.0 if b_is_chosen else -1.0}


def _text_of_cell(value: object) -> object:
    """Return the text that a spreadsheet took for a number or a truth value."""
    return str(value) if isinstance(value, bool | int | float) else value


def _natural_order(name: str) -> tuple[str, int]:
    """Sort annotator10 after annotator9."""
    letters = name.rstrip("0123456789")
    return letters, int(name[len(letters) :] or 0)
