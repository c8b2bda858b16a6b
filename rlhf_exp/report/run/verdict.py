"""The outcome of an evaluation in a sentence, a bar and a few numbers: the head of a report."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from rlhf_exp.evaluation.comparison import ACCURACY, ModelComparison
from rlhf_exp.evaluation.preference import (
    DASH,
    MINUS,
    MOST_PAIRS,
    POWER,
    PreferenceResult,
    format_estimate,
)
from rlhf_exp.evaluation.statistics import LEVEL, Estimate, WinCounts
from rlhf_exp.evaluation.toxicity.summary import is_lexical
from rlhf_exp.report import chart
from rlhf_exp.report.chart import short

_BAR_WIDTH, _BAR_GAP = 1000.0, 3.0


@dataclass(frozen=True)
class Tile:
    """One number to remember: its label, the number, and its interval or context."""

    label: str
    value: str
    detail: str


def verdict_sentence(result: ModelComparison) -> str:
    """Return the outcome in one sentence, hedged where the test does not decide it."""
    return verdict_of(result.outcome, result.p_value, (result.name_a, result.name_b), result.level)


def verdict_of(
    outcome: WinCounts, p_value: float, names: tuple[str, str], level: float = LEVEL
) -> str:
    """Return the outcome of the second of two models against the first, in one sentence."""
    if outcome.decided == 0:
        return f"{names[0]} and {names[1]} tie on all {outcome.total} prompts."
    if p_value >= 1 - level:
        return f"No clear winner between {names[0]} and {names[1]}."
    behind, ahead = names
    if outcome.losses > outcome.wins:
        ahead, behind = behind, ahead
    return f"{ahead} is preferred over {behind}."


def p_label(value: float) -> str:
    """Write a p-value: three decimals, a power of ten when small."""
    if value >= 0.001:
        return f"p\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{value:.3f}"
    power = f"{value:.0e}".replace("e-0", "e-").replace("-", MINUS)
    return f"p\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{power}"


def needed_label(preference: PreferenceResult) -> str:
    """Return the number of prompts needed to detect the win rate measured; empty if all tie."""
    if preference.outcome.decided == 0:
        return ""
    power = f"{100 * POWER:.0f}\N{NO-BREAK SPACE}% power"
    if preference.needed is None:
        return f"{power} at this win rate would take more than {MOST_PAIRS:,} decided prompts"
    return (
        f"{power} at this win rate takes {preference.needed:,} decided prompts, "
        f"about {preference.needed_prompts:,} in all"
    )


def tiles_of(result: ModelComparison) -> list[Tile]:
    """Return the numbers that head the page."""
    outcome = result.outcome
    rate, ends = DASH, "nothing decided"
    if outcome.decided:
        rate = _percent(outcome.win_rate)
        low, high = _percent(result.win_rate.low), _percent(result.win_rate.high)
        ends = f"{low} to {high}; {p_label(result.p_value)}"
    tiles = [Tile(f"{result.name_b} wins, of decided", rate, ends)]
    if result.gain_in_std is not None:
        unit = f"in {result.name_a} std"
        tiles.append(_estimate_tile("Reward gain", result.gain_in_std, unit, signed=True))
    labels = {"kl_sequence": "KL per answer", "gold": "Gold judge", ACCURACY: "Accuracy"}
    labels["toxicity"] = "Toxicity"
    for key, label in labels.items():
        metric = result.metric(key)
        if metric is not None and metric.b is not None:
            unit = "nats" if metric.a is None else f"{result.name_a} {short(metric.a.mean)}"
            tiles.append(_estimate_tile(label, metric.b, unit))
    return tiles


def toxicity_note(result: ModelComparison) -> str:
    """Return a sentence on the toxicity scorer after a space; empty without one."""
    if result.toxicity_scorer is None:
        return ""
    how = "a lexical guess" if is_lexical(result.toxicity_scorer) else "scored"
    return f" Toxicity is {how} by {result.toxicity_scorer}."


def outcome_bar(result: ModelComparison) -> Markup:
    """Return wins, ties and losses as one bar, widths in proportion."""
    return bar_of(result.outcome, result.name_b)


def bar_of(outcome: WinCounts, name: str) -> Markup:
    """Return the outcomes of a model, at least one comparison, as one bar."""
    left, parts = 0.0, []
    for kind, count in (("win", outcome.wins), ("tie", outcome.ties), ("loss", outcome.losses)):
        width = _BAR_WIDTH * count / outcome.total
        if count:
            title = chart.element("title", f"{kind}: {count} of {outcome.total}")
            gap = 0 if left + width >= _BAR_WIDTH - 1e-6 else _BAR_GAP
            place = {"x": left, "y": 0, "width": max(1.0, width - gap), "height": 30}
            parts.append(chart.element("rect", title, class_=kind, **place))
        left += width
    words = f"{outcome.wins} wins, {outcome.ties} ties, {outcome.losses} losses of {name}"
    return chart.element(
        "svg",
        chart.element("title", words),
        *parts,
        viewBox=f"0 0 {_BAR_WIDTH:.0f} 30",
        preserveAspectRatio="none",
        role="img",
        class_="bar",
    )


def _estimate_tile(label: str, estimate: Estimate, unit: str, *, signed: bool = False) -> Tile:
    mean, _, interval = format_estimate(estimate, signed=signed).partition(" [")
    ends = interval.rstrip("]").replace(", ", " to ")
    return Tile(label, mean, "; ".join(part for part in (ends, unit) if part))


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"
