"""The reward-quality section: tables and charts on whether the reward deserves trust."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_exp.evaluation.overoptimisation import BEST_OF
from rlhf_exp.evaluation.preference import DASH, MINUS
from rlhf_exp.report.chart import Chart, Floats, LineSeries, short
from rlhf_exp.report.chart import render as draw
from rlhf_exp.report.template import fill
from rlhf_exp.safe_text import visible


def _margin(plain: Plain, colour: int) -> LineSeries:
    right, accuracy = (
        [margin_bin["right"] for margin_bin in plain["margin_bins"]],
        plain["accuracy"],
    )
    shares = np.array([share["count"] / share["total"] for share in right])
    ends = [share["interval"] for share in right]
    return LineSeries(
        plain["judge"],
        np.arange(1.0, len(right) + 1),
        shares,
        colour,
        smooth=False,
        unit="fifth",
        whiskers=(_column(ends, "low"), _column(ends, "high")),
        last=f"{100 * accuracy['count'] / accuracy['total']:.1f} %",
    )


def _calibration(plain: Plain, colour: int) -> LineSeries:
    bins = plain["calibration"]["bins"]
    last = f"error {plain['calibration']['error']:.3f}"
    x, y = _column(bins, "predicted"), _column(bins, "observed")
    return LineSeries(plain["judge"], x, y, colour, smooth=False, unit="predicted", last=last)


def _from_zero(rows: Sequence[Plain], name: str) -> Floats:
    """Return a field of each row after a 0 for the start: [N + 1]."""
    return np.concatenate([[0.0], _column(rows, name)])


def _column(rows: Sequence[Plain], name: str) -> Floats:
    """Return a field of each row [N]; NaN where there is none."""
    return np.array([row[name] for row in rows], dtype=np.float64)


Plain = Mapping[str, Any]

REWARD_QUALITY_FILE = "reward_quality.json"
COLOURS = 4


def render(plain: Plain) -> Markup:
    """Return the section's content.

    Args:
        plain: The file of the reward-quality part.
    """
    charts = [
        *pair_charts(plain["pairs"]),
        score_distributions(plain["distributions"]),
        score_by_length(plain["answers"]),
    ]
    pushed = [gains_against_kl(path) for path in plain["paths"]]
    return fill(
        "run/reward_quality.html",
        plain=plain,
        measures=measures(plain["pairs"]),
        longer=_share(plain["pairs"][0]["length"]["label_longer"]) if plain["pairs"] else "",
        agreement=[(name, _share(entry)) for name, entry in plain["agreement"].items()],
        referee=referee_sentence(plain["referee"]),
        models=[model_row(entry, plain["judges"][1:]) for entry in plain["answers"]],
        steps=[row for path in plain["paths"] for row in step_rows(path, plain["judges"])],
        charts=[draw(chart) for chart in charts],
        pushed=[draw(chart) for chart in pushed],
    )


def print_reward_quality(plain: Plain, console: Console) -> None:
    """Print the tables of held-out pairs and of gains; names are untrusted and put in as text.

    Of a path only the published model, and best-of-n: the report has every snapshot.
    """
    if plain["pairs"]:
        table = Table(title=f"Reward on {plain['pairs'][0]['accuracy']['total']:,} held-out pairs")
        table.add_column("of the pairs")
        for pair_quality in plain["pairs"]:
            table.add_column(_text(pair_quality["judge"]), justify="right")
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
        title = f"Gains over the baseline in its standard deviations, {plain['prompts']} prompts"
        table = Table(title=title)
        for name in ("optimised by", "KL, nats", *(f"by {judge}" for judge in plain["judges"])):
            table.add_column(_text(name), justify="left" if name == "optimised by" else "right")
        for row in shown:
            table.add_row(_text(row["label"]), row["kl"], *map(_two_lines, row["gains"]))
        console.print(table)
    if plain["referee"] is not None:
        console.print(_text(referee_sentence(plain["referee"])))


def measures(pairs: Sequence[Plain]) -> list[tuple[str, list[str]]]:
    """Return (measure, value by judge) of held-out pairs, in words."""
    lengths = [entry["length"] for entry in pairs]
    return [
        ("Accuracy", [_share(entry["accuracy"]) for entry in pairs]),
        (
            "Accuracy, length held equal",
            [_percent(entry["controlled_accuracy"]) for entry in lengths],
        ),
        ("Prefers the longer answer", [_share(entry["model_longer"]) for entry in lengths]),
        ("Correlation with length, within pairs", [_number(entry["within"]) for entry in lengths]),
        (
            "Chosen answer beats a blank one",
            [_share(entry["chosen_over_blank"]) for entry in pairs],
        ),
        (
            "Rejected answer beats a blank one",
            [_share(entry["rejected_over_blank"]) for entry in pairs],
        ),
        ("AUC, across prompts", [f"{entry['auc']:.3f}" for entry in pairs]),
    ]


def model_row(plain: Plain, judges: Sequence[str]) -> dict[str, Any]:
    """Return the row of a model's answers, in words."""
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


def referee_sentence(referee: Plain | None) -> str:
    """Return the referee's independence of the reward model in one sentence."""
    if referee is None:
        return ""
    facts = [
        f"{name} {referee[name]}" for name in ("seed", "part") if referee.get(name) is not None
    ]
    referee_is = "Referee: " + ", ".join([referee["name"], *facts])
    shared = referee["shared"]
    if shared is None:
        return (
            f"{referee_is}; how many training pairs it shares with the reward model is not known."
        )
    count = "none" if shared == 0 else _percent(shared)
    return f"{referee_is}; trained on {count} of the reward model's training pairs."


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
    # Adding 0 removes the sign of a number that rounds to zero.
    return DASH if value is None else f"{round(value, 2) + 0.0:+.2f}".replace("-", MINUS)


def _gain(plain: Plain | None) -> str:
    if plain is None:
        return DASH
    ends = [plain["low"], plain["high"]]
    known = all(end is not None and math.isfinite(end) for end in ends)
    interval = f" [{_number(ends[0])}, {_number(ends[1])}]" if known else ""
    return _number(plain["mean"]) + interval


def pair_charts(pairs: Sequence[Plain]) -> list[Chart]:
    """Return accuracy by margin and calibration, of the reward first.

    Only of judges whose scores predict a probability; the rule-based judge's do not.
    """
    claiming = [pair_quality for pair_quality in pairs if pair_quality["judge"] != "gold judge"]
    if not claiming:
        return []
    margins = [_margin(pair_quality, colour) for colour, pair_quality in enumerate(claiming)]
    claimed = claiming[0]["margin_bins"]
    line = LineSeries(
        f"{claiming[0]['judge']}'s claim",
        np.arange(1.0, len(claimed) + 1),
        np.array([margin_bin["expected"] for margin_bin in claimed]),
        3,
        smooth=False,
        unit="fifth",
        last="",
    )
    return [
        Chart(
            "Accuracy by margin",
            [*margins, line],
            x_label="pairs by margin, smallest first",
            levels=[(0.5, "chance")],
        ),
        Chart(
            "Calibration",
            [_calibration(pair_quality, colour) for colour, pair_quality in enumerate(claiming)],
            x_label="predicted probability",
            diagonal=True,
        ),
    ]


def score_distributions(plain: Plain) -> Chart:
    """Return the chart of the distributions of the reward's scores, by kind of answers."""
    edges = np.array(plain["edges"])
    middle = (edges[1:] + edges[:-1]) / 2
    lines = [
        LineSeries(
            kind["name"],
            middle,
            np.array(kind["shares"]),
            number % COLOURS,
            smooth=False,
            unit="score",
            last=f"mean {kind['mean']:.2f}".replace("-", "\N{MINUS SIGN}"),
        )
        for number, kind in enumerate(plain["kinds"])
    ]
    return Chart("Scores: share of answers", lines, x_label="score", include=(0.0,))


def score_by_length(answers: Sequence[Plain]) -> Chart:
    """Return the mean score by length of each model's answers, with two standard errors."""
    lines = []
    for number, model in enumerate(answers):
        bins = model["by_length"]
        score, error = _column(bins, "score"), 2 * _column(bins, "error")
        lines.append(
            LineSeries(
                model["model"],
                _column(bins, "tokens"),
                score,
                (2 + number) % COLOURS,
                smooth=False,
                unit="tokens",
                whiskers=(score - error, score + error),
                last=f"{model['tokens']:.0f} tokens",
            )
        )
    return Chart("Score by length of the answer", lines, x_label="tokens")


def gains_against_kl(path: Plain) -> Chart:
    """Return every judge's gain against the square root of the KL, from the start at 0."""
    points = path["points"]
    distance = np.sqrt(_from_zero(points, "kl"))
    lines = []
    for number, judge in enumerate(points[0]["gains"]):
        gains = [point["gains"][judge] for point in points]
        lines.append(
            LineSeries(
                judge,
                distance,
                _from_zero(gains, "mean"),
                number % COLOURS,
                smooth=False,
                unit="√KL",
                whiskers=(_from_zero(gains, "low"), _from_zero(gains, "high")),
            )
        )
    label = "√KL, KL in nats per answer"
    name = path["name"]
    return Chart(
        f"{name[:1].upper()}{name[1:]}: gain in std", lines, x_label=label, levels=[(0.0, "")]
    )
