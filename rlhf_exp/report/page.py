"""One run as one HTML file that needs no network and trusts none of the text in it.

The page has no script, and its security policy allows nothing but its own style sheet (by digest).
Everything is escaped twice over (`report/template.py`): by the templates' autoescape, and by
`visible` for characters that act without being markup.
"""

from __future__ import annotations

import hashlib
import os
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from rlhf_exp.data.dialogue import turns_of
from rlhf_exp.data.visible import clipped, visible
from rlhf_exp.evaluation.result import QuickResult
from rlhf_exp.report import numbers
from rlhf_exp.report.charts import charts_of
from rlhf_exp.report.curves import STEP, curve
from rlhf_exp.report.data import ReportData
from rlhf_exp.report.outcome import (
    needed_label,
    outcome_bar,
    tiles_of,
    toxicity_note,
    verdict_sentence,
)
from rlhf_exp.report.plot import render, sparkline
from rlhf_exp.report.samples import rule_of, samples_of
from rlhf_exp.report.sections import COMPARISONS, sections_of
from rlhf_exp.report.template import FOLDER, fill

_VALUE_LIMIT = 2_000


def build_report(data: ReportData, path: Path) -> Path:
    """Write the page and return its path; a page that is there already is replaced at once, whole.

    Args:
        data: what to show; all strings in it are untrusted.
        path: the file to write; its folder is made if missing.
    """
    return write_page(render_page(data), path)


def write_page(page: str, path: Path) -> Path:
    """Write a page at once, whole, and return its path; its folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(page, encoding="utf-8", newline="\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def render_page(data: ReportData) -> str:
    """Return the page as HTML."""
    css = (FOLDER / "page.css").read_text(encoding="utf-8")
    evaluation = None if data.evaluation is None else QuickResult.from_json(data.evaluation)
    samples, rule = data.samples, data.sample_rule
    if evaluation is not None and not samples:
        results = comparisons_of(data)
        samples, rule = samples_of(results), rule_of(results)
    groups = charts_of(data.metrics, data.calibration, data.kl_target)
    return fill(
        "page.html",
        data=data,
        css=Markup(css),
        style_digest=b64encode(hashlib.sha256(css.encode()).digest()).decode(),
        evaluation=evaluation,
        headline=None if evaluation is None else verdict_sentence(evaluation),
        bar=None if evaluation is None else outcome_bar(evaluation),
        needed="" if evaluation is None else needed_label(evaluation.preference),
        toxicity_note="" if evaluation is None else toxicity_note(evaluation),
        tiles=[] if evaluation is None else tiles_of(evaluation),
        sections=sections_of(data.parts),
        chart_groups=[(title, [render(chart) for chart in charts]) for title, charts in groups],
        samples=samples,
        sample_rule=rule,
        config_sections=config_sections(data.config),
        metric_tables=metric_tables(data.metrics),
        duration=numbers.duration,
        count_label=numbers.count_label,
        turns_of=turns_of,
    )


def comparisons_of(data: ReportData) -> list[QuickResult]:
    """Return each model's comparison with the baseline; none where nothing was compared."""
    if data.evaluation is None:
        return []
    found: Sequence[Mapping[str, Any]] = data.parts.get(COMPARISONS) or [data.evaluation]
    return [QuickResult.from_json(one) for one in found]


def config_sections(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (section, YAML) for each top-level mapping, and all single values as `general`."""
    single = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    sections = {"general": single} if single else {}
    nested = {str(key): value for key, value in config.items() if isinstance(value, Mapping)}
    return [(name, _yaml(values)) for name, values in {**sections, **nested}.items()]


def metric_tables(
    metrics: Mapping[str, Sequence[Mapping[str, float]]],
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return (stage, rows): for every logged metric its name, course, last value and extremes."""
    tables = []
    for stage, rows in metrics.items():
        names = sorted({str(name) for row in rows for name in row if name != STEP})
        found = []
        for name in names:
            points = curve(rows, [name])
            if points is not None:
                known = points.y[points.y == points.y]  # NaN is unequal to itself
                found.append(
                    {
                        "name": name,
                        "drawing": sparkline(points.y),
                        "last": numbers.short(float(known[-1])),
                        "low": numbers.short(float(known.min())),
                        "high": numbers.short(float(known.max())),
                        "count": len(points.y),
                    }
                )
        if found:
            tables.append((str(stage), found))
    return tables


def _yaml(values: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(
        _plain(values), sort_keys=False, allow_unicode=True, width=10_000, default_flow_style=False
    )
    return text


def _plain(value: object) -> object:
    """Return what YAML can write: strings clipped, other objects as their text."""
    if isinstance(value, Mapping):
        return {clipped(str(key), _VALUE_LIMIT): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return clipped(visible(str(value)), _VALUE_LIMIT)
