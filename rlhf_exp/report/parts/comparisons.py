"""More than two models: each against the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from rlhf_exp.evaluation.result import QuickResult
from rlhf_exp.report.outcome import outcome_bar, tiles_of, verdict_sentence
from rlhf_exp.report.template import fill


def render(plain: Sequence[Mapping[str, Any]]) -> Markup:
    """Return the comparisons, one below the other.

    Args:
        plain: What `QuickResult.to_json` returned, of each model.
    """
    results = [QuickResult.from_json(one) for one in plain]
    shown = [(one, verdict_sentence(one), outcome_bar(one), tiles_of(one)) for one in results]
    return fill("parts/comparisons.html", comparisons=shown)
