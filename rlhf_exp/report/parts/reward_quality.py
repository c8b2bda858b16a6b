"""Whether the reward deserves trust: tables of its judges, and charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from rlhf_exp.evaluation.metric import DASH
from rlhf_exp.report.numbers import short
from rlhf_exp.report.parts import reward_charts
from rlhf_exp.report.plot import render as draw
from rlhf_exp.report.template import fill

Plain = Mapping[str, Any]


def render(plain: Plain) -> Markup:
    """Return the section's content.

    Args:
        plain: What the reward-quality part left in its file.
    """
    charts = [
        *reward_charts.of_pairs(plain["pairs"]),
        reward_charts.spread(plain["distributions"]),
        reward_charts.lengths(plain["answers"]),
    ]
    pushed = [reward_charts.against_kl(path) for path in plain["paths"]]
    return fill(
        "parts/reward_quality.html",
        plain=plain,
        judges=[judge_row(one) for one in plain["pairs"]],
        agreement=[(name, _share(one)) for name, one in plain["agreement"].items()],
        referee=about(plain["referee"]),
        models=[model_row(one, plain["judges"][1:]) for one in plain["answers"]],
        steps=[row for path in plain["paths"] for row in step_rows(path, plain["judges"])],
        charts=[draw(chart) for chart in charts],
        pushed=[draw(chart) for chart in pushed],
    )


def judge_row(plain: Plain) -> dict[str, str]:
    """Return what held-out pairs say of one judge, in words."""
    length = plain["length"]
    return {
        "judge": plain["judge"],
        "accuracy": _share(plain["accuracy"]),
        "controlled": _percent(length["controlled_accuracy"]),
        "auc": short(plain["auc"]),
        "within": _number(length["within"]),
        "model_longer": _share(length["model_longer"]),
        "label_longer": _share(length["label_longer"]),
        "chosen": _share(plain["chosen_over_blank"]),
        "rejected": _share(plain["rejected_over_blank"]),
        "error": short(plain["calibration"]["error"]),
    }


def model_row(plain: Plain, judges: Sequence[str]) -> dict[str, Any]:
    """Return how a model's answers are judged, in words."""
    return {
        "model": plain["model"],
        "tokens": short(plain["tokens"]),
        "length": _number(plain["length_spearman"]),
        "judges": [_number(plain["judges_spearman"][name]) for name in judges],
    }


def step_rows(path: Plain, judges: Sequence[str]) -> list[dict[str, Any]]:
    """Return the gains of each point of a path, in words; a judge without a gain has a dash."""
    return [
        {
            "label": point["label"],
            "kl": short(point["kl"]),
            "gains": [_gain(point["gains"].get(name)) for name in judges],
        }
        for point in path["points"]
    ]


def about(referee: Plain | None) -> str:
    """Return in one sentence how far the referee stands from the reward model."""
    if referee is None:
        return ""
    told = f"The referee is {referee['name']}"
    facts = [
        f"{name} {referee[name]}" for name in ("seed", "part") if referee.get(name) is not None
    ]
    told += f" ({', '.join(facts)})" if facts else ""
    shared = referee["shared"]
    if shared is None:
        return f"{told}; how many training pairs it shares with the reward model is not known."
    if shared == 0:
        return f"{told}; it was trained on none of the reward model's training pairs."
    return (
        f"{told}; it was also trained on {_percent(shared)} of the reward model's training pairs."
    )


def _share(plain: Plain) -> str:
    if not plain["total"]:
        return DASH
    low, high = plain["interval"]["low"], plain["interval"]["high"]
    return f"{_percent(plain['count'] / plain['total'])} [{_percent(low)}, {_percent(high)}]"


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def _number(value: float | None) -> str:
    return DASH if value is None else f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def _gain(plain: Plain | None) -> str:
    if plain is None:
        return DASH
    ends = [plain["low"], plain["high"]]
    known = all(end is not None and math.isfinite(end) for end in ends)
    interval = f" [{_number(ends[0])}, {_number(ends[1])}]" if known else ""
    return _number(plain["mean"]) + interval
