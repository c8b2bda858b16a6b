"""The outcome of an evaluation in a sentence, a bar and a few numbers: the head of a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from rlhf_exp.evaluation.comparison import ACCURACY, ModelComparison
from rlhf_exp.evaluation.preference import (
    DASH,
    MINUS,
    MOST_PAIRS,
    POWER,
    PreferenceResult,
    TableRow,
    format_estimate,
)
from rlhf_exp.evaluation.statistics import LEVEL, Estimate, WinCounts
from rlhf_exp.evaluation.toxicity.summary import is_lexical
from rlhf_exp.report import chart
from rlhf_exp.report.chart import short

FEWEST_PROMPTS = 30
"""Of fewer prompts no winner is named and no difference is marked, whatever a test says."""

JUDGES, PEOPLE_FILE = "judges.json", "people.json"
"""Files of an evaluation: other judges' outcomes, and people's, with the votes of campaigns."""

NO_INDEPENDENT_JUDGE = (
    "No independent judge: eval.judge names one, and people judge by `rlhf-exp annotate`."
)
PEOPLE = "People"
MODEL_JUDGE = "reward model"
_BAR_WIDTH, _BAR_GAP = 1000.0, 3.0


@dataclass(frozen=True)
class Tile:
    """One number to remember: its label, the number, and its interval or context."""

    label: str
    value: str
    detail: str


def verdict_sentence(result: ModelComparison, judge: str | None = None) -> str:
    """Return the outcome by the reward in one sentence, hedged where the test does not decide it.

    Args:
        result: The comparison.
        judge: The sentence's subject; by default the name of what scored.
    """
    judge = judge or f"The {result.judge}"
    names = result.name_a, result.name_b
    return verdict_of(result.outcome, result.p_value, names, judge, result.level)


def verdict_of(
    outcome: WinCounts,
    p_value: float,
    names: tuple[str, str],
    judge: str,
    level: float = LEVEL,
) -> str:
    """Return a judge's outcome of the second of two models against the first, in one sentence.

    Args:
        outcome: Of the second model.
        p_value: Of the sign test.
        names: The two models.
        judge: The sentence's subject.
        level: A winner is named if the test decides at this level, on `FEWEST_PROMPTS` or more.
    """
    first, second = names
    verb = "" if judge == PEOPLE else "s"
    if outcome.decided == 0:
        return f"{judge} prefer{verb} neither {first} nor {second}: {outcome.total} ties."
    if outcome.total < FEWEST_PROMPTS or p_value >= 1 - level:
        few = f"; {outcome.total} prompts are too few to name one"
        return (
            f"{judge} name{verb} no clear winner: {second} {outcome.wins}, {first} "
            f"{outcome.losses}{few if outcome.total < FEWEST_PROMPTS else ''}."
        )
    behind, ahead = names
    if outcome.losses > outcome.wins:
        ahead, behind = behind, ahead
    high, low = max(outcome.wins, outcome.losses), min(outcome.wins, outcome.losses)
    return f"{judge} prefer{verb} {ahead} over {behind}, {high} to {low}."


def reward_as_judge(config: Mapping[str, Any], result: ModelComparison) -> str:
    """Return the reward that decides a comparison, and what the model has to do with it.

    A reward that a policy was trained on says whether training worked, not whether its answers
    are better. So the headline says which it is.

    Args:
        config: The evaluation's config.
        result: The comparison.
    """
    model, judge = result.name_b, result.judge
    role = model.lower()
    trained = model == role.upper() and role in config.get("eval", {}).get("models", ())
    if not trained or config.get(role, {}).get("use") is not None:
        return f"The {judge}"
    if role == "ppo":
        return "The reward that PPO was trained on"
    if role == "dpo":
        if judge == MODEL_JUDGE and config["reward"].get("use") is None:
            return "A reward model of the preferences that DPO was trained on"
        return f"The {judge}, on which DPO was not trained,"
    return f"The {judge}"


def independent_verdicts(
    config: Mapping[str, Any], result: ModelComparison, parts: Mapping[str, Any]
) -> list[str]:
    """Return a sentence for each judge that the model was not trained on; empty without any.

    Args:
        config: The evaluation's config.
        result: The comparison.
        parts: The JSON value of each further file that the evaluation left, by its name.
    """
    names = result.name_a, result.name_b
    sentences = []
    judge_model = config.get("eval", {}).get("judge", {}).get("model")
    judged = (parts.get(JUDGES) or {}).get("comparisons", ())
    for comparison in judged:
        if (comparison["a"], comparison["b"]) != names:
            continue
        for judge in comparison["judges"]:
            # A reward model that scored in training may be named as the judge, too.
            same = judge["kind"] == "model" and judge_model in _given_rewards(config)
            if judge["kind"] != "reward" and not same:
                preference = judge["preference"]
                counts = (preference[name] for name in ("wins", "ties", "losses"))
                outcome = WinCounts(*counts)
                sentences.append(
                    verdict_of(outcome, preference["p_value"], names, judge["judge"], result.level)
                )
    for campaign in (parts.get(PEOPLE_FILE) or {}).get("studies", ()):
        for criterion in campaign["criteria"] if tuple(campaign["names"]) == names else ():
            outcome = WinCounts(criterion["wins"], criterion["ties"], criterion["losses"])
            if outcome.total:
                sentence = verdict_of(outcome, criterion["p_value"], names, PEOPLE, result.level)
                sentences.append(f"{sentence[:-1]} ({criterion['criterion']}).")
    gold = result.metric("gold")
    if gold is not None and gold.a is not None and gold.b is not None:
        sure = result.outcome.total >= FEWEST_PROMPTS
        words = {"better": "higher", "worse": "lower"}.get(gold.verdict if sure else "")
        sentences.append(
            f"The data's rule-based judge, on which nothing was trained: {result.name_b} "
            f"{gold.b.mean:.2f}, {result.name_a} {gold.a.mean:.2f} "
            f"({words or 'no clear difference'})."
        )
    return sentences


def _given_rewards(config: Mapping[str, Any]) -> set[str | None]:
    """Return the given reward models that score in training: alone, or as terms of a sum."""
    found = {config["reward"].get("use")}
    for term in config["ppo"].get("reward", {}).get("terms") or ():
        found |= {term.get("model"), *(term.get("models") or ())}
    return found


def marked_rows(result: ModelComparison) -> list[TableRow]:
    """Return the numbers in words; of few prompts no difference is called better or worse."""
    if result.outcome.total >= FEWEST_PROMPTS:
        return result.table()
    return [
        replace(row, verdict="unclear" if row.verdict else row.verdict) for row in result.table()
    ]


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
