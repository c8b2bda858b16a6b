"""The charts of the reward-quality section."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_exp.report.chart import Chart, Line
from rlhf_exp.report.curves import Floats

Plain = Mapping[str, Any]

COLOURS = 4


def of_pairs(pairs: Sequence[Plain]) -> list[Chart]:
    """Return accuracy by margin and calibration, of the reward first.

    Only of judges whose scores claim a probability; that of rules does not.
    """
    claiming = [one for one in pairs if one["judge"] != "gold judge"]
    if not claiming:
        return []
    margins = [_margin(one, colour) for colour, one in enumerate(claiming)]
    claimed = claiming[0]["margin_bins"]
    line = Line(
        f"{claiming[0]['judge']}'s claim",
        np.arange(1.0, len(claimed) + 1),
        np.array([found["expected"] for found in claimed]),
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
            [_calibration(one, colour) for colour, one in enumerate(claiming)],
            x_label="predicted probability",
            diagonal=True,
        ),
    ]


def spread(plain: Plain) -> Chart:
    """Return how the reward's scores of each kind of answers spread."""
    edges = np.array(plain["edges"])
    middle = (edges[1:] + edges[:-1]) / 2
    lines = [
        Line(
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


def lengths(answers: Sequence[Plain]) -> Chart:
    """Return the mean score by length of each model's answers, with two standard errors."""
    lines = []
    for number, one in enumerate(answers):
        bins = one["by_length"]
        score, error = _column(bins, "score"), 2 * _column(bins, "error")
        lines.append(
            Line(
                one["model"],
                _column(bins, "tokens"),
                score,
                (2 + number) % COLOURS,
                smooth=False,
                unit="tokens",
                whiskers=(score - error, score + error),
                last=f"{one['tokens']:.0f} tokens",
            )
        )
    return Chart("Score by length of the answer", lines, x_label="tokens")


def against_kl(path: Plain) -> Chart:
    """Return every judge's gain against the square root of the KL, from the start at 0."""
    points = path["points"]
    distance = np.sqrt(_from_zero(points, "kl"))
    lines = []
    for number, judge in enumerate(points[0]["gains"]):
        gains = [point["gains"][judge] for point in points]
        lines.append(
            Line(
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


def _margin(plain: Plain, colour: int) -> Line:
    right, accuracy = [found["right"] for found in plain["margin_bins"]], plain["accuracy"]
    shares = np.array([one["count"] / one["total"] for one in right])
    ends = [one["interval"] for one in right]
    return Line(
        plain["judge"],
        np.arange(1.0, len(right) + 1),
        shares,
        colour,
        smooth=False,
        unit="fifth",
        whiskers=(_column(ends, "low"), _column(ends, "high")),
        last=f"{100 * accuracy['count'] / accuracy['total']:.1f} %",
    )


def _calibration(plain: Plain, colour: int) -> Line:
    bins = plain["calibration"]["bins"]
    last = f"error {plain['calibration']['error']:.3f}"
    x, y = _column(bins, "predicted"), _column(bins, "observed")
    return Line(plain["judge"], x, y, colour, smooth=False, unit="predicted", last=last)


def _from_zero(rows: Sequence[Plain], name: str) -> Floats:
    """Return a field of each row after a 0 for the start: [N + 1]."""
    return np.concatenate([[0.0], _column(rows, name)])


def _column(rows: Sequence[Plain], name: str) -> Floats:
    """Return a field of each row [N]; NaN where there is none."""
    return np.array([row[name] for row in rows], dtype=np.float64)
