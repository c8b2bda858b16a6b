"""The training charts of a run's page, by stage, and the same charts as SVG files of their own.

A chart whose metrics were not logged is left out. Names are those of the metrics contract
(`reward/mean`, `kl/sequence`, ...); where several are listed, the first one logged is drawn.
Evaluations during training are named `eval/...`.

An SVG file is a sheet of all charts of a stage, for papers and documentation. It names its colours
itself and needs no style sheet, and it is on white, whatever the reader's theme, so that no page it
is pasted into changes its colours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from markupsafe import Markup

from rlhf_exp.evaluation.statistics import clopper_pearson
from rlhf_exp.report import chart as chart_module
from rlhf_exp.report.chart import (
    HEIGHT,
    STEPS,
    WIDTH,
    Chart,
    LineSeries,
    Row,
    curve,
    draw_chart,
    joint,
    line_of,
    short,
)
from rlhf_exp.report.run.data import CalibrationBar
from rlhf_exp.report.template import FOLDER

Rows = Sequence[Row]
Names = tuple[str, ...]
COLUMNS = 3
_GAP, _HEAD = 20, 50
_LETTER_WIDTH = 7.0  # an estimate, because SVG lays no text out
_FONT = "text { font-family: system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif; }"
_SHEET_RULES = """
.title { font-size: 14px; font-weight: 600; fill: var(--ink); }
.name { font-size: 12.5px; fill: var(--soft); }
.value { font-weight: 600; fill: var(--ink); }
.swatch { stroke: currentColor; stroke-width: 3; }
.swatch.s1 { stroke-dasharray: 6 3.5; }
.swatch.s2 { stroke-dasharray: 3 2; }
"""
_TRAIN_LOSS: Names = ("loss/total", "loss/train", "loss")
_TERM = re.compile("reward/term/(.+)/mean")
_EVAL_LOSS: Names = ("eval/loss", "eval/loss/total", "loss/validation")


def charts_of(
    metrics: Mapping[str, Rows],
    calibration: Sequence[CalibrationBar] = (),
    kl_target: float | None = None,
    published: Mapping[str, int] = {},
) -> list[tuple[str, list[Chart]]]:
    """Return (heading, charts) of the stages trained; headings without charts are left out.

    Args:
        metrics: Rows of `metrics.jsonl` by stage.
        calibration: The reward model's calibration.
        kl_target: The target of PPO's KL, in nats per answer.
        published: The step of the published weights by stage, which is marked on each curve.
    """
    charts = _charts_by_stage(metrics, calibration, kl_target, published)
    groups = [
        ("PPO", charts["ppo"]),
        ("DPO", charts["dpo"]),
        ("Before PPO: demonstrations and preferences", [*charts["sft"], *charts["reward"]]),
    ]
    return [(heading, charts) for heading, charts in groups if charts]


def _charts_by_stage(
    metrics: Mapping[str, Rows],
    calibration: Sequence[CalibrationBar],
    kl_target: float | None,
    published: Mapping[str, int],
) -> dict[str, list[Chart]]:
    charts = {
        "sft": sft_charts(metrics.get("sft", ())),
        "reward": reward_charts(metrics.get("reward", ()), calibration),
        "dpo": dpo_charts(metrics.get("dpo", ())),
        "ppo": ppo_charts(metrics.get("ppo", ()), kl_target, published.get("ppo")),
    }
    return {
        stage: [_with_published(chart, published.get(stage)) for chart in stage_charts]
        for stage, stage_charts in charts.items()
    }


def _with_published(chart: Chart, step: int | None) -> Chart:
    """Return a chart with the published step marked, if its axis is that of steps."""
    if step is None or chart.x_label != STEPS:
        return chart
    return replace(chart, marks_x=[*chart.marks_x, (step, "published")])


def sft_charts(rows: Rows) -> list[Chart]:
    """Return the charts of supervised fine-tuning."""
    lines = [("train", _TRAIN_LOSS), ("validation", _EVAL_LOSS)]
    return _without_missing([_metric_chart("SFT: loss, nats per token", rows, lines)])


def reward_charts(rows: Rows, calibration: Sequence[CalibrationBar] = ()) -> list[Chart]:
    """Return the charts of the reward model."""
    loss = [("train", _TRAIN_LOSS), ("validation", _EVAL_LOSS)]
    accuracy: list[tuple[str, Names]] = [
        ("train", ("accuracy", "reward/accuracy", "train/accuracy")),
        ("validation", ("eval/accuracy", "eval/reward/accuracy")),
    ]
    return _without_missing(
        [
            _metric_chart("Reward model: loss, nats per pair", rows, loss),
            _metric_chart(
                "Reward model: accuracy on pairs", rows, accuracy, levels=[(0.5, "chance")]
            ),
            _calibration(calibration),
        ]
    )


def dpo_charts(rows: Rows) -> list[Chart]:
    """Return the charts of DPO."""
    loss = [("train", _TRAIN_LOSS), ("validation", _EVAL_LOSS)]
    accuracy: list[tuple[str, Names]] = [
        ("train", ("dpo/accuracy",)),
        ("validation", ("eval/accuracy",)),
    ]
    rewards: list[tuple[str, Names]] = [
        ("chosen", ("eval/reward_chosen",)),
        ("rejected", ("eval/reward_rejected",)),
    ]
    whole: list[tuple[str, Names]] = [("held-out prompts", ("eval/kl_sequence",))]
    length: list[tuple[str, Names]] = [("held-out prompts", ("eval/length_mean",))]
    return _without_missing(
        [
            _metric_chart("DPO: loss of a pair", rows, loss),
            _metric_chart("DPO: accuracy on pairs", rows, accuracy, levels=[(0.5, "chance")]),
            _metric_chart("DPO: rewards on validation pairs", rows, rewards, levels=[(0.0, "")]),
            _metric_chart("DPO: KL, nats per answer", rows, whole),
            _metric_chart("DPO: answer length, tokens", rows, length),
        ]
    )


def ppo_charts(
    rows: Rows, kl_target: float | None = None, published: int | None = None
) -> list[Chart]:
    """Return the charts of PPO; of the path of reward against KL, the published step is marked."""
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
    return _without_missing(
        [
            _reward(rows),
            _metric_chart("KL, nats per answer", rows, whole, levels=target),
            _reward_against_kl(rows, published),
            *_terms(rows),
            _metric_chart("KL, nats per token", rows, per_token),
            _metric_chart("KL coefficient β", rows, [("beta", ("kl/beta",))]),
            _metric_chart("Entropy, nats per token", rows, [("policy", ("policy/entropy",))]),
            _metric_chart("Answer length, tokens", rows, length),
            _metric_chart("Value: explained variance", rows, variance, levels=[(0.0, "")]),
            _metric_chart("Shares of answers and updates", rows, endings, include=(0.0,)),
        ]
    )


def _terms(rows: Rows) -> list[Chart | None]:
    """Return a chart of each term of a sum of rewards, and one of an ensemble's disagreement."""
    found = [_TERM.fullmatch(name) for row in rows for name in row]
    names = list(dict.fromkeys(match[1] for match in found if match is not None))
    charts = [
        _metric_chart(
            f"Reward term {name}, raw",
            rows,
            [
                ("rollouts", (f"reward/term/{name}/mean",)),
                ("held-out prompts", (f"eval/reward/term/{name}/mean",)),
            ],
        )
        for name in names
    ]
    spread: list[tuple[str, Names]] = [
        ("rollouts", ("reward/ensemble_std",)),
        ("held-out prompts", ("eval/reward/ensemble_std",)),
    ]
    return [*charts, _metric_chart("Ensemble: standard deviation", rows, spread, include=(0.0,))]


def _metric_chart(
    title: str,
    rows: Rows,
    lines: Sequence[tuple[str, Names]],
    *,
    levels: Sequence[tuple[float, str]] = (),
    include: Sequence[float] = (),
) -> Chart | None:
    drawn_lines = [
        line_of(label, points, colour)
        for colour, (label, names) in enumerate(lines)
        if (points := curve(rows, names)) is not None
    ]
    return Chart(title, drawn_lines, levels=levels, include=include) if drawn_lines else None


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


def _reward_against_kl(rows: Rows, published: int | None) -> Chart | None:
    mean, kl = curve(rows, ["reward/mean"]), curve(rows, ["kl/sequence"])
    if mean is None or kl is None:
        return None
    steps, x, y = joint(kl, mean)
    if len(steps) < 2:
        return None
    last = f"{short(float(y[-1]))} at {short(float(x[-1]))} nats"
    disc = None if published is None else int(np.argmin(np.abs(steps - published)))
    path = LineSeries("training's path", x, y, ordered=True, unit="KL", last=last, disc=disc)
    return Chart("Reward against KL", [path], x_label="KL, nats per answer")


def _calibration(bars: Sequence[CalibrationBar]) -> Chart | None:
    """Predicted against observed preference; the band is each bin's exact 95 % interval."""
    bars = sorted((bar for bar in bars if bar.count > 0), key=lambda bar: bar.predicted)
    if not bars:
        return None
    x = np.array([bar.predicted for bar in bars])
    y = np.array([bar.observed for bar in bars])
    pairs = sum(bar.count for bar in bars)
    whiskers = [clopper_pearson(round(bar.observed * bar.count), bar.count) for bar in bars]
    line = LineSeries(
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


def _without_missing(charts: Sequence[Chart | None]) -> list[Chart]:
    return [chart for chart in charts if chart is not None]


def write_sheets(
    metrics: Mapping[str, Rows],
    folder: Path,
    calibration: Sequence[CalibrationBar] = (),
    kl_target: float | None = None,
    published: Mapping[str, int] = {},
) -> list[Path]:
    """Write `sft.svg`, `reward.svg`, `dpo.svg` and `ppo.svg`, of the stages that have charts.

    Args:
        metrics: Rows of `metrics.jsonl` by stage.
        folder: Where to write; made if it is missing.
        calibration: The reward model's calibration.
        kl_target: The target of PPO's KL, in nats per answer.
        published: The step of the published weights by stage.
    """
    sheets = _charts_by_stage(metrics, calibration, kl_target, published)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for stage, charts in sheets.items():
        if charts:
            path = folder / f"{stage}.svg"
            path.write_text(f"{sheet(charts)}\n", encoding="utf-8")
            written.append(path)
    return written


def sheet(charts: Sequence[Chart], columns: int = COLUMNS) -> Markup:
    """Return one SVG with the charts side by side, `columns` in a row."""
    columns = min(columns, len(charts))
    rows = -(-len(charts) // columns)
    cell = (WIDTH + _GAP, HEIGHT + _HEAD + _GAP)
    width, height = columns * cell[0] + _GAP, rows * cell[1] + _GAP
    cells = [
        chart_module.group(
            _cell(chart),
            transform=f"translate({_GAP + place % columns * cell[0]}, "
            f"{_GAP + place // columns * cell[1]})",
        )
        for place, chart in enumerate(charts)
    ]
    return chart_module.element(
        "svg",
        chart_module.element("style", Markup(sheet_style())),
        chart_module.element("rect", width=width, height=height, fill="#ffffff"),
        *cells,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
    )


def _cell(chart: Chart) -> list[Markup]:
    """Return a chart below its title and the names of its lines."""
    elements = [chart_module.element("text", chart.title, x=0, y=12, class_="title")]
    left, top = 0.0, 31
    for line in chart.lines:
        width = _LETTER_WIDTH * (len(line.label) + len(line.ending) + 1) + 22
        if left and left + width > WIDTH:
            left, top = 0.0, top + 17
        swatch = {"x1": left, "x2": left + 16, "y1": top - 4, "y2": top - 4}
        elements.append(chart_module.element("line", class_=f"swatch s{line.colour}", **swatch))
        name = chart_module.element("tspan", f"{line.label} ")
        value = chart_module.element("tspan", line.ending, class_="value")
        elements.append(
            chart_module.element("text", name, value, x=left + 22, y=top, class_="name")
        )
        left += width + 10
    drawing = chart_module.group(draw_chart(chart, hover=False), transform=f"translate(0, {_HEAD})")
    return [*elements, drawing]


@cache
def sheet_style() -> str:
    """Return the rules of the page's style sheet that a chart needs, with its light colours."""
    css = (FOLDER / "page.css").read_text(encoding="utf-8")
    colours: dict[str, str] = {}
    for name, value in re.findall(r"--([a-z0-9-]+): ([^;]+);", css):
        colours.setdefault(name, value)  # the light ones come first
    begin, end = css.index(".s0 {"), css.index(".spark {")
    rules = _FONT + _SHEET_RULES + css[begin:end]
    return re.sub(r"var\(--([a-z0-9-]+)\)", lambda match: colours[match[1]], rules)
