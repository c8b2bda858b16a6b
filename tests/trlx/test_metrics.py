from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlhf_exp.engines.iteration import Iteration
from rlhf_exp.trlx.metrics import dialect

ROOT = Path(__file__).parents[2]


def iteration(**changes: object) -> Iteration:
    update = {
        "losses/total_loss": 1.0,
        "losses/policy_loss": 0.4,
        "losses/value_loss": 0.6,
        "policy/clipfrac": 0.1,
        "policy/approx_kl": 0.02,
        "old_values/mean": 0.5,
        "values/clipfrac": 0.3,
        "lr": 2e-4,
        "grad_norm": 3.0,
        "peak": 1000.0,
        "time/update": 1.0,
    }
    later = {"losses/total_loss": 2.0, "lr": 1e-4, "grad_norm": 4.0, "time/update": 2.5}
    rollouts = {
        "kl_ctl_value": 0.05,
        "policy/sqrt_kl": 0.7,
        "rollout_scores/running_std": 1.5,
        "time/rollout_generate": 0.25,
        "time/rollout_score": 0.125,
    }
    values = {
        "scores": [1.0, 3.0],
        "deltas": [0.5, 0.0],
        "lengths": [10, 20],
        "parts": 2,
        "kl": [0.5, 1.5],
        "seconds": 1.5,
        "rollouts": rollouts,
        "updates": [update, update | later],
    }
    return Iteration(**{**values, **changes})


def test_an_iteration_in_numbers() -> None:
    assert dialect(scaled=True).metrics(iteration()) == pytest.approx(
        {
            "reward/mean": 2.0,
            "reward/std": 1.0,  # of the two scores as a whole, not as a sample
            "reward/min": 1.0,
            "reward/max": 3.0,
            "reward/delta_mean": 0.25,
            "reward/scale": 1.5,
            "response/length_mean": 15.0,
            "kl/sequence": 1.0,
            "kl/beta": 0.05,
            "trlx/sqrt_kl": 0.7,
            "trlx/approx_kl": 0.02,
            "loss/total": 1.5,
            "loss/policy": 0.4,
            "loss/value": 0.6,
            "policy/clip_fraction": 0.1,
            "value/mean": 0.5,
            "value/clip_fraction": 0.3,
            "optim/lr": 1e-4,
            "optim/grad_norm": 4.0,
            "memory/peak_bytes": 1000.0,
            "time/rollout_s": 0.5,  # 2 parts of 0.25 s
            "time/score_s": 0.25,
            "time/assess_s": 0.75,  # 1.5 - 0.5 - 0.25
            "time/update_s": 2.5,
            "throughput/samples_per_s": 0.5,  # 2 in 1.5 + 2.5 s
            "throughput/tokens_per_s": 7.5,
        }
    )


def test_what_is_not_known_is_left_out() -> None:
    found = dialect(scaled=False).metrics(iteration(deltas=[], kl=[]))
    assert not {"reward/scale", "reward/delta_mean", "kl/sequence"} & found.keys()


def test_every_metric_is_explained() -> None:
    names = ("reference/metrics.md", "how-to/trlx.md")
    pages = [(ROOT / "docs" / name).read_text() for name in names]
    explained = set(re.findall(r"`([a-z]+/[a-z0-9_]+)`", "".join(pages)))
    assert iteration().metrics().keys() <= explained
