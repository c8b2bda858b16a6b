"""Overoptimisation: reward against KL, with judges that were not optimised as referees.

Anything maximised against a learned reward (the proxy) moves away from where the proxy was trained,
and from some distance on the proxy rises while the true quality falls (Gao, Schulman and Hilton
2022, "Scaling laws for reward model overoptimization"). The distance is the KL divergence from the
starting policy, and as in that paper the curves are drawn against its square root.

Two ways of optimising are measured: best-of-n, which needs no training, and a policy's own answers.

Legend: P prompts, S answers of the starting policy to each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf_exp.algo.rounding import is_rounding
from rlhf_exp.evaluation.preference import estimate_to_json
from rlhf_exp.evaluation.statistics import Estimate, estimate_mean

BEST_OF = "best of n"
"""Name of the path of best-of-n."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PolicyPoint:
    """One optimised policy.

    Attributes:
        label: its name.
        kl: KL from the starting policy, nats per answer.
        gains: by judge, the mean over prompts of its score minus the starting policy's on the same
            prompt, in standard deviations of the starting policy's scores.
    """

    label: str
    kl: float
    gains: Mapping[str, Estimate]


@dataclass(frozen=True)
class TrainingPath:
    """Points of one way to optimise, by rising KL.

    Attributes:
        name: the way of optimising, or the policy's name.
        points: at least one; the start, at KL 0 with no gain, is not among them.
    """

    name: str
    points: tuple[PolicyPoint, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"name": self.name, "points": [_point_to_json(point) for point in self.points]}


def _point_to_json(point: PolicyPoint) -> dict[str, Any]:
    gains = {judge: estimate_to_json(gain) for judge, gain in point.gains.items()}
    return {"label": point.label, "kl": point.kl, "gains": gains}


class StartingPolicy:
    """The scores of the starting policy's answers, whose spread is the unit of gains.

    Args:
        scores: by judge [P, S]; the first judge is the proxy.
        seed: seed of the bootstrap.
    """

    def __init__(self, scores: Mapping[str, ArrayLike], seed: int) -> None:
        self.scores = {name: np.asarray(values, np.float64) for name, values in scores.items()}
        self.proxy = next(iter(self.scores))
        self.seed = seed
        # A judge that gives every answer the same score has no spread to measure gains in.
        self.judges = [
            name
            for name, values in self.scores.items()
            if not is_rounding(float(np.ptp(values)), float(np.abs(values).max()))
        ]

    def best_of(self, sizes: Sequence[int]) -> TrainingPath | None:
        """Return the path of best-of-n for each n; `None` without an n above 1."""
        points = []
        for n in sizes:
            if n > 1:
                best_scores = {
                    name: best_of_n(self.scores[self.proxy], self.scores[name], n)
                    for name in self.judges
                }
                points.append(self.point(f"best of {n}", best_of_n_kl(n), best_scores))
        return TrainingPath(BEST_OF, tuple(points)) if points else None

    def point(self, label: str, kl: float, scores: Mapping[str, ArrayLike]) -> PolicyPoint:
        """Return the gains of a policy's `scores`, by judge [P]."""
        gains = {}
        for name in self.judges:
            start = self.scores[name]
            gain = np.asarray(scores[name], np.float64) - start.mean(axis=1)
            gains[name] = estimate_mean(gain / start.std(), self.seed)
        return PolicyPoint(label, kl, gains)

    def path(self, name: str, points: Sequence[PolicyPoint]) -> TrainingPath:
        """Return points as a path."""
        return TrainingPath(name, tuple(sorted(points, key=lambda point: point.kl)))


def best_of_n(proxy: ArrayLike, values: ArrayLike, n: int) -> Floats:
    """Return the expected value [P] of the answer that the proxy likes best among n.

    The mean over all ways to draw n of the S answers without replacement (Nakano et al. 2021,
    appendix I): with the answers in the proxy's order, the r-th lowest is the best of a draw if the
    other n - 1 are below it, which C(r - 1, n - 1) of C(S, n) draws are.

    Args:
        proxy: [P, S] scores that choose the answer.
        values: [P, S] scores to average: the proxy's own, or a referee's.
        n: from 1 to S.
    """
    order = np.argsort(np.asarray(proxy, dtype=np.float64), axis=1, kind="stable")
    ranked = np.take_along_axis(np.asarray(values, dtype=np.float64), order, axis=1)
    size = ranked.shape[1]
    # From the highest rank down: the binomials themselves outgrow a float from S = 1030 on.
    ratios = [(rank - n + 1) / rank for rank in range(size - 1, 0, -1)]
    weights = np.maximum(np.cumprod([n / size, *ratios])[::-1], 0.0)
    means: Floats = ranked @ weights
    return means


def best_of_n_kl(n: int) -> float:
    """Return the KL divergence of best-of-n from the policy it draws from, in nats.

    log n - (n - 1) / n (Stiennon et al. 2020, appendix G.3): exact if no two answers are equally
    good, an upper bound otherwise (Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n


def best_of_n_sizes(most: int) -> list[int]:
    """Return the powers of two up to `most`, and `most`."""
    powers = [2**power for power in range(most.bit_length())]
    return [*powers, most] if powers[-1] != most else powers
