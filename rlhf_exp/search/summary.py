"""A study in numbers: its trials, the best of them, and what pruning has saved."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf_exp.search.search import ERROR, PUT_BACK

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

_STATES = {
    "COMPLETE": "done",
    "PRUNED": "pruned",
    "FAIL": "failed",
    "RUNNING": "running",
    "WAITING": "waiting",
}


@dataclass(frozen=True)
class TrialView:
    """A trial as a user sees it.

    Attributes:
        number: Its number.
        state: `done`, `pruned`, `failed`, `running` or `waiting`.
        values: What it tried, by key.
        objective: Its objective, as far as it came.
        key: Key of its policy.
        iterations: Of a whole trial like it.
        iterations_run: That were run for it; 0 if its policy was in the store.
        seconds: That they took.
        error: What ended it, if it failed.
    """

    number: int
    state: str
    values: dict[str, float]
    objective: float | None
    key: str
    iterations: int
    iterations_run: int
    seconds: float
    error: str


@dataclass(frozen=True)
class Summary:
    """A study.

    Attributes:
        trials: Its trials; without those that were begun again under another number.
        again: How many were.
    """

    trials: list[TrialView]
    again: int

    def count(self, state: str) -> int:
        """Return how many trials are in a state."""
        return sum(trial.state == state for trial in self.trials)

    @property
    def best(self) -> list[TrialView]:
        """The trials that ran to their end, the best first."""
        done = [trial for trial in self.trials if trial.state == "done"]
        return sorted(done, key=lambda trial: (-(trial.objective or 0.0), trial.number))

    @property
    def saved(self) -> int:
        """Iterations that pruned trials were spared."""
        pruned = [trial for trial in self.trials if trial.state == "pruned"]
        return sum(trial.iterations - trial.iterations_run for trial in pruned)

    @property
    def planned(self) -> int:
        """Iterations that the complete and the pruned trials would have had without pruning."""
        ended = [trial for trial in self.trials if trial.state in ("done", "pruned")]
        return sum(trial.iterations for trial in ended)


def summary_of(study: Study) -> Summary:
    """Return a study's summary."""
    trials = study.get_trials(deepcopy=False)
    kept = [trial for trial in trials if not trial.user_attrs.get(PUT_BACK)]
    return Summary([_view(trial) for trial in kept], len(trials) - len(kept))


def best_trials(study: Study, count: int | None = None) -> list[FrozenTrial]:
    """Return the best trials with different policies, the best first; `None`: all of them."""
    done = [one for one in study.get_trials(deepcopy=False) if one.state.name == "COMPLETE"]
    done.sort(key=lambda trial: (-(trial.value or 0.0), trial.number))
    first: dict[str, FrozenTrial] = {}
    for trial in done:
        first.setdefault(trial.user_attrs["key"], trial)
    return list(first.values())[:count]


def best_value(study: Study) -> float | None:
    """Return the best objective so far; `None` before the first."""
    best = best_trials(study, 1)
    return best[0].value if best else None


def _view(trial: FrozenTrial) -> TrialView:
    facts: dict[str, Any] = trial.user_attrs
    return TrialView(
        number=trial.number,
        state=_STATES[trial.state.name],
        values=json.loads(facts["values"]) if "values" in facts else dict(trial.params),
        objective=trial.value,
        key=facts.get("key", ""),
        iterations=int(facts.get("iterations", 0)),
        iterations_run=int(facts.get("iterations_run", 0)),
        seconds=float(facts.get("seconds", 0.0)),
        error=str(facts.get(ERROR, "")),
    )
