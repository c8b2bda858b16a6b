"""Answers side by side: of the prompts that a rule picked, those of all models together."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_exp.evaluation.metric import MINUS
from rlhf_exp.evaluation.result import PromptRow, QuickResult
from rlhf_exp.report.data import Sample, SampleSide


def samples_of(results: Sequence[QuickResult]) -> list[Sample]:
    """Return the prompts that the comparisons picked, each once, with the answers of all models.

    Args:
        results: Each model against the same baseline, on the same prompts.
    """
    found: dict[int, dict[str, list[str]]] = {}
    for result in results:
        for pick in result.picks:
            found.setdefault(pick.row, {}).setdefault(pick.rule, []).append(result.name_b)
    return [
        Sample(
            "; ".join(_rule(rule, names, len(results)) for rule, names in rules.items()),
            results[0].rows[row].prompt,
            _sides(results, row),
        )
        for row, rules in found.items()
    ]


def rule_of(results: Sequence[QuickResult]) -> str:
    """Return in words how the prompts were picked."""
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


def _sides(results: Sequence[QuickResult], number: int) -> list[SampleSide]:
    first = results[0]
    row = first.rows[number]
    facts = _facts(row.score_a, row.gold_a, row.toxicity_a, None)
    baseline = SampleSide(first.name_a, row.answer_a, facts)
    return [baseline, *(_side(result.name_b, result.rows[number]) for result in results)]


def _side(name: str, row: PromptRow) -> SampleSide:
    facts = _facts(row.score_b, row.gold_b, row.toxicity_b, row.kl_b)
    return SampleSide(name, row.answer_b, [*facts, ("outcome", row.outcome)])


def _facts(
    score: float, gold: float | None, toxicity: float | None, kl: float | None
) -> list[tuple[str, str]]:
    known = [("reward", score), ("gold", gold), ("toxicity", toxicity), ("KL", kl)]
    return [
        (label, f"{value:.2f}".replace("-", MINUS)) for label, value in known if value is not None
    ]
