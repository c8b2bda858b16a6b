"""What trlx logs, under this project's names where it means the same.

Its own measures of KL are left under `trlx/`: they are estimates of another divergence, over prompt
and padding too. Scores, lengths and the sum of log-ratios are counted here, by our definitions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev

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
    "time/update": "time/update_s",
}
UPDATE = "losses/total_loss"
"""What trlx logs after an optimizer step, and at no other time."""


@dataclass
class Iteration:
    """One iteration, as far as it is known.

    Attributes:
        scores: Raw scores.
        deltas: Scores less the penalty for not ending and the score of the data's own response;
            empty where that is not subtracted.
        lengths: Tokens of the responses, with what ended them.
        parts: Number of parts in which they were sampled.
        kl: Sum of log policy - log reference of each response; empty where it is not known.
        seconds: That the experience took.
        rollouts: What trlx logged of it: means over the parts.
        updates: What it logged of each optimizer step.
        scaled: Whether scores are divided by their running standard deviation.
    """

    scaled: bool
    scores: list[float] = field(default_factory=list)
    deltas: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    parts: int = 0
    kl: Sequence[float] = ()
    seconds: float = 0.0
    rollouts: Mapping[str, float] = field(default_factory=dict)
    updates: list[Mapping[str, float]] = field(default_factory=list)

    def metrics(self) -> dict[str, float]:
        """Return the iteration's metrics."""
        found = {
            "reward/mean": fmean(self.scores),
            "reward/std": pstdev(self.scores),
            "reward/min": min(self.scores),
            "reward/max": max(self.scores),
            "response/length_mean": fmean(self.lengths),
        }
        if self.deltas:
            found["reward/delta_mean"] = fmean(self.deltas)
        if self.kl:
            found["kl/sequence"] = fmean(self.kl)
        if self.scaled:
            found["reward/scale"] = self.rollouts["rollout_scores/running_std"]
        found |= {name: self.rollouts[theirs] for theirs, name in _ROLLOUTS.items()}
        for theirs, name in _UPDATES.items():
            found[name] = fmean(one[theirs] for one in self.updates)
        found |= {name: self.updates[-1][theirs] for theirs, name in _LAST.items()}
        return found | self._times(found["time/update_s"])

    def _times(self, updating: float) -> dict[str, float]:
        sampling = self.rollouts["time/rollout_generate"] * self.parts
        scoring = self.rollouts["time/rollout_score"] * self.parts
        total = self.seconds + updating
        return {
            "time/rollout_s": sampling,
            "time/score_s": scoring,
            "time/assess_s": self.seconds - sampling - scoring,
            "throughput/samples_per_s": len(self.scores) / total,
            "throughput/tokens_per_s": sum(self.lengths) / total,
        }
