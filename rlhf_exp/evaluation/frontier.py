"""The frontier of reward and KL: best-of-n, which trains nothing, and trained models beside it.

Best-of-n answers each prompt with that of n answers of the starting policy which the reward likes
best. It is the curve that a trained policy has to beat: at n answers a prompt it costs a KL of only
`log n - (n - 1) / n` nats (Stiennon et al. 2020), and few methods get more reward for their KL (Gao
et al. 2022, Beirami et al. 2024).

Every number of best-of-n is an expectation over all subsets of n of the S answers sampled to a
prompt, no draw among them: each answer has the probability that it is the best of a subset as its
weight (`overoptimisation.best_of_n`), for the reward as for any other measure of the same answers.

Legend: P prompts, S answers of the starting policy to each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf_exp.evaluation.overoptimisation import best_of_n, best_of_n_kl
from rlhf_exp.evaluation.preference import Better, estimate_to_json
from rlhf_exp.evaluation.statistics import (
    Estimate,
    estimate_from_sums,
    estimate_mean,
    paired_difference,
)

Floats = NDArray[np.float64]
REWARD = "reward"
"""Key of the measure that chooses the best answer."""


@dataclass(frozen=True)
class Measure:
    """A number that every answer has.

    Attributes:
        key: short name, for logs.
        label: name with its unit, for readers.
        better: which direction is an improvement.
    """

    key: str
    label: str
    better: Better


@dataclass(frozen=True)
class CurvePoint:
    """Best-of-n at one n.

    Attributes:
        n: answers to choose from.
        kl: nats per answer from the starting policy; an upper bound where answers tie.
        values: mean over prompts, by measure.
        gains: the same less that of a single answer, prompt by prompt.
    """

    n: int
    kl: float
    values: Mapping[str, Estimate]
    gains: Mapping[str, Estimate]


@dataclass(frozen=True)
class ModelPoint:
    """A trained model.

    Attributes:
        name: its name in tables.
        kl: nats per answer from the starting policy, of the model's own answers.
        values: mean over prompts, by measure.
        over: its lead over best-of-n at the same KL, by measure.
        beyond: whether its KL is above that of the largest n, which it is then compared with.
    """

    name: str
    kl: Estimate
    values: Mapping[str, Estimate]
    over: Mapping[str, Estimate]
    beyond: bool


class BestOfCurve:
    """Best-of-n for every n from 1 to S.

    Args:
        values: by measure [P, S]; `REWARD` chooses.
        seed: seed of the bootstrap.
    """

    def __init__(self, values: Mapping[str, ArrayLike], seed: int) -> None:
        self.values = {key: np.asarray(scores, np.float64) for key, scores in values.items()}
        self.seed = seed
        self.most = self.values[REWARD].shape[1]

    def expected(self, key: str, n: int) -> Floats:
        """Return the expectation of a measure at each prompt [P]."""
        return best_of_n(self.values[REWARD], self.values[key], n)

    def points(self, sizes: Sequence[int]) -> list[CurvePoint]:
        """Return the points of each n."""
        points = []
        for n in sorted(sizes):
            expected = {key: self.expected(key, n) for key in self.values}
            values = {key: estimate_mean(means, self.seed) for key, means in expected.items()}
            gains = {
                key: paired_difference(self.expected(key, 1), means, self.seed)
                for key, means in expected.items()
            }
            points.append(CurvePoint(n, best_of_n_kl(n), values, gains))
        return points

    def model(self, name: str, kl: ArrayLike, values: Mapping[str, ArrayLike]) -> ModelPoint:
        """Return a model's point, compared with best-of-n at the same KL.

        Between n and n + 1 the curve is linear in KL: choosing either at random for each prompt
        gets the mean of both at no more than the mean of their KL, which is convex.

        Args:
            name: its name in tables.
            kl: [P] nats of its answer to each prompt.
            values: by measure [P], those of the curve that the model has too.
        """
        nats = np.asarray(kl, dtype=np.float64)
        distances = np.array([best_of_n_kl(n) for n in range(1, self.most + 1)])
        return ModelPoint(
            name,
            estimate_mean(nats, self.seed),
            {key: estimate_mean(scores, self.seed) for key, scores in values.items()},
            {key: self._lead(key, scores, nats, distances) for key, scores in values.items()},
            bool(nats.mean() > distances[-1]),
        )

    def _lead(self, key: str, scores: ArrayLike, kl: Floats, distances: Floats) -> Estimate:
        """Return a model's mean less that of the curve at its mean KL.

        The interval resamples prompts, and with them the model's values, its KL and the curve.
        """
        own = np.asarray(scores, dtype=np.float64)
        curve = [self.expected(key, n) for n in range(1, self.most + 1)]
        columns = np.stack([own, kl, *curve], axis=1)

        def lead(sums: Floats) -> Floats:
            means = sums / len(own)
            return means[:, 0] - _interpolated(means[:, 1], distances, means[:, 2:])

        return estimate_from_sums(columns, lead, self.seed)


def _interpolated(positions: Floats, grid: Floats, heights: Floats) -> Floats:
    """Return the height [R] of curve r at position r; beyond the grid that of its end.

    Args:
        positions: [R].
        grid: [S] ascending.
        heights: [R, S] of each curve on the grid.
    """
    inside = np.clip(positions, grid[0], grid[-1])
    left = np.clip(np.searchsorted(grid, inside, side="right") - 1, 0, len(grid) - 2)
    share = (inside - grid[left]) / (grid[left + 1] - grid[left])
    rows = np.arange(len(inside))
    heights_between: Floats = heights[rows, left] * (1 - share) + heights[rows, left + 1] * share
    return heights_between


def scalars(points: Sequence[CurvePoint], models: Sequence[ModelPoint]) -> dict[str, float]:
    """Return the numbers under flat names, for trackers and manifests."""
    numbers: dict[str, float] = {}
    for point in points:
        numbers[f"best_of/{point.n}/kl"] = point.kl
        numbers |= {f"best_of/{point.n}/{key}": v.mean for key, v in point.values.items()}
    for model in models:
        prefix = f"frontier/{model.name.replace(' ', '_')}"
        numbers[f"{prefix}/kl"] = model.kl.mean
        numbers |= {f"{prefix}/{key}": value.mean for key, value in model.values.items()}
        numbers |= {f"{prefix}/over_best_of/{key}": lead.mean for key, lead in model.over.items()}
    return numbers


def point_to_json(point: CurvePoint) -> dict[str, Any]:
    """Return plain values."""
    return {
        "n": point.n,
        "kl": point.kl,
        "values": _estimates(point.values),
        "gains": _estimates(point.gains),
    }


def model_to_json(model: ModelPoint) -> dict[str, Any]:
    """Return plain values."""
    return {
        "name": model.name,
        "kl": estimate_to_json(model.kl),
        "values": _estimates(model.values),
        "over": _estimates(model.over),
        "beyond": model.beyond,
    }


def _estimates(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    return {key: estimate_to_json(estimate) for key, estimate in estimates.items()}
