"""What a stage gives back; plain values, which cross processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StageResult:
    """What a stage says of its result; the result itself is in the staging folder.

    Attributes:
        metrics: Final numbers, for the manifest.
        objective: What a sweep over this stage maximises.
        run_id: The tracked run.
        facts: Plain values for the report: parameter counts, data, cut prompts.
        measured: What a probe has found, JSON values; empty otherwise.
        pruned_step: The optimizer step after which a search gave the run up, without a result.
    """

    metrics: dict[str, float]
    objective: float | None = None
    run_id: str | None = None
    facts: dict[str, float | int | str] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    pruned_step: int | None = None
