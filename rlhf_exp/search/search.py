"""A study as one of its workers sees it: ask for a trial, tell how it went, take lost ones back.

Any number of workers share a study. Who asks holds the study's lease meanwhile, so that there are
never more trials than wanted; who runs a trial holds the trial's. A trial without a holder has lost
its worker, and is tried again with the same values: its checkpoints are found by these.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_exp.search.journal import Pruning, imported, open_study
from rlhf_exp.search.sampling import fitting, sampler_of
from rlhf_exp.store.lease import Lease, hold, try_hold
from rlhf_exp.store.store import Store

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

ATTEMPTS = 3
TRIALS = "trials"
PUT_BACK, ATTEMPT, REACHED, ERROR, WORKER = "put_back", "attempt", "reached", "error", "worker"


@dataclass(frozen=True)
class Wanted:
    """What a study is to try.

    Attributes:
        trials: How many trials in all.
        space: What is searched, by key.
        first: The values to begin with, as far as they are in the space.
        startup: Trials drawn at random before TPE goes by their results.
        workers: How many work at the same time.
        seed: Of what is tried.
    """

    trials: int
    space: Mapping[str, BaseDistribution]
    first: Mapping[str, float]
    startup: int
    workers: int
    seed: int


class Asked:
    """A trial that this worker runs.

    Attributes:
        number: Its number.
        id: Optuna's id.
        values: What it is to try, by key.
    """

    def __init__(self, search: Search, number: int, id: int, values: dict[str, float]) -> None:
        self._search = search
        self.number, self.id, self.values = number, id, values
        self.lease: Lease | None = None

    def note(self, **facts: str | float | None) -> None:
        """Keep facts with the trial."""
        for name, fact in facts.items():
            self._search.study._storage.set_trial_user_attr(self.id, name, fact)

    def complete(self, value: float) -> bool:
        """Tell its objective; a trial whose objective is no number has failed.

        Returns:
            Whether it is a number.
        """
        if not math.isfinite(value):
            self.fail(f"the objective is {value}")
            return False
        self._tell("COMPLETE", value)
        return True

    def prune(self) -> None:
        """Tell that it was given up; its value is the last that was reported."""
        self._tell("PRUNED", None)

    def fail(self, error: str) -> None:
        """Tell that it has failed."""
        self.note(**{ERROR: error})
        self._tell("FAIL", None)

    def put_back(self, lost: bool = False) -> None:
        """Let another worker, or the next command, run it.

        Args:
            lost: Whether a process died of it; else this worker has to leave.
        """
        self._search.put_back(self._search.frozen(self.id), lost)

    def _tell(self, state: str, value: float | None) -> None:
        if self.lease is not None:
            self.lease.check()
        states = imported().trial.TrialState
        self._search.study.tell(self.number, value, states[state])


class Search:
    """A study, shared by the workers.

    Args:
        folder: The study's.
        store: Whose leases are used.
        name: Names the leases.
        wanted: What to try.
        pruning: When trials are given up.
        worker: Number of this worker.
    """

    def __init__(
        self,
        folder: Path,
        store: Store,
        name: str,
        wanted: Wanted,
        pruning: Pruning,
        worker: int = 0,
    ) -> None:
        self.store, self.name, self.wanted, self.worker = store, name, wanted, worker
        self.study = open_study(folder, pruning)
        if self.study.user_attrs.get(TRIALS) != wanted.trials:
            self.study.set_user_attr(TRIALS, wanted.trials)

    @contextmanager
    def ask(self) -> Iterator[Asked | None]:
        """Hold the next trial, or `None` if there are as many as wanted."""
        with ExitStack() as stack:
            with hold(self.store, "study", self.name):
                asked = self._ask()
                if asked is not None:
                    lease = hold(self.store, "trial", self._lease(asked.number))
                    asked.lease = stack.enter_context(lease)
            yield asked

    def frozen(self, id: int) -> FrozenTrial:
        """Return a trial as it is now."""
        return self.study._storage.get_trial(id)

    def running(self) -> int:
        """Return how many trials run, after a look for those that have lost their worker."""
        with hold(self.store, "study", self.name):
            self._take_back()
            return len(self._in("RUNNING"))

    def put_back(self, trial: FrozenTrial, lost: bool = True) -> None:
        """End a trial without a result, and queue its values again.

        Args:
            trial: The trial.
            lost: Whether its worker died. One that several workers have died of, without getting
                any further, has failed.
        """
        storage, attrs = self.study._storage, trial.user_attrs
        reached = max(trial.intermediate_values, default=-1)
        further = reached > attrs.get(REACHED, -1)
        attempt = 1 if further else attrs.get(ATTEMPT, 1) + lost
        failed = imported().trial.TrialState.FAIL
        if attempt > ATTEMPTS:
            error = f"its worker died {ATTEMPTS} times without getting any further"
            storage.set_trial_user_attr(trial._trial_id, ERROR, error)
            storage.set_trial_state_values(trial._trial_id, failed)
            return
        storage.set_trial_user_attr(trial._trial_id, PUT_BACK, True)
        storage.set_trial_state_values(trial._trial_id, failed)
        facts = {ATTEMPT: attempt, REACHED: max(reached, attrs.get(REACHED, -1))}
        self.study.enqueue_trial(trial.params, user_attrs=facts)

    def _ask(self) -> Asked | None:
        self._take_back()
        if not self.study.get_trials(deepcopy=False):
            self.study.enqueue_trial(fitting(self.wanted.first, self.wanted.space))
        if self._counted() >= self.wanted.trials:
            return None
        self.study.sampler = sampler_of(
            self.wanted.startup,
            self.wanted.workers > 1,
            # Every trial of every worker draws from a stream of its own, also when a study goes on.
            (self.wanted.seed, self.worker, len(self.study.get_trials(deepcopy=False))),
        )
        trial = self.study.ask(dict(self.wanted.space))
        asked = Asked(self, trial.number, trial._trial_id, dict(trial.params))
        asked.note(**{WORKER: f"process {os.getpid()} on {socket.gethostname()}"})
        return asked

    def _counted(self) -> int:
        """Return how many trials there are, those aside that are tried again or still wait."""
        trials = self._in("RUNNING", "COMPLETE", "PRUNED", "FAIL")
        return sum(not trial.user_attrs.get(PUT_BACK) for trial in trials)

    def _take_back(self) -> None:
        """Put back the trials whose worker is gone."""
        for trial in self._in("RUNNING"):
            with try_hold(self.store, "trial", self._lease(trial.number)) as lease:
                if lease is not None:
                    self.put_back(trial)

    def _in(self, *states: str) -> list[FrozenTrial]:
        known = imported().trial.TrialState
        wanted = tuple(known[state] for state in states)
        return self.study.get_trials(deepcopy=False, states=wanted)

    def _lease(self, number: int) -> str:
        return f"{self.name}-{number}"
