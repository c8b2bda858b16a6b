"""Whether the reward deserves trust: tables of its judges, and charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_exp.data.visible import visible
from rlhf_exp.evaluation.metric import DASH, MINUS
from rlhf_exp.evaluation.overoptimisation import BEST_OF
from rlhf_exp.report.numbers import short
from rlhf_exp.report.parts import reward_charts
from rlhf_exp.report.plot import render as draw
from rlhf_exp.report.template import fill

Plain = Mapping[str, Any]

REWARD_QUALITY_FILE = "reward_quality.json"


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
        measures=measures(plain["pairs"]),
        longer=_share(plain["pairs"][0]["length"]["label_longer"]) if plain["pairs"] else "",
        agreement=[(name, _share(one)) for name, one in plain["agreement"].items()],
        referee=about(plain["referee"]),
        models=[model_row(one, plain["judges"][1:]) for one in plain["answers"]],
        steps=[row for path in plain["paths"] for row in step_rows(path, plain["judges"])],
        charts=[draw(chart) for chart in charts],
        pushed=[draw(chart) for chart in pushed],
    )


def print_reward_quality(plain: Plain, console: Console) -> None:
    """Print what held-out pairs and judges say; names are untrusted and put in as text.

    Of a path only what a model was published at, and best-of-n: the report has every snapshot.
    """
    if plain["pairs"]:
        table = Table(title=f"Reward on {plain['pairs'][0]['accuracy']['total']:,} held-out pairs")
        table.add_column("of the pairs")
        for one in plain["pairs"]:
            table.add_column(_text(one["judge"]), justify="right")
        for measure, values in measures(plain["pairs"]):
            table.add_row(measure, *map(_two_lines, values))
        console.print(table)
    shown = [
        row
        for path in plain["paths"]
        for row in step_rows(path, plain["judges"])
        if row["label"] == path["name"] or path["name"] == BEST_OF
    ]
    if shown:
        told = f"Gains over the baseline in its standard deviations, {plain['prompts']} prompts"
        table = Table(title=told)
        for name in ("optimised by", "KL, nats", *(f"by {judge}" for judge in plain["judges"])):
            table.add_column(_text(name), justify="left" if name == "optimised by" else "right")
        for row in shown:
            table.add_row(_text(row["label"]), row["kl"], *map(_two_lines, row["gains"]))
        console.print(table)
    if plain["referee"] is not None:
        console.print(_text(about(plain["referee"])))


def measures(pairs: Sequence[Plain]) -> list[tuple[str, list[str]]]:
    """Return (measure, value by judge) of held-out pairs, in words."""
    lengths = [one["length"] for one in pairs]
    return [
        ("Accuracy", [_share(one["accuracy"]) for one in pairs]),
        ("Accuracy, length held equal", [_percent(one["controlled_accuracy"]) for one in lengths]),
        ("Prefers the longer answer", [_share(one["model_longer"]) for one in lengths]),
        ("Correlation with length, within pairs", [_number(one["within"]) for one in lengths]),
        ("Chosen answer beats a blank one", [_share(one["chosen_over_blank"]) for one in pairs]),
        (
            "Rejected answer beats a blank one",
            [_share(one["rejected_over_blank"]) for one in pairs],
        ),
        ("AUC, across prompts", [f"{one['auc']:.3f}" for one in pairs]),
    ]


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
    facts = [
        f"{name} {referee[name]}" for name in ("seed", "part") if referee.get(name) is not None
    ]
    told = "Referee: " + ", ".join([referee["name"], *facts])
    shared = referee["shared"]
    if shared is None:
        return f"{told}; how many training pairs it shares with the reward model is not known."
    count = "none" if shared == 0 else _percent(shared)
    return f"{told}; trained on {count} of the reward model's training pairs."


def _two_lines(value: str) -> Text:
    """Return a value with its interval below it."""
    return _text(value.replace(" [", "\n["))


def _text(text: str) -> Text:
    return Text(visible(text))


def _share(plain: Plain) -> str:
    if not plain["total"]:
        return DASH
    low, high = plain["interval"]["low"], plain["interval"]["high"]
    return f"{_percent(plain['count'] / plain['total'])} [{_percent(low)}, {_percent(high)}]"


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def _number(value: float | None) -> str:
    # Adding 0 takes the sign of what rounds to nothing.
    return DASH if value is None else f"{round(value, 2) + 0.0:+.2f}".replace("-", MINUS)


def _gain(plain: Plain | None) -> str:
    if plain is None:
        return DASH
    ends = [plain["low"], plain["high"]]
    known = all(end is not None and math.isfinite(end) for end in ends)
    interval = f" [{_number(ends[0])}, {_number(ends[1])}]" if known else ""
    return _number(plain["mean"]) + interval
