"""Two runs, or two groups of runs, side by side: config, results, answers to the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_exp.evaluation.comparison import ModelComparison, PromptRow
from rlhf_exp.evaluation.statistics import Estimate, Floats, paired_difference
from rlhf_exp.report.run.gather import RESULT
from rlhf_exp.report.sweep.data import (
    SeedSummary,
    difference,
    is_ignored,
    is_seed,
    summarise_seeds,
)
from rlhf_exp.report.sweep.settings import flatten, format_override, sort_key
from rlhf_exp.store.artifact import Artifact

_PAIRED = (
    ("Reward, raw", "score_b"),
    ("Gold judge, or accuracy", "gold_b"),
    ("Toxicity", "toxicity_b"),
)
_STAGES = ("sft", "reward", "dpo", "best_of", "ppo", "eval")
Rows = Sequence[PromptRow]


@dataclass(frozen=True)
class RunComparison:
    """The differences of two sides.

    Attributes:
        a: One side.
        b: The other.
        config: (key, values in a, values in b) of settings that differ.
        metrics: Those that both sides have.
        prompts: How many prompts both sides answered, the same ones; 0 if they are not.
        paired: (label, mean of b - a over these prompts).
        notes: Reservations that the reader must know.
    """

    a: ComparedSide
    b: ComparedSide
    config: Sequence[tuple[str, str, str]]
    metrics: Sequence[MetricRow]
    prompts: int
    paired: Sequence[tuple[str, Estimate]]
    notes: Sequence[str]


@dataclass(frozen=True)
class ComparedSide:
    """One side of a comparison.

    Attributes:
        name: The user's name for it.
        runs: The results of each of its runs, by stage; at least one run.
        unfinished: Runs that were left out, because they are not done.
    """

    name: str
    runs: tuple[dict[str, Artifact], ...]
    unfinished: int = 0

    @property
    def keys(self) -> list[str]:
        """The final key of each run."""
        return [list(run.values())[-1].key for run in self.runs]

    @property
    def configs(self) -> list[dict[str, Any]]:
        """The flat config of each run."""
        return [flatten(list(run.values())[-1].manifest.config) for run in self.runs]

    def of(self, stage: str) -> list[Artifact]:
        """Return a stage's results, those that runs share once; none if a run lacks the stage."""
        if not all(stage in run for run in self.runs):
            return []
        return list({run[stage].key: run[stage] for run in self.runs}.values())


@dataclass(frozen=True)
class MetricRow:
    """A final metric of both sides.

    Attributes:
        name: Its stage and name.
        a: Over the runs of one side.
        b: Over those of the other.
        difference: Difference of the means, b - a.
        shared: Whether both sides have it from the same results.
    """

    name: str
    a: SeedSummary
    b: SeedSummary
    difference: Estimate
    shared: bool


def compare_sides(a: ComparedSide, b: ComparedSide) -> RunComparison:
    """Compare two sides; results that their runs share count once."""
    notes = [note for side in (a, b) for note in _notes(side)]
    rows = [_evaluation_rows(side) for side in (a, b)]
    common_prompts = 0
    paired: list[tuple[str, Estimate]] = []
    if all(rows):
        prompts = {tuple(row.prompt for row in answers) for side in rows for answers in side}
        if len(prompts) > 1:
            notes.append("The two were evaluated on different prompts: no paired comparison.")
        else:
            common_prompts = len(next(iter(prompts)))
            paired, paired_notes = _paired_differences(a, b, rows)
            notes += paired_notes
    return RunComparison(
        a, b, _config_differences(a, b), _metric_rows(a, b), common_prompts, paired, notes
    )


def _notes(side: ComparedSide) -> list[str]:
    notes = []
    if side.unfinished:
        notes.append(f"{side.name}: {side.unfinished} runs are not done and are left out.")
    varied = [key for key in _keys([side]) if not is_seed(key) and len(_values(side, key)) > 1]
    if varied:
        named = ", ".join(varied[:5]) + (", ..." if len(varied) > 5 else "")
        notes.append(
            f"{side.name} holds runs that differ in more than seeds ({named}): its numbers are "
            "means over all of them."
        )
    return notes


def _keys(sides: Sequence[ComparedSide]) -> list[str]:
    keys = {key for side in sides for config in side.configs for key in config}
    return sorted(key for key in keys if not is_ignored(key))


def _values(side: ComparedSide, key: str) -> set[str]:
    return {format_override(config[key]) if key in config else "" for config in side.configs}


def _config_differences(a: ComparedSide, b: ComparedSide) -> list[tuple[str, str, str]]:
    differences = []
    for key in _keys((a, b)):
        left, right = _values(a, key), _values(b, key)
        if left != right:
            ours, theirs = (", ".join(sorted(side, key=sort_key)) for side in (left, right))
            differences.append((key, ours, theirs))
    return differences


def _metric_rows(a: ComparedSide, b: ComparedSide) -> list[MetricRow]:
    rows = []
    for stage in _STAGES:
        sides = [side.of(stage) for side in (a, b)]
        if not all(sides):
            continue
        keys = [{artifact.key for artifact in side} for side in sides]
        shared = keys[0] == keys[1]
        names = set.intersection(
            *(set(artifact.manifest.metrics) for side in sides for artifact in side)
        )
        for name in sorted(names):
            left, right = (
                summarise_seeds(artifact.manifest.metrics[name] for artifact in side)
                for side in sides
            )
            if left is not None and right is not None:
                change = difference(left, right)
                rows.append(MetricRow(f"{stage} {name}", left, right, change, shared))
    return rows


def _evaluation_rows(side: ComparedSide) -> list[Rows]:
    """Return the rows of each evaluation of a side."""
    results = [artifact.json(RESULT) for artifact in side.of("eval")]
    if not all(results):
        return []
    return [ModelComparison.from_json(result).rows for result in results]


def _paired_differences(
    a: ComparedSide, b: ComparedSide, rows: Sequence[Sequence[Rows]]
) -> tuple[list[tuple[str, Estimate]], list[str]]:
    """Compare the policies prompt by prompt; of several runs of a side, the mean of each prompt."""
    judges = {
        artifact.manifest.parents.get("reward") for side in (a, b) for artifact in side.of("eval")
    }
    notes = []
    if max(len(a.runs), len(b.runs)) > 1:
        notes.append(
            "Over prompts, each prompt's value is the mean over a side's runs: these intervals say "
            "what other prompts would change, and nothing of other seeds."
        )
    if len(judges) > 1:
        notes.append("The reward models differ, so raw rewards are not compared.")
    differences = []
    for label, name in _PAIRED:
        if name == "score_b" and len(judges) > 1:
            continue
        means = [_mean_of(side, name) for side in rows]
        if means[0] is not None and means[1] is not None:
            differences.append((label, paired_difference(means[0], means[1], seed=0)))
    return differences, notes


def _mean_of(evaluations: Sequence[Rows], name: str) -> Floats | None:
    """Return the mean over evaluations of a value of each prompt; `None` where one is missing."""
    values = [[getattr(row, name) for row in rows] for rows in evaluations]
    if any(value is None for row in values for value in row):
        return None
    return np.array(values, dtype=np.float64).mean(axis=0)
