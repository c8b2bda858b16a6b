"""Reward against KL, with judges that were not optimised as referees.

Whatever is maximised against a learned reward (the proxy) moves away from where the proxy was
trained, and from some distance on the proxy rises while the quality it stands for falls (Gao,
Schulman and Hilton 2022, "Scaling laws for reward model overoptimization"). The distance is the KL
divergence from the starting policy, and as there the curves are drawn against its square root.

Two ways of optimising are measured: best-of-n, which needs no training, and a policy's own answers.

P prompts, S answers of the starting policy to each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from rlhf_exp.evaluation.preference import estimate_to_json
from rlhf_exp.evaluation.statistics import Estimate, estimate_mean

BEST_OF = "best of n"
"""Name of the path of the best of the baseline's answers."""

Floats = NDArray[np.float64]


def best_of_n_kl(n: int) -> float:
    """Return the KL divergence of best-of-n from the policy it draws from, in nats.

    log n - (n - 1) / n (Stiennon et al. 2020, appendix G.3): exact if no two answers are equally
    good, an upper bound otherwise (Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n


def best_of_n(proxy: ArrayLike, values: ArrayLike, n: int) -> Floats:
    """Return the expected value [P] of the answer that the proxy likes best among n.

    The mean over all ways to draw n of the S answers without replacement (Nakano et al. 2021,
    appendix I): with the answers in the proxy's order, the r-th lowest is the best of a draw if the
    other n - 1 are below it, which C(r - 1, n - 1) of C(S, n) draws are.

    Args:
        proxy: [P, S] what chooses.
        values: [P, S] what is averaged: the proxy itself, or a referee.
        n: from 1 to S.
    """
    order = np.argsort(np.asarray(proxy, dtype=np.float64), axis=1, kind="stable")
    ranked = np.take_along_axis(np.asarray(values, dtype=np.float64), order, axis=1)
    size = ranked.shape[1]
    weights = special.comb(np.arange(size), n - 1) / special.comb(size, n)
    means: Floats = ranked @ weights
    return means


def sizes_of(most: int) -> list[int]:
    """Return the powers of two up to `most`, and `most`."""
    found = [2**power for power in range(most.bit_length())]
    return [*found, most] if found[-1] != most else found


@dataclass(frozen=True)
class PolicyPoint:
    """One optimised policy.

    Attributes:
        label: what it is.
        kl: from the starting policy, nats per answer.
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
        name: the way.
        points: at least one; the start, at KL 0 with no gain, is not among them.
    """

    name: str
    points: tuple[PolicyPoint, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"name": self.name, "points": [_plain(point) for point in self.points]}


def _plain(point: PolicyPoint) -> dict[str, Any]:
    gains = {judge: estimate_to_json(gain) for judge, gain in point.gains.items()}
    return {"label": point.label, "kl": point.kl, "gains": gains}


class StartingPolicy:
    """The starting policy's answers, in whose spread gains are measured.

    Args:
        scores: by judge [P, S]; the first judge is the proxy.
        seed: of the bootstrap.
    """

    def __init__(self, scores: Mapping[str, ArrayLike], seed: int) -> None:
        self.scores = {name: np.asarray(found, np.float64) for name, found in scores.items()}
        self.proxy = next(iter(self.scores))
        self.seed = seed
        # A judge that gives every answer the same score says nothing about any gain.
        self.judges = [name for name, found in self.scores.items() if np.ptp(found) > 0]

    def best_of(self, sizes: Sequence[int]) -> TrainingPath | None:
        """Return the path of best-of-n for each n; `None` without an n above 1."""
        points = []
        for n in sizes:
            if n > 1:
                found = {
                    name: best_of_n(self.scores[self.proxy], self.scores[name], n)
                    for name in self.judges
                }
                points.append(self.point(f"best of {n}", best_of_n_kl(n), found))
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
