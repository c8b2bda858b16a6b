"""Two runs, or two groups of runs, side by side: config, results, answers to the same prompts."""

from __future__ import annotations

import json
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
    flatten,
    is_aside,
    is_seed,
    order_of,
    shown,
    summarised,
)
from rlhf_exp.store.artifact import Artifact

_PAIRED = (("Reward, raw", "score_b"), ("Gold judge", "gold_b"), ("Toxicity", "toxicity_b"))
_STAGES = ("sft", "reward", "ppo", "eval")

Rows = Sequence[PromptRow]


@dataclass(frozen=True)
class ComparedSide:
    """What is compared.

    Attributes:
        name: What the user calls it.
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
        """Return a stage's results, what runs share once; none if a run lacks the stage."""
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
        difference: Of the means, b - a.
        shared: Whether both sides have it from the same results.
    """

    name: str
    a: SeedSummary
    b: SeedSummary
    difference: Estimate
    shared: bool


@dataclass(frozen=True)
class Comparison:
    """What two sides differ in.

    Attributes:
        a: One side.
        b: The other.
        config: (key, values in a, values in b) of what differs.
        metrics: Those that both sides have.
        prompts: How many prompts both sides answered, the same ones; 0 if they are not.
        paired: (label, mean of b - a over these prompts).
        notes: What the reader must know.
    """

    a: ComparedSide
    b: ComparedSide
    config: Sequence[tuple[str, str, str]]
    metrics: Sequence[MetricRow]
    prompts: int
    paired: Sequence[tuple[str, Estimate]]
    notes: Sequence[str]


def compared(a: ComparedSide, b: ComparedSide) -> Comparison:
    """Compare two sides; what their runs share counts once."""
    notes = [note for side in (a, b) for note in _notes(side)]
    rows = [_answers(side) for side in (a, b)]
    same = 0
    paired: list[tuple[str, Estimate]] = []
    if all(rows):
        prompts = {tuple(row.prompt for row in one) for side in rows for one in side}
        if len(prompts) > 1:
            notes.append("The two were evaluated on different prompts: no paired comparison.")
        else:
            same = len(next(iter(prompts)))
            paired, more = _paired(a, b, rows)
            notes += more
    return Comparison(a, b, _config(a, b), _metrics(a, b), same, paired, notes)


def _notes(side: ComparedSide) -> list[str]:
    found = []
    if side.unfinished:
        found.append(f"{side.name}: {side.unfinished} runs are not done and are left out.")
    varied = [key for key in _keys([side]) if not is_seed(key) and len(_values(side, key)) > 1]
    if varied:
        named = ", ".join(varied[:5]) + (", ..." if len(varied) > 5 else "")
        found.append(
            f"{side.name} holds runs that differ in more than seeds ({named}): its numbers are "
            "means over all of them."
        )
    return found


def _keys(sides: Sequence[ComparedSide]) -> list[str]:
    found = {key for side in sides for config in side.configs for key in config}
    return sorted(key for key in found if not is_aside(key))


def _values(side: ComparedSide, key: str) -> set[str]:
    return {shown(config[key]) if key in config else "" for config in side.configs}


def _config(a: ComparedSide, b: ComparedSide) -> list[tuple[str, str, str]]:
    found = []
    for key in _keys((a, b)):
        left, right = _values(a, key), _values(b, key)
        if left != right:
            ours, theirs = (", ".join(sorted(side, key=order_of)) for side in (left, right))
            found.append((key, ours, theirs))
    return found


def _metrics(a: ComparedSide, b: ComparedSide) -> list[MetricRow]:
    found = []
    for stage in _STAGES:
        sides = [side.of(stage) for side in (a, b)]
        if not all(sides):
            continue
        keys = [{one.key for one in side} for side in sides]
        shared = keys[0] == keys[1]
        names = set.intersection(*(set(one.manifest.metrics) for side in sides for one in side))
        for name in sorted(names):
            left, right = (summarised(one.manifest.metrics[name] for one in side) for side in sides)
            if left is not None and right is not None:
                change = difference(left, right)
                found.append(MetricRow(f"{stage} {name}", left, right, change, shared))
    return found


def _answers(side: ComparedSide) -> list[Rows]:
    """Return the rows of each evaluation of a side."""
    paths = [one.path / RESULT for one in side.of("eval")]
    if not all(path.is_file() for path in paths):
        return []
    return [ModelComparison.from_json(json.loads(path.read_text("utf-8"))).rows for path in paths]


def _paired(
    a: ComparedSide, b: ComparedSide, rows: Sequence[Sequence[Rows]]
) -> tuple[list[tuple[str, Estimate]], list[str]]:
    """Compare the policies prompt by prompt; of several runs of a side, the mean of each prompt."""
    judges = {one.manifest.parents.get("reward") for side in (a, b) for one in side.of("eval")}
    notes = []
    if max(len(a.runs), len(b.runs)) > 1:
        notes.append(
            "Over prompts, each prompt's value is the mean over a side's runs: these intervals say "
            "what other prompts would change, and nothing of other seeds."
        )
    if len(judges) > 1:
        notes.append("The reward models differ, so raw rewards are not compared.")
    found = []
    for label, name in _PAIRED:
        if name == "score_b" and len(judges) > 1:
            continue
        means = [_mean_of(side, name) for side in rows]
        if means[0] is not None and means[1] is not None:
            found.append((label, paired_difference(means[0], means[1], seed=0)))
    return found, notes


def _mean_of(evaluations: Sequence[Rows], name: str) -> Floats | None:
    """Return the mean over evaluations of a value of each prompt; `None` where one is missing."""
    values = [[getattr(row, name) for row in rows] for rows in evaluations]
    if any(value is None for row in values for value in row):
        return None
    return np.array(values, dtype=np.float64).mean(axis=0)
