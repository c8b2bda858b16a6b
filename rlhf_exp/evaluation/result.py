"""What a quick comparison found: every row and every number, as JSON and as a table.

The rows are kept so that each number can be recomputed without the models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rlhf_exp.evaluation.metric import (
    Metric,
    TableRow,
    estimate_from_json,
    estimate_to_json,
    format_estimate,
    table_row,
)
from rlhf_exp.evaluation.preference import Preference
from rlhf_exp.evaluation.samples import Pick
from rlhf_exp.evaluation.statistics import Estimate, Interval, Outcome


@dataclass(frozen=True)
class PromptRow:
    """One prompt, the answers of both models and what was measured of them.

    `kl_b` is in nats over the whole answer; `outcome` is b's: `win`, `tie` or `loss`. Lengths are
    in tokens, or in words where no token counts were given.
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


@dataclass(frozen=True)
class QuickResult:
    """Model b compared with the baseline a.

    Attributes:
        name_a: the baseline.
        name_b: the other model.
        judge: who gave the scores.
        toxicity_scorer: who gave the toxicities, if anyone.
        level: of every interval.
        seed: of the resampling and of the random samples.
        tie_band: Bradley-Terry probabilities that count as a tie.
        outcome: wins, ties and losses of b.
        win_rate: exact interval of the share of wins among decided comparisons.
        ties_as_half: share of wins, a tie as half of one, with its bootstrap interval.
        p_value: exact two-sided sign test, ties left out.
        gain_in_std: reward difference in standard deviations of the baseline's rewards; `None`
            where these do not vary.
        metrics: means with their intervals.
        rows: one for each prompt.
        picks: rows chosen for the side-by-side table.
        pick_rule: how they were chosen.
        sampling: how answers were sampled, in words; empty where that is not known.
    """

    name_a: str
    name_b: str
    judge: str
    toxicity_scorer: str | None
    level: float
    seed: int
    tie_band: tuple[float, float]
    outcome: Outcome
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
    def preference(self) -> Preference:
        """What the outcomes say, as for any other judge."""
        return Preference(self.outcome, self.p_value, self.win_rate, self.ties_as_half)

    def metric(self, key: str) -> Metric | None:
        """Return the metric of that key, or `None` where it was not measured."""
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
        found: dict[str, float] = {
            "eval/outcome/wins": self.outcome.wins,
            "eval/outcome/ties": self.outcome.ties,
            "eval/outcome/losses": self.outcome.losses,
            "eval/outcome/win_rate": self.outcome.win_rate,
            "eval/outcome/ties_as_half": self.ties_as_half.mean,
            "eval/outcome/p_value": self.p_value,
        }
        if self.gain_in_std is not None:
            found["eval/reward/gain_in_std"] = self.gain_in_std.mean
        for metric in self.metrics:
            for side in ("a", "b", "difference"):
                estimate = getattr(metric, side)
                if estimate is not None:
                    found[f"eval/{metric.key}/{side}"] = estimate.mean
        return {name: float(value) for name, value in found.items() if math.isfinite(value)}

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
    def from_json(cls, plain: Mapping[str, Any]) -> QuickResult:
        """Undo `to_json`."""
        ties_as_half = estimate_from_json(plain["ties_as_half"])
        assert ties_as_half is not None
        values = dict(plain) | {
            "tie_band": tuple(plain["tie_band"]),
            "outcome": Outcome(**plain["outcome"]),
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
