from __future__ import annotations

import json
import math
from itertools import combinations

import numpy as np
import pytest

from rlhf_exp.evaluation.overoptimisation import (
    StartingPolicy,
    best_of_n,
    best_of_n_kl,
    best_of_n_sizes,
)


def test_best_of_n_is_the_mean_over_all_draws() -> None:
    noise = np.random.default_rng(0)
    proxy, values = noise.normal(size=(2, 3, 6))
    for n in (1, 2, 4, 6):
        wanted = [
            np.mean([row[max(draw, key=lambda i: p[i])] for draw in combinations(range(6), n)])
            for p, row in zip(proxy, values, strict=True)
        ]
        assert best_of_n(proxy, values, n) == pytest.approx(wanted)


def test_best_of_n_among_thousands() -> None:
    """C(4000, 2000) is too large for a float; the shares of draws are not."""
    ranks = np.arange(4000.0)[None, :]
    for n in (1, 2000, 4000):
        # The largest of n of 0 to S - 1: n (S + 1) / (n + 1) - 1.
        assert best_of_n(ranks, ranks, n) == pytest.approx([n * 4001 / (n + 1) - 1])


def test_kl_of_best_of_n() -> None:
    # The density of the best of n against one draw, at rank u in (0, 1), is n u^(n-1).
    u = np.linspace(0, 1, 200_001)[1:]
    for n in (1, 2, 16):
        density = n * u ** (n - 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            inside = np.where(density > 0, density * np.log(density), 0.0)
        assert best_of_n_kl(n) == pytest.approx(np.trapezoid(inside, u), abs=1e-3)


def test_sizes() -> None:
    assert best_of_n_sizes(1) == [1]
    assert best_of_n_sizes(16) == [1, 2, 4, 8, 16]
    assert best_of_n_sizes(12) == [1, 2, 4, 8, 12]


def test_gains_by_hand() -> None:
    # Two prompts, two answers each: the start's means are 1 and 2, its deviation sqrt(1.25 + ...):
    # all four scores 0, 2, 1, 3 have mean 1.5 and variance (2.25 + 0.25 + 0.25 + 2.25) / 4 = 1.25.
    start = StartingPolicy(
        {"proxy": [[0.0, 2.0], [1.0, 3.0]], "referee": [[5.0, 1.0], [2.0, 2.0]]}, seed=0
    )
    found = start.point("PPO", 1.0, {"proxy": [3.0, 2.0], "referee": [3.0, 2.0]})
    assert found.gains["proxy"].mean == pytest.approx((2 + 0) / 2 / math.sqrt(1.25))
    assert found.gains["referee"].mean == pytest.approx(0.0)
    best = start.best_of([1, 2])
    assert best is not None
    (two,) = best.points
    assert two.kl == pytest.approx(math.log(2) - 0.5)
    assert two.gains["proxy"].mean == pytest.approx(1 / math.sqrt(1.25))
    # The proxy's choice is the referee's worst on the first prompt: 1 - 3, and 0 on the second.
    # The referee's scores 5, 1, 2, 2 have mean 2.5 and variance (6.25 + 2.25 + 0.25 + 0.25) / 4.
    assert two.gains["referee"].mean == pytest.approx(-1 / math.sqrt(9 / 4))


def test_a_judge_without_an_opinion_is_left_out() -> None:
    scores = {
        "proxy": [[0.0, 1.0]],
        "blind": [[1.0, 1.0]],
        "blind but for rounding": [[0.1, 0.10000001]],
    }
    start = StartingPolicy(scores, seed=0)
    assert start.judges == ["proxy"]
    assert start.best_of([1]) is None


def test_paths_go_by_kl_and_are_plain_json() -> None:
    start = StartingPolicy({"proxy": [[0.0, 1.0]]}, seed=0)
    points = [start.point(str(kl), kl, {"proxy": [1.0]}) for kl in (2.0, 0.5)]
    plain = json.loads(json.dumps(start.path("PPO", points).to_json(), allow_nan=False))
    assert [point["kl"] for point in plain["points"]] == [0.5, 2.0]
    # One prompt says nothing about the spread over prompts.
    assert plain["points"][0]["gains"]["proxy"] == {"mean": 1.0, "low": None, "high": None}
