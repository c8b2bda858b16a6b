"""Results as lines of text, the same for the terminal and the owner's page."""

from __future__ import annotations

import math

from rlhf_exp.evaluation.preference import POWER
from rlhf_exp.evaluation.statistics import Interval
from rlhf_exp.human.results import CriterionResult
from rlhf_exp.human.study import About

Lines = list[tuple[str, str]]


def preference_lines(found: CriterionResult, about: About) -> Lines:
    """Return (name, value) of what the votes on one question say about the models."""
    told = found.preference
    outcome, half = told.outcome, told.ties_as_half
    if outcome.total == 0 or half is None:
        return [("Prompts", "none judged yet")]
    by = f"{found.judged} by people"
    if found.identical:
        by += f", {found.identical} with identical answers, counted as ties"
    at_least = outcome.wins + outcome.ties
    net = 100 * (outcome.wins - outcome.losses) / outcome.total
    lines = [
        ("Prompts", f"{outcome.total} ({by})"),
        (f"{about.name_b} better", _share(outcome.wins, outcome.total)),
        ("Tie", _share(outcome.ties, outcome.total)),
        (f"{about.name_a} better", _share(outcome.losses, outcome.total)),
        (f"{about.name_b} at least as good", _share(at_least, outcome.total)),
        ("Net", f"{net:+.1f} points"),
        ("Exact sign test", f"p = {told.p_value:.3g}, ties left out"),
        ("Win rate among decided", _with(outcome.win_rate, told.win_rate, "Clopper-Pearson")),
        ("Ties as half", _with(half.mean, Interval(half.low, half.high), "bootstrap over prompts")),
    ]
    if told.needed is not None:
        lines.append(
            (
                f"Needed for {100 * POWER:.0f} % power",
                f"{told.needed} decided prompts, about {told.needed_prompts} in all, "
                "if the effect is the one found",
            )
        )
    return lines


def quality_lines(found: CriterionResult) -> Lines:
    """Return (name, value) of what the votes say about the voting."""
    sides = found.sides
    lines = [("Votes", str(found.votes))]
    if len(found.names) > 1:
        lines.append(("Agreement of two annotators", _percent(found.mean_agreement)))
        for pair in found.agreement:
            who = f"{found.names[pair.first]} and {found.names[pair.second]}"
            lines.append((who, f"{_percent(pair.share)} of {pair.both} prompts"))
        lines.append(("Krippendorff's alpha, nominal", _number(found.alpha)))
        lines.append(("Krippendorff's alpha, ordinal", _number(found.alpha_ordinal)))
    if sides.first + sides.second:
        share = _with(sides.share, sides.interval, "Clopper-Pearson")
        lines.append(("Answer A chosen", f"{share}; p = {sides.p_value:.3g} for no side bias"))
    return lines


def _with(value: float, interval: Interval, kind: str) -> str:
    if not math.isfinite(value):
        return "unknown"
    if not math.isfinite(interval.low):
        return f"{value:.3f}"
    return f"{value:.3f} (95 % {interval.low:.3f} to {interval.high:.3f}, {kind})"


def _share(count: int, total: int) -> str:
    return f"{count} ({100 * count / total:.1f} %)"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if math.isfinite(value) else "unknown"


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "unknown"
