"""The charts of a run's page as SVG files of their own, for papers and documentation.

A sheet holds all charts of a stage. It names its colours itself and needs no style sheet, and it is
on white, whatever the reader's theme: what it is pasted into decides about no colour in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from markupsafe import Markup

from rlhf_exp.report import svg
from rlhf_exp.report.chart import HEIGHT, WIDTH, Chart
from rlhf_exp.report.charts import Rows, ppo_charts, reward_charts, sft_charts
from rlhf_exp.report.data import CalibrationBin
from rlhf_exp.report.plot import drawn
from rlhf_exp.report.template import FOLDER

COLUMNS = 3
_GAP, _HEAD = 20, 50
_LETTER = 7.0  # SVG lays no text out: about so wide is a letter of a legend
_FONT = "text { font-family: system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif; }"
_MORE = """
.title { font-size: 14px; font-weight: 600; fill: var(--ink); }
.name { font-size: 12.5px; fill: var(--soft); }
.value { font-weight: 600; fill: var(--ink); }
.swatch { stroke: currentColor; stroke-width: 3; }
.swatch.s1 { stroke-dasharray: 6 3.5; }
.swatch.s2 { stroke-dasharray: 3 2; }
"""


def write_sheets(
    metrics: Mapping[str, Rows],
    folder: Path,
    calibration: Sequence[CalibrationBin] = (),
    kl_target: float | None = None,
) -> list[Path]:
    """Write `sft.svg`, `reward.svg` and `ppo.svg`, of the stages that have charts.

    Args:
        metrics: Rows of `metrics.jsonl` by stage.
        folder: Made if it is missing.
        calibration: Of the reward model.
        kl_target: What PPO's KL was to become.
    """
    sheets = {
        "sft": sft_charts(metrics.get("sft", ())),
        "reward": reward_charts(metrics.get("reward", ()), calibration),
        "ppo": ppo_charts(metrics.get("ppo", ()), kl_target),
    }
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
        svg.group(
            _cell(chart),
            transform=f"translate({_GAP + place % columns * cell[0]}, "
            f"{_GAP + place // columns * cell[1]})",
        )
        for place, chart in enumerate(charts)
    ]
    return svg.element(
        "svg",
        svg.element("style", Markup(style())),
        svg.element("rect", width=width, height=height, fill="#ffffff"),
        *cells,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
    )


def _cell(chart: Chart) -> list[Markup]:
    """Return a chart below its title and the names of its lines."""
    found = [svg.element("text", chart.title, x=0, y=12, class_="title")]
    left, top = 0.0, 31
    for line in chart.lines:
        width = _LETTER * (len(line.label) + len(line.ending) + 1) + 22
        if left and left + width > WIDTH:
            left, top = 0.0, top + 17
        swatch = {"x1": left, "x2": left + 16, "y1": top - 4, "y2": top - 4}
        found.append(svg.element("line", class_=f"swatch s{line.colour}", **swatch))
        name = svg.element("tspan", f"{line.label} ")
        value = svg.element("tspan", line.ending, class_="value")
        found.append(svg.element("text", name, value, x=left + 22, y=top, class_="name"))
        left += width + 10
    drawing = svg.group(drawn(chart, pointed=False), transform=f"translate(0, {_HEAD})")
    return [*found, drawing]


@cache
def style() -> str:
    """Return the rules of the page's style sheet that a chart needs, with its light colours."""
    css = (FOLDER / "page.css").read_text(encoding="utf-8")
    colours: dict[str, str] = {}
    for name, value in re.findall(r"--([a-z0-9-]+): ([^;]+);", css):
        colours.setdefault(name, value)  # the light ones come first
    begin, end = css.index(".s0 {"), css.index(".spark {")
    rules = _FONT + _MORE + css[begin:end]
    return re.sub(r"var\(--([a-z0-9-]+)\)", lambda found: colours[found[1]], rules)
