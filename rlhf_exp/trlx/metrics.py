"""The metrics of trlx, under this project's names where they mean the same.

trlx's own measures of KL are left under `trlx/`: they are estimates of another divergence, over
prompt and padding too.
"""

from __future__ import annotations

from statistics import fmean

from rlhf_exp.engines.iteration import Dialect, Iteration

_ROLLOUTS = {
    "kl_ctl_value": "kl/beta",
    "policy/sqrt_kl": "trlx/sqrt_kl",
}
_UPDATES = {
    "losses/total_loss": "loss/total",
    "losses/policy_loss": "loss/policy",
    "losses/value_loss": "loss/value",
    "policy/clipfrac": "policy/clip_fraction",
    "policy/approx_kl": "trlx/approx_kl",
    "old_values/mean": "value/mean",
    "values/clipfrac": "value/clip_fraction",
}
_LAST = {
    "lr": "optim/lr",
    "grad_norm": "optim/grad_norm",
    "peak": "memory/peak_bytes",
}


def dialect(scaled: bool) -> Dialect:
    """Return trlx's words.

    Args:
        scaled: Whether scores are divided by their running standard deviation.
    """

    def metrics(iteration: Iteration) -> dict[str, float]:
        found, rollouts = iteration.metrics(), iteration.rollouts
        if scaled:
            found["reward/scale"] = rollouts["rollout_scores/running_std"]
        found |= {name: rollouts[theirs] for theirs, name in _ROLLOUTS.items()}
        for theirs, name in _UPDATES.items():
            found[name] = fmean(update[theirs] for update in iteration.updates)
        found |= {name: iteration.updates[-1][theirs] for theirs, name in _LAST.items()}
        # trlx logs means over the parts.
        return found | iteration.times(
            rollouts["time/rollout_generate"] * iteration.parts,
            rollouts["time/rollout_score"] * iteration.parts,
            iteration.updates[-1]["time/update"],
        )

    return Dialect("losses/total_loss", metrics)
