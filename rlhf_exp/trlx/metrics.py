"""The metrics of trlx, under this project's names where they mean the same.

trlx's own measures of KL are left under `trlx/`: they are estimates of another divergence, over
prompt and padding too. Scores, lengths and the sum of log-ratios are counted here, as this project
defines them.
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
"""Name of a metric that trlx logs after an optimizer step, and at no other time."""


@dataclass
class Iteration:
    """The measurements of one iteration, as far as they have come.

    Attributes:
        scores: Raw scores.
        deltas: Scores less the penalty for not ending and the score of the data's own response;
            empty where that is not subtracted.
        lengths: Tokens of the responses, with the token that ended them.
        parts: Number of parts in which they were sampled.
        kl: Sum of log policy - log reference of each response; empty where it is not known.
        seconds: Time that the experience took.
        rollouts: Metrics that trlx logged of the experience: means over the parts.
        updates: Metrics that it logged of each optimizer step.
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
        metrics = {
            "reward/mean": fmean(self.scores),
            "reward/std": pstdev(self.scores),
            "reward/min": min(self.scores),
            "reward/max": max(self.scores),
            "response/length_mean": fmean(self.lengths),
        }
        if self.deltas:
            metrics["reward/delta_mean"] = fmean(self.deltas)
        if self.kl:
            metrics["kl/sequence"] = fmean(self.kl)
        if self.scaled:
            metrics["reward/scale"] = self.rollouts["rollout_scores/running_std"]
        metrics |= {name: self.rollouts[theirs] for theirs, name in _ROLLOUTS.items()}
        for theirs, name in _UPDATES.items():
            metrics[name] = fmean(update[theirs] for update in self.updates)
        metrics |= {name: self.updates[-1][theirs] for theirs, name in _LAST.items()}
        return metrics | self._times(metrics["time/update_s"])

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
