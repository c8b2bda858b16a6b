"""The report of one run: one HTML file that needs no network and trusts none of the text in it.

The page has no script, and its security policy allows nothing but its own style sheet (by digest).
Everything is escaped twice over (`report/template.py`): by the templates' autoescape, and by
`visible` for characters that act without being markup.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from rlhf_exp.data.parsing import split_turns
from rlhf_exp.evaluation.comparison import ACCURACY, ModelComparison, PromptRow
from rlhf_exp.evaluation.preference import MINUS
from rlhf_exp.report import chart as chart_module
from rlhf_exp.report.chart import STEP, curve, render, sparkline
from rlhf_exp.report.run.charts import charts_of
from rlhf_exp.report.run.data import ReportData, Sample, SampleSide
from rlhf_exp.report.run.sections import COMPARISONS, sections_of
from rlhf_exp.report.run.verdict import (
    FEWEST_PROMPTS,
    NO_INDEPENDENT_JUDGE,
    independent_verdicts,
    marked_rows,
    needed_label,
    outcome_bar,
    reward_as_judge,
    tiles_of,
    toxicity_note,
    verdict_sentence,
)
from rlhf_exp.report.template import FOLDER, fill
from rlhf_exp.safe_text import clipped, visible
from rlhf_exp.store.atomic_files import write_text_atomic

_VALUE_LIMIT = 2_000


def report_path(outputs: Path, stage: str, key: str) -> Path:
    """Return the page of the run that ends in a result."""
    return outputs / "reports" / f"{stage}-{key}.html"


def build_report(data: ReportData, path: Path) -> Path:
    """Write the page and return its path; a page that is there already is replaced at once, whole.

    Args:
        data: the content; all strings in it are untrusted.
        path: the file to write; its folder is made if missing.
    """
    return write_page(render_page(data), path)


def write_page(page: str, path: Path) -> Path:
    """Write a page at once, whole, and return its path; its folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, page, durable=False)
    return path


def render_page(data: ReportData) -> str:
    """Return the page as HTML."""
    css = (FOLDER / "page.css").read_text(encoding="utf-8")
    evaluation = None if data.evaluation is None else ModelComparison.from_json(data.evaluation)
    samples, rule = data.samples, data.sample_rule
    if evaluation is not None and not samples:
        results = comparisons_of(data)
        samples, rule = samples_of(results), sample_rule_of(results)
    groups = charts_of(data.metrics, data.calibration, data.kl_target, data.published_steps)
    return fill(
        "run/page.html",
        data=data,
        css=Markup(css),
        style_digest=b64encode(hashlib.sha256(css.encode()).digest()).decode(),
        evaluation=evaluation,
        headlines=headlines_of(data),
        rows=[] if evaluation is None else marked_rows(evaluation),
        fewest=FEWEST_PROMPTS,
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
        duration=chart_module.duration,
        count_label=chart_module.count_label,
        turns_of=split_turns,
    )


def headlines_of(data: ReportData) -> list[str]:
    """Return the answer in sentences: by the reward, then by judges independent of it.

    Without an evaluation, the last stage's main number.
    """
    comparisons = comparisons_of(data)
    if not comparisons:
        last = next((row for row in reversed(data.stages) if row.result), None)
        return [] if last is None else [f"{last.stage.upper()}: {last.result}."]
    sentences = []
    for comparison in comparisons:
        judge = reward_as_judge(data.config, comparison)
        sentences.append(verdict_sentence(comparison, judge))
        sentences += independent_verdicts(data.config, comparison, data.parts) or [
            NO_INDEPENDENT_JUDGE
        ]
    # Said once, whatever the number of models.
    return list(dict.fromkeys(sentences))


def comparisons_of(data: ReportData) -> list[ModelComparison]:
    """Return each model's comparison with the baseline; none where nothing was compared."""
    if data.evaluation is None:
        return []
    comparisons: Sequence[Mapping[str, Any]] = data.parts.get(COMPARISONS) or [data.evaluation]
    return [ModelComparison.from_json(comparison) for comparison in comparisons]


def samples_of(results: Sequence[ModelComparison]) -> list[Sample]:
    """Return the prompts that the comparisons picked, each once, with the answers of all models.

    Args:
        results: Each model against the same baseline, on the same prompts.
    """
    rules_by_row: dict[int, dict[str, list[str]]] = {}
    for result in results:
        for pick in result.picks:
            rules_by_row.setdefault(pick.row, {}).setdefault(pick.rule, []).append(result.name_b)
    return [
        Sample(
            "; ".join(_rule(rule, names, len(results)) for rule, names in rules.items()),
            results[0].rows[row].prompt,
            _sides(results, row),
        )
        for row, rules in rules_by_row.items()
    ]


def sample_rule_of(results: Sequence[ModelComparison]) -> str:
    """Return the rule by which the prompts were picked, in words."""
    first = results[0]
    if len(results) == 1:
        return first.pick_rule
    names = ", ".join(result.name_b for result in results)
    return (
        f"{first.pick_rule} This for each model against {first.name_a}: {names}. A prompt is shown "
        "once, with the answers of all models."
    )


def _rule(rule: str, names: Sequence[str], comparisons: int) -> str:
    return f"{rule}: {', '.join(names)}" if comparisons > 1 else rule


def _sides(results: Sequence[ModelComparison], number: int) -> list[SampleSide]:
    first = results[0]
    row = first.rows[number]
    facts = _facts(first, row.score_a, row.terms_a, row.gold_a, row.toxicity_a, None)
    baseline = SampleSide(first.name_a, row.answer_a, facts)
    return [baseline, *(_side(result, result.rows[number]) for result in results)]


def _side(result: ModelComparison, row: PromptRow) -> SampleSide:
    facts = _facts(result, row.score_b, row.terms_b, row.gold_b, row.toxicity_b, row.kl_b)
    return SampleSide(result.name_b, row.answer_b, [*facts, ("outcome", row.outcome)])


def _facts(
    result: ModelComparison,
    score: float,
    terms: Mapping[str, float],
    gold: float | None,
    toxicity: float | None,
    kl: float | None,
) -> list[tuple[str, str]]:
    judge = "gold" if result.metric(ACCURACY) is None else ACCURACY
    known: list[tuple[str, float | None]] = [("reward", score), *terms.items(), (judge, gold)]
    known += [("toxicity", toxicity), ("KL", kl)]
    return [
        (label, f"{value:.2f}".replace("-", MINUS)) for label, value in known if value is not None
    ]


def config_sections(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (section, YAML) for each top-level mapping, and all single values as `general`."""
    single = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    sections = {"general": single} if single else {}
    nested = {str(key): value for key, value in config.items() if isinstance(value, Mapping)}
    return [(name, _yaml(values)) for name, values in {**sections, **nested}.items()]


def _yaml(values: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(
        _yaml_value(values),
        sort_keys=False,
        allow_unicode=True,
        width=10_000,
        default_flow_style=False,
    )
    return text


def _yaml_value(value: object) -> object:
    """Return a value that YAML can write: strings clipped, other objects as their text."""
    if isinstance(value, Mapping):
        return {clipped(str(key), _VALUE_LIMIT): _yaml_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_yaml_value(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return clipped(visible(str(value)), _VALUE_LIMIT)


def metric_tables(
    metrics: Mapping[str, Sequence[Mapping[str, float]]],
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return (stage, rows): for every logged metric its name, course, last value and extremes."""
    tables = []
    for stage, rows in metrics.items():
        names = sorted({str(name) for row in rows for name in row if name != STEP})
        table_rows = []
        for name in names:
            points = curve(rows, [name])
            if points is not None:
                known = points.y[points.y == points.y]  # NaN is unequal to itself
                table_rows.append(
                    {
                        "name": name,
                        "drawing": sparkline(points.y),
                        "last": chart_module.short(float(known[-1])),
                        "low": chart_module.short(float(known.min())),
                        "high": chart_module.short(float(known.max())),
                        "count": len(points.y),
                    }
                )
        if table_rows:
            tables.append((str(stage), table_rows))
    return tables
