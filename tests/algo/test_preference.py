"""Wins by hand, and the same rule as the evaluation's."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import torch

from rlhf_exp.algo.preference import TIE_BAND, wins
from rlhf_exp.evaluation.statistics import outcome_signs


def test_wins_by_hand() -> None:
    # sigmoid(0.41) = 0.6011, sigmoid(0.40) = 0.5987, and their mirror images below one half.
    differences = torch.tensor([0.41, 0.40, 0.0, -0.40, -0.41, 50.0, -50.0])
    points = wins(differences + 3.0, torch.full((7,), 3.0))
    assert points.tolist() == [1.0, 0.5, 0.5, 0.5, 0.0, 1.0, 0.0]


def test_the_rule_is_that_of_the_evaluation() -> None:
    drawn = np.random.default_rng(0).normal(0, 1, (2, 500)).astype(np.float32)
    ours = wins(torch.from_numpy(drawn[1]), torch.from_numpy(drawn[0])).numpy()
    assert ours.tolist() == ((outcome_signs(drawn[0], drawn[1]) + 1) / 2).tolist()
    assert {*ours} == {0.0, 0.5, 1.0}
    assert math.isclose(sum(TIE_BAND), 1.0)


def test_the_evaluation_needs_no_torch() -> None:
    code = "import sys, rlhf_exp.evaluation.statistics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
