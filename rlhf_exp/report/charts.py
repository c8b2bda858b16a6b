"""Which curves a run's page shows, by stage; a chart whose metrics were not logged is left out.

Names are those of the metrics contract (`reward/mean`, `kl/sequence`, ...); where more than one is
listed, the first that was logged is drawn. Evaluations during training are named `eval/...`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rlhf_exp.evaluation.statistics import clopper_pearson
from rlhf_exp.report.chart import Chart, Line, line_of
from rlhf_exp.report.curves import Row, curve, joint
from rlhf_exp.report.data import CalibrationBin
from rlhf_exp.report.numbers import short

Rows = Sequence[Row]
Names = tuple[str, ...]

_TRAIN_LOSS: Names = ("loss/total", "loss/train", "loss")
_EVAL_LOSS: Names = ("eval/loss", "eval/loss/total", "loss/validation")


def sft_charts(rows: Rows) -> list[Chart]:
    """Return the charts of supervised fine-tuning."""
    lines = [("train", _TRAIN_LOSS), ("validation", _EVAL_LOSS)]
    return _present([_simple("SFT: loss, nats per token", rows, lines)])


def reward_charts(rows: Rows, calibration: Sequence[CalibrationBin] = ()) -> list[Chart]:
    """Return the charts of the reward model."""
    loss = [("train", _TRAIN_LOSS), ("validation", _EVAL_LOSS)]
    accuracy: list[tuple[str, Names]] = [
        ("train", ("accuracy", "reward/accuracy", "train/accuracy")),
        ("validation", ("eval/accuracy", "eval/reward/accuracy")),
    ]
    return _present(
        [
            _simple("Reward model: loss, nats per pair", rows, loss),
            _simple("Reward model: accuracy on pairs", rows, accuracy, levels=[(0.5, "chance")]),
            _calibration(calibration),
        ]
    )


def ppo_charts(rows: Rows, kl_target: float | None = None) -> list[Chart]:
    """Return the charts of PPO."""
    target = [(kl_target, "target")] if kl_target is not None else []
    whole: list[tuple[str, Names]] = [
        ("rollouts", ("kl/sequence",)),
        ("held-out prompts", ("eval/kl_sequence",)),
    ]
    length: list[tuple[str, Names]] = [
        ("rollouts", ("response/length_mean",)),
        ("held-out prompts", ("eval/length_mean",)),
    ]
    per_token: list[tuple[str, Names]] = [("k1", ("kl/k1",)), ("k3", ("kl/k3",))]
    variance: list[tuple[str, Names]] = [("explained", ("value/explained_variance",))]
    endings: list[tuple[str, Names]] = [
        ("ended by itself", ("response/eos_fraction",)),
        ("stop string", ("response/stop_fraction",)),
        ("updates clipped", ("policy/clip_fraction",)),
    ]
    return _present(
        [
            _reward(rows),
            _simple("KL, nats per answer", rows, whole, levels=target),
            _reward_against_kl(rows),
            _simple("KL, nats per token", rows, per_token),
            _simple("KL coefficient β", rows, [("beta", ("kl/beta",))]),
            _simple("Entropy, nats per token", rows, [("policy", ("policy/entropy",))]),
            _simple("Answer length, tokens", rows, length),
            _simple("Value: explained variance", rows, variance, levels=[(0.0, "")]),
            _simple("Shares of answers and updates", rows, endings, include=(0.0,)),
        ]
    )


def charts_of(
    metrics: Mapping[str, Rows],
    calibration: Sequence[CalibrationBin] = (),
    kl_target: float | None = None,
) -> list[tuple[str, list[Chart]]]:
    """Return (heading, charts) for what was trained; headings without charts are left out."""
    before = [
        *sft_charts(metrics.get("sft", ())),
        *reward_charts(metrics.get("reward", ()), calibration),
    ]
    groups = [
        ("PPO", ppo_charts(metrics.get("ppo", ()), kl_target)),
        ("Before PPO: demonstrations and preferences", before),
    ]
    return [(heading, charts) for heading, charts in groups if charts]


def _simple(
    title: str,
    rows: Rows,
    lines: Sequence[tuple[str, Names]],
    *,
    levels: Sequence[tuple[float, str]] = (),
    include: Sequence[float] = (),
) -> Chart | None:
    found = [
        line_of(label, points, colour)
        for colour, (label, names) in enumerate(lines)
        if (points := curve(rows, names)) is not None
    ]
    return Chart(title, found, levels=levels, include=include) if found else None


def _reward(rows: Rows) -> Chart | None:
    """Reward of the rollouts with a band of one standard deviation, and on held-out prompts."""
    mean, std = curve(rows, ["reward/mean"]), curve(rows, ["reward/std"])
    held_out = curve(rows, ["eval/reward", "eval/reward/mean", "eval/reward_mean"])
    lines = []
    if mean is not None:
        spread = None
        if std is not None:
            spread = np.interp(mean.x, std.x[np.isfinite(std.y)], std.y[np.isfinite(std.y)])
        lines.append(line_of("rollouts, mean ± std", mean, 0, spread))
    if held_out is not None:
        lines.append(line_of("held-out prompts", held_out, 1))
    return Chart("Reward", lines) if lines else None


def _reward_against_kl(rows: Rows) -> Chart | None:
    mean, kl = curve(rows, ["reward/mean"]), curve(rows, ["kl/sequence"])
    if mean is None or kl is None:
        return None
    steps, x, y = joint(kl, mean)
    if len(steps) < 2:
        return None
    last = f"{short(float(y[-1]))} at {short(float(x[-1]))} nats"
    path = Line("training's path", x, y, ordered=True, unit="KL", last=last)
    return Chart("Reward against KL", [path], x_label="KL, nats per answer")


def _calibration(bins: Sequence[CalibrationBin]) -> Chart | None:
    """Predicted against observed preference; the band is each bin's exact 95 % interval."""
    bins = sorted((found for found in bins if found.count > 0), key=lambda found: found.predicted)
    if not bins:
        return None
    x = np.array([found.predicted for found in bins])
    y = np.array([found.observed for found in bins])
    pairs = sum(found.count for found in bins)
    whiskers = [clopper_pearson(round(found.observed * found.count), found.count) for found in bins]
    line = Line(
        "observed share",
        x,
        y,
        2,
        smooth=False,
        unit="predicted",
        last=f"{pairs:,} pairs",
        whiskers=(np.array([w.low for w in whiskers]), np.array([w.high for w in whiskers])),
    )
    label = "predicted probability"
    return Chart("Reward model: calibration", [line], x_label=label, diagonal=True)


def _present(charts: Sequence[Chart | None]) -> list[Chart]:
    return [chart for chart in charts if chart is not None]
