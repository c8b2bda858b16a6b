"""Alerts: rules over the rows that PPO logs, for runs that deserve a look.

A run whose numbers are no longer finite stops with an error. These rules catch earlier signs, and
failures that stay finite: a KL that runs away, a reward that collapses, a policy that always says
the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

WINDOW = 5
"""Rows over which the mean reward is averaged: single iterations are noisy."""

COOLDOWN = 20
"""Rows for which an alert is not raised again."""


@dataclass(frozen=True)
class AlertRules:
    """Thresholds; `None` switches a rule off.

    Attributes:
        kl: Sequence KL in nats.
        reward_drop: Largest fall of the mean reward over `WINDOW` rows below its best, in standard
            deviations of the scores at the best.
        entropy: Smallest entropy, as a fraction of the first row's.
    """

    kl: float | None = None
    reward_drop: float | None = None
    entropy: float | None = None


class AlertMonitor:
    """Checks each logged row, in order.

    Args:
        rules: Thresholds; by default no rule is on.
    """

    def __init__(self, rules: AlertRules | None = None) -> None:
        self._rules = rules or AlertRules()
        self._rows = 0
        self._raised: dict[str, int] = {}
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._best: tuple[float, float] | None = None
        self._first_entropy: float | None = None

    def check(self, row: Mapping[str, float]) -> list[tuple[str, str]]:
        """Return titles and texts of the alerts that a row raises.

        Not every engine logs all metrics: rules without theirs raise nothing.
        """
        if "reward/mean" not in row:
            return []
        self._rows += 1
        texts = {
            "KL is far above its target": self._kl(row.get("kl/sequence")),
            "Reward has collapsed": self._reward(row["reward/mean"], row.get("reward/std")),
            "Entropy has collapsed": self._entropy(row.get("policy/entropy")),
        }
        return [(title, text) for title, text in texts.items() if text and self._due(title)]

    def _due(self, title: str) -> bool:
        last = self._raised.get(title)
        if last is not None and self._rows - last <= COOLDOWN:
            return False
        self._raised[title] = self._rows
        return True

    def _kl(self, kl: float | None) -> str | None:
        limit = self._rules.kl
        if limit is None or kl is None or not kl > limit:
            return None
        return f"kl/sequence is {kl:.3g} nats, above {limit:.3g}; a larger ppo.kl.coef holds it."

    def _reward(self, mean: float, deviation: float | None) -> str | None:
        drop = self._rules.reward_drop
        if deviation is None:
            return None
        self._recent.append(mean)
        if drop is None or len(self._recent) < WINDOW:
            return None
        current = sum(self._recent) / WINDOW
        if self._best is None or current > self._best[0]:
            self._best = current, deviation
        best, spread = self._best
        if not best - current > drop * spread:
            return None
        return (
            f"reward/mean over {WINDOW} reports is {current:.3g}, {best - current:.3g} below its "
            f"best; scores had a standard deviation of {spread:.3g} then."
        )

    def _entropy(self, entropy: float | None) -> str | None:
        if entropy is None:
            return None
        if self._first_entropy is None:
            self._first_entropy = entropy
        fraction = self._rules.entropy
        if fraction is None or not entropy < fraction * self._first_entropy:
            return None
        return (
            f"policy/entropy is {entropy:.3g} nats, {self._first_entropy:.3g} in the first report: "
            "the policy hardly varies its answers; see the samples."
        )
