"""A study as one of its workers sees it: ask for a trial, tell how it went, take lost ones back.

Any number of workers share a study. Who asks holds the study's lease meanwhile, so that there are
never more trials than wanted; who runs a trial holds the trial's. A trial without a holder has lost
its worker, and is tried again with the same values: its checkpoints are found by these.

The study that all workers share: one append-only file, on a file system that all of them see.

No server, and no SQLite, whose locks fail on network file systems. Writers take turns by a lock
file that is made with O_EXCL, which NFS since version 3, Lustre, GPFS and local file systems do
atomically. Optuna's other lock, a symbolic link, is for NFS version 2, and judges a dead holder by
the journal's age instead of the lock's. A lock that a killed writer leaves is broken after 30 s.

What a study tries next: Optuna's distributions and its TPE sampler.

A study in numbers: its trials, the best of them, and what pruning has saved.
"""

from __future__ import annotations

import json
import math
import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_exp.errors import UserError
from rlhf_exp.store.fingerprint import key_of
from rlhf_exp.store.lease import Lease, hold, try_hold
from rlhf_exp.store.store import Store

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages.journal import JournalFileOpenLock
    from optuna.trial import FrozenTrial

ATTEMPTS = 3
TRIALS = "trials"
PUT_BACK, ATTEMPT, REACHED, ERROR, WORKER = "put_back", "attempt", "reached", "error", "worker"


@dataclass(frozen=True)
class SearchSettings:
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


class TrialHandle:
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

    def requeue(self, lost: bool = False) -> None:
        """Let another worker, or the next command, run it.

        Args:
            lost: Whether a process died of it; else this worker has to leave.
        """
        self._search.requeue(self._search.frozen(self.id), lost)

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
        wanted: SearchSettings,
        pruning: Pruning,
        worker: int = 0,
    ) -> None:
        self.store, self.name, self.wanted, self.worker = store, name, wanted, worker
        self.study = open_study(folder, pruning)
        if self.study.user_attrs.get(TRIALS) != wanted.trials:
            self.study.set_user_attr(TRIALS, wanted.trials)

    @contextmanager
    def ask(self) -> Iterator[TrialHandle | None]:
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

    def requeue(self, trial: FrozenTrial, lost: bool = True) -> None:
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

    def _ask(self) -> TrialHandle | None:
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
        asked = TrialHandle(self, trial.number, trial._trial_id, dict(trial.params))
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
                    self.requeue(trial)

    def _in(self, *states: str) -> list[FrozenTrial]:
        known = imported().trial.TrialState
        wanted = tuple(known[state] for state in states)
        return self.study.get_trials(deepcopy=False, states=wanted)

    def _lease(self, number: int) -> str:
        return f"{self.name}-{number}"


NAME = "ppo"
_FILE = "journal.log"
_GRACE_S = 30


@dataclass(frozen=True)
class Pruning:
    """When a trial is given up; plain values, which cross processes.

    Attributes:
        rule: `median`, `asha`, `hyperband` or `none`.
        after: Complete trials that the median rule waits for.
        warmup: Evaluations of a trial before it can be pruned, the one before training aside.
        evaluations: Evaluations of a whole trial, the one before training aside.
    """

    rule: str
    after: int
    warmup: int
    evaluations: int


def open_study(
    folder: Path, pruning: Pruning | None = None, sampler: BaseSampler | None = None
) -> Study:
    """Open the study in a folder, or make it.

    Args:
        folder: On a file system that all workers share.
        pruning: When trials are given up.
        sampler: What is tried next.

    Raises:
        UserError: Optuna is missing, or the journal is damaged.
    """
    optuna = imported()
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _FILE
    lock = JournalFileOpenLock(str(path), grace_period=_GRACE_S)
    _mend(path, lock)
    try:
        storage = JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    except ValueError as error:
        raise UserError(
            f"{path}: not a readable study ({error}); move the folder away, or use another name"
        ) from error
    return optuna.create_study(
        storage=storage,
        sampler=sampler or optuna.samplers.RandomSampler(seed=0),
        pruner=pruner_of(pruning),
        study_name=NAME,
        direction="maximize",
        load_if_exists=True,
    )


def exists(folder: Path) -> bool:
    """Whether there is a study in a folder."""
    return (folder / _FILE).is_file()


def imported():  # type: ignore[no-untyped-def] # noqa: ANN201 - the module
    """Return Optuna, told to be quiet.

    Raises:
        UserError: It is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "a study needs Optuna, which is not installed: pip install 'rlhf-exp[sweeps]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def pruner_of(pruning: Pruning | None) -> BasePruner:
    """Return Optuna's pruner."""
    from optuna import pruners

    if pruning is None or pruning.rule == "none":
        return pruners.NopPruner()
    first = pruning.warmup + 1
    if pruning.rule == "asha":
        return pruners.SuccessiveHalvingPruner(min_resource=first)
    if pruning.rule == "hyperband":
        return pruners.HyperbandPruner(first, max_resource=max(first, pruning.evaluations))
    return pruners.MedianPruner(n_startup_trials=pruning.after, n_warmup_steps=first)


def _mend(path: Path, lock: JournalFileOpenLock) -> None:
    """Remove a last line that a writer did not finish: nothing could be read after it any more."""
    if not path.exists():
        return
    from optuna.storages.journal._file import get_lock_file

    with path.open("rb") as file:
        if _whole(file.read()):
            return
    with get_lock_file(lock), path.open("r+b") as file:
        content = file.read()
        if not _whole(content):
            file.truncate(content.rfind(b"\n") + 1)
            file.flush()
            os.fsync(file.fileno())


def _whole(content: bytes) -> bool:
    return not content or content.endswith(b"\n")


DIGITS = 4


def distribution_of(
    ends: tuple[float, float] | None,
    log: bool,
    step: float | None,
    choices: list[float] | None,
    whole: bool,
) -> BaseDistribution:
    """Return the distribution of one hyperparameter.

    Args:
        ends: Smallest and largest value.
        log: Whether the scale is logarithmic.
        step: Distance of the values.
        choices: The values themselves.
        whole: Whether they are whole numbers.
    """
    kinds = imported().distributions
    if choices is not None:
        listed = [int(one) if whole else one for one in choices]
        return kinds.CategoricalDistribution(listed)
    assert ends is not None
    if whole:
        return kinds.IntDistribution(int(ends[0]), int(ends[1]), log, int(step or 1))
    return kinds.FloatDistribution(*ends, log, step)


def sampler_of(startup: int, together: bool, stream: tuple[int, ...]) -> BaseSampler:
    """Return TPE (Bergstra et al. 2011), with all hyperparameters in one density.

    Args:
        startup: Trials drawn at random before it goes by results.
        together: Whether others run at the same time; it then keeps away from what they try.
        stream: Names the stream of random numbers.
    """
    seed = int(key_of({"stream": stream}), 16) % 2**32
    return imported().samplers.TPESampler(
        n_startup_trials=startup, multivariate=True, constant_liar=together, seed=seed
    )


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    """Return values as they are tried: with four digits, so that they can be read and typed."""
    return {
        key: value if isinstance(value, int) else float(f"{value:.{DIGITS}g}")
        for key, value in values.items()
    }


def fitting(values: Mapping[str, float], space: Mapping[str, BaseDistribution]) -> dict[str, float]:
    """Return those of the values that the space contains."""
    found = {}
    for key, distribution in space.items():
        try:
            inside = distribution._contains(distribution.to_internal_repr(values[key]))
        except (KeyError, ValueError):
            inside = False
        if inside:
            found[key] = values[key]
    return found


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
class StudySummary:
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


def summary_of(study: Study) -> StudySummary:
    """Return a study's summary."""
    trials = study.get_trials(deepcopy=False)
    kept = [trial for trial in trials if not trial.user_attrs.get(PUT_BACK)]
    return StudySummary([_view(trial) for trial in kept], len(trials) - len(kept))


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
