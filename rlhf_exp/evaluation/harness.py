"""Capability beside preference: scores of lm-evaluation-harness tasks, and models' differences.

What alignment costs elsewhere (the "alignment tax", Ouyang et al. 2022) shows in tasks that nobody
aligned for. All models answer the same documents, so their difference is taken document by document
where a task's number is the mean of its documents' numbers; that interval is far narrower than the
two models' own ones would suggest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from rlhf_exp.evaluation.preference import Better, estimate_to_json
from rlhf_exp.evaluation.statistics import Estimate, estimate_mean, paired_difference

_STDERR = "_stderr"
_NORMAL_QUANTILE = 1.959963984540054  # of 95 % intervals
_BETTER: dict[bool | None, Better] = {True: "higher", False: "lower", None: "neither"}


@dataclass(frozen=True)
class TaskScore:
    """A model's number in one task.

    Attributes:
        task: name of the task or group.
        metric: name of the metric, such as `acc`.
        filter: name of the filter that answers went through; `none` for none.
        value: the number.
        better: which direction is an improvement.
        documents: how many documents were asked.
        error: lm-eval's standard error of the value, if it has one.
        values: by document, in the order of the data, if their mean is the value.
    """

    task: str
    metric: str
    filter: str
    value: float
    better: Better
    documents: int
    error: float | None = None
    values: tuple[float, ...] | None = None

    @property
    def name(self) -> str:
        """The task and its metric, with the filter where there is one."""
        metric = self.metric if self.filter == "none" else f"{self.metric},{self.filter}"
        return f"{self.task}/{metric}"

    def estimate(self, seed: int) -> Estimate:
        """Return the value with its interval: over documents, or from lm-eval's standard error."""
        if self.values is not None:
            return estimate_mean(self.values, seed)
        half = math.inf if self.error is None else _NORMAL_QUANTILE * self.error
        return Estimate(self.value, self.value - half, self.value + half)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Self:
        """Undo `to_json`."""
        values = plain["values"]
        return cls(**{**plain, "values": None if values is None else tuple(values)})


def task_scores(results: Mapping[str, Any]) -> list[TaskScore]:
    """Return the numbers in what `lm_eval.simple_evaluate` returns, with `log_samples=True`.

    Args:
        results: Its `results` by task and `metric,filter`, `samples` by task, `higher_is_better`,
            and `group_subtasks`. Numbers that are not finite are left out.
    """
    return [
        _score(results, task, name, float(value))
        for task, numbers in results["results"].items()
        for name, value in numbers.items()
        if "," in name and not name.partition(",")[0].endswith(_STDERR)
        if isinstance(value, int | float) and math.isfinite(value)
    ]


def _score(results: Mapping[str, Any], task: str, name: str, value: float) -> TaskScore:
    metric, _, kind = name.partition(",")
    numbers = results["results"][task]
    error = numbers.get(f"{metric}{_STDERR},{kind}")
    known = isinstance(error, int | float) and math.isfinite(error)
    documents = [
        sample
        for leaf in _leaves(task, results.get("group_subtasks", {}))
        for sample in results.get("samples", {}).get(leaf, ())
        if sample.get("filter", kind) == kind
    ]
    values: list[Any] = [
        sample.get(metric) for sample in sorted(documents, key=lambda one: int(one["doc_id"]))
    ]
    if not _is_mean_of(value, values):
        values = []
    return TaskScore(
        task=task,
        metric=metric,
        filter=kind,
        value=value,
        better=_BETTER[results.get("higher_is_better", {}).get(task, {}).get(metric)],
        documents=len(documents),
        error=float(error) if known else None,
        values=tuple(float(number) for number in values) or None,
    )


def _leaves(task: str, children: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield the tasks that a group consists of; a task consists of itself."""
    if children.get(task):
        for child in children[task]:
            yield from _leaves(child, children)
    else:
        yield task


def _is_mean_of(value: float, values: Sequence[object]) -> bool:
    """Whether a task's number is the mean of its documents' numbers (a perplexity is not)."""
    plain = (int, float, np.number, np.bool_)
    if not values or not all(isinstance(number, plain) for number in values):
        return False
    return bool(np.isclose(np.mean(np.array(values, dtype=np.float64)), value))


@dataclass(frozen=True)
class TaskComparison:
    """One task's number of every model.

    Attributes:
        score: the baseline's, which says what it is.
        values: by model, the baseline first.
        differences: by model but the baseline, its value less the baseline's; the interval is over
            documents, and infinite where a task has no numbers of documents.
    """

    score: TaskScore
    values: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        score = self.score
        return {
            "task": score.task,
            "metric": score.name.removeprefix(f"{score.task}/"),
            "better": score.better,
            "documents": score.documents,
            "paired": score.values is not None,
            "values": {model: estimate_to_json(one) for model, one in self.values.items()},
            "differences": {m: estimate_to_json(one) for m, one in self.differences.items()},
        }


def compare_tasks(scores: Mapping[str, Sequence[TaskScore]], seed: int) -> list[TaskComparison]:
    """Return each number that all models have.

    Args:
        scores: by model, the baseline first.
        seed: seed of the bootstrap.
    """
    baseline, *others = scores
    by_name = {model: {score.name: score for score in own} for model, own in scores.items()}
    return [
        TaskComparison(
            score,
            {model: by_name[model][name].estimate(seed) for model in scores},
            {model: _difference(score, by_name[model][name], seed) for model in others},
        )
        for name, score in by_name[baseline].items()
        if all(name in own for own in by_name.values())
    ]


def _difference(a: TaskScore, b: TaskScore, seed: int) -> Estimate:
    if a.values is not None and b.values is not None and len(a.values) == len(b.values):
        return paired_difference(a.values, b.values, seed)
    return Estimate(b.value - a.value, -math.inf, math.inf)


def scalars(comparisons: Sequence[TaskComparison]) -> dict[str, float]:
    """Return the numbers under flat names, for trackers and manifests."""
    numbers: dict[str, float] = {}
    for one in comparisons:
        for model, value in one.values.items():
            numbers[f"harness/{model.replace(' ', '_')}/{one.score.name}"] = value.mean
        for model, value in one.differences.items():
            name = f"harness/{model.replace(' ', '_')}/{one.score.name}/difference"
            numbers[name] = value.mean
    return numbers
