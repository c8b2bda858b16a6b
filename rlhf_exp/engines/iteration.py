"""What is measured in one iteration of another trainer, whatever its library calls what it logs.

Scores, lengths and the sum of log-ratios are counted here, as this project defines them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev


@dataclass
class Iteration:
    """The measurements of one iteration, as far as they have come.

    Attributes:
        scores: Raw scores.
        deltas: Scores less the penalty for not ending and the score of the data's own response;
            empty where that is not subtracted.
        lengths: Tokens of the responses, with those that ended them.
        parts: Number of parts in which they were sampled.
        kl: Sum of log policy - log reference of each response; empty where it is not known.
        seconds: Time that the experience took.
        rollouts: Metrics that the library logged of the experience.
        updates: Metrics that it logged of each optimizer step.
    """

    scores: list[float] = field(default_factory=list)
    deltas: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    parts: int = 0
    kl: Sequence[float] = ()
    seconds: float = 0.0
    rollouts: Mapping[str, float] = field(default_factory=dict)
    updates: list[Mapping[str, float]] = field(default_factory=list)

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the responses."""
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
        return metrics

    def times(self, sampling: float, scoring: float, updating: float) -> dict[str, float]:
        """Return the metrics of speed, from the seconds of an iteration's parts."""
        total = self.seconds + updating
        return {
            "time/rollout_s": sampling,
            "time/score_s": scoring,
            "time/assess_s": self.seconds - sampling - scoring,
            "time/update_s": updating,
            "throughput/samples_per_s": len(self.scores) / total,
            "throughput/tokens_per_s": sum(self.lengths) / total,
        }


@dataclass(frozen=True)
class Dialect:
    """The words of a library for what it logs.

    Attributes:
        loss: Name of a metric that it logs after an optimizer step, and at no other time.
        metrics: Returns an iteration's metrics under this project's names.
    """

    loss: str
    metrics: Callable[[Iteration], dict[str, float]]
