"""The metrics of TRL, under this project's names where they mean the same.

TRL's own KL and clipping are left under `trl/`: the first is a mean over tokens, the second with
RLOO over responses. So are DPO's rewards where this project's are means over tokens: TRL's are of
sums whatever its loss takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from rlhf_exp.config.training import PpoConfig
from rlhf_exp.engines.iteration import Dialect, Iteration

LOSS = "loss"
_UPDATES = {
    LOSS: "loss/total",
    "entropy": "policy/entropy",
    "kl": "trl/kl",
    "clip_ratio/region_mean": "trl/clip_fraction",
}
_LAST = {
    "learning_rate": "optim/lr",
    "grad_norm": "optim/grad_norm",
    "peak": "memory/peak_bytes",
}
_REWARDS = {
    "rewards/accuracies": "accuracy",
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
    "rewards/margins": "margin",
}


def dialect(section: PpoConfig) -> Dialect:
    """Return TRL's words of an iteration of RLOO or GRPO."""

    def metrics(iteration: Iteration) -> dict[str, float]:
        updates, rollouts = iteration.updates, iteration.rollouts
        found = iteration.metrics() | {"kl/beta": section.kl.coef}
        for theirs, name in _UPDATES.items():
            # Some are logged at the update that follows the sampling alone.
            values = [update[theirs] for update in updates if theirs in update]
            if values:
                found[name] = fmean(values)
        found |= {name: updates[-1][theirs] for theirs, name in _LAST.items()}
        updating = sum(update["time/update"] for update in updates)
        return found | iteration.times(
            rollouts["time/sample"], rollouts["time/score"], updating - iteration.seconds
        )

    return Dialect(LOSS, metrics)


def pair_metrics(stats: Mapping[str, float], length_normalised: bool) -> dict[str, float]:
    """Return the metrics of an optimizer step of DPO."""
    prefix = "trl" if length_normalised else "dpo"
    rewards = {theirs: f"{prefix}/{name}" for theirs, name in _REWARDS.items()}
    names = {LOSS: "loss/total"} | rewards | _LAST
    return {name: stats[theirs] for theirs, name in names.items()}
