"""A hyperparameter study: its journal, workers that ask for trials, the sampler, and a summary.

Optuna stores the trials and suggests values; leases of the store coordinate the workers.
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

ATTEMPTS = 3  # of a trial whose workers die without progress
_GRACE_S = 30
_JOURNAL = "journal.log"
_STUDY_NAME = "ppo"
_DIGITS = 4
# Names of user attributes in the journal: of the study, and of trials.
TRIALS = "trials"
REQUEUED, ATTEMPT, REACHED, ERROR, WORKER = "put_back", "attempt", "reached", "error", "worker"


@dataclass(frozen=True)
class SearchSettings:
    """Size and search space of a study.

    Attributes:
        trials: Number of trials.
        space: The distribution of each searched hyperparameter, by config key.
        first: Values of the first trial; those outside the space are left out.
        startup: Trials drawn at random before TPE uses their results.
        workers: Number of workers at the same time.
        seed: Seed of the sampler.
    """

    trials: int
    space: Mapping[str, BaseDistribution]
    first: Mapping[str, float]
    startup: int
    workers: int
    seed: int


@dataclass(frozen=True)
class Pruning:
    """The rule by which trials are pruned, as plain values that can be sent to other processes.

    Attributes:
        rule: `median`, `asha`, `hyperband` or `none`.
        after: Complete trials that the median rule waits for.
        warmup: Evaluations of a trial before it can be pruned, without the one before training.
        evaluations: Evaluations of a complete trial, without the one before training.
    """

    rule: str
    after: int
    warmup: int
    evaluations: int


class Search:
    """A study, as one of its workers uses it.

    Any number of workers share a study. A worker that asks for a trial holds the study's lease
    meanwhile, so that there are never too many trials; a worker that runs a trial holds the
    trial's. A trial without a holder has lost its worker, and is tried again with the same values:
    its checkpoints are found by these.

    Args:
        folder: The study's folder.
        store: The store whose leases are used.
        name: The study's name, part of the leases' names.
        settings: Size and search space.
        pruning: The rule by which trials are pruned.
        worker: Number of this worker.
    """

    def __init__(
        self,
        folder: Path,
        store: Store,
        name: str,
        settings: SearchSettings,
        pruning: Pruning,
        worker: int = 0,
    ) -> None:
        self.store, self.name, self.settings, self.worker = store, name, settings, worker
        self.study = open_study(folder, pruning)
        if self.study.user_attrs.get(TRIALS) != settings.trials:
            self.study.set_user_attr(TRIALS, settings.trials)

    @contextmanager
    def ask(self) -> Iterator[TrialHandle | None]:
        """Yield the next trial and hold its lease; `None` if the study has all its trials."""
        with ExitStack() as stack:
            with hold(self.store.root, "study", self.name):
                trial = self._ask()
                if trial is not None:
                    lease = hold(self.store.root, "trial", self._lease_name(trial.number))
                    trial.lease = stack.enter_context(lease)
            yield trial

    def frozen(self, id: int) -> FrozenTrial:
        """Return a trial as it is now."""
        return self.study._storage.get_trial(id)

    def running(self) -> int:
        """Return the number of running trials, after requeueing those without a worker."""
        with hold(self.store.root, "study", self.name):
            self._requeue_lost()
            return len(self._trials_in("RUNNING"))

    def requeue(self, trial: FrozenTrial, lost: bool = True) -> None:
        """End a trial without a result, and queue its values again.

        Args:
            trial: The trial.
            lost: Whether its worker died. If that happens `ATTEMPTS` times without progress, the
                trial has failed.
        """
        storage, attrs = self.study._storage, trial.user_attrs
        reached = max(trial.intermediate_values, default=-1)
        progressed = reached > attrs.get(REACHED, -1)
        attempt = 1 if progressed else attrs.get(ATTEMPT, 1) + lost
        failed = import_optuna().trial.TrialState.FAIL
        if attempt > ATTEMPTS:
            error = f"its worker died {ATTEMPTS} times without getting any further"
            storage.set_trial_user_attr(trial._trial_id, ERROR, error)
            storage.set_trial_state_values(trial._trial_id, failed)
            return
        storage.set_trial_user_attr(trial._trial_id, REQUEUED, True)
        storage.set_trial_state_values(trial._trial_id, failed)
        facts = {ATTEMPT: attempt, REACHED: max(reached, attrs.get(REACHED, -1))}
        self.study.enqueue_trial(trial.params, user_attrs=facts)

    def _ask(self) -> TrialHandle | None:
        self._requeue_lost()
        if not self.study.get_trials(deepcopy=False):
            self.study.enqueue_trial(values_in_space(self.settings.first, self.settings.space))
        if self._count() >= self.settings.trials:
            return None
        self.study.sampler = sampler_of(
            self.settings.startup,
            self.settings.workers > 1,
            # Every trial of every worker has its own random stream, also when a study is continued.
            (self.settings.seed, self.worker, len(self.study.get_trials(deepcopy=False))),
        )
        trial = self.study.ask(dict(self.settings.space))
        handle = TrialHandle(self, trial.number, trial._trial_id, dict(trial.params))
        handle.note(**{WORKER: f"process {os.getpid()} on {socket.gethostname()}"})
        return handle

    def _count(self) -> int:
        """Return the number of trials, without those that were requeued or still wait."""
        trials = self._trials_in("RUNNING", "COMPLETE", "PRUNED", "FAIL")
        return sum(not trial.user_attrs.get(REQUEUED) for trial in trials)

    def _requeue_lost(self) -> None:
        """Requeue the trials whose worker is gone."""
        for trial in self._trials_in("RUNNING"):
            with try_hold(self.store.root, "trial", self._lease_name(trial.number)) as lease:
                if lease is None:
                    continue
                # Read again: its worker may have ended it and released the lease since.
                current = self.frozen(trial._trial_id)
                if not current.state.is_finished():
                    self.requeue(current)

    def _trials_in(self, *states: str) -> list[FrozenTrial]:
        names = import_optuna().trial.TrialState
        selected = tuple(names[state] for state in states)
        return self.study.get_trials(deepcopy=False, states=selected)

    def _lease_name(self, number: int) -> str:
        return f"{self.name}-{number}"


class TrialHandle:
    """A trial that this worker runs.

    Attributes:
        number: Its number in the study.
        id: Optuna's id.
        values: Its hyperparameters, by config key.
        lease: The trial's lease; checked before results are written.
    """

    def __init__(self, search: Search, number: int, id: int, values: dict[str, float]) -> None:
        self._search = search
        self.number, self.id, self.values = number, id, values
        self.lease: Lease | None = None

    def note(self, **facts: str | float | None) -> None:
        """Store facts with the trial, as Optuna's user attributes."""
        for name, fact in facts.items():
            self._search.study._storage.set_trial_user_attr(self.id, name, fact)

    def complete(self, value: float) -> bool:
        """Record its objective; a trial whose objective is not finite has failed.

        Returns:
            Whether the objective is finite.
        """
        if not math.isfinite(value):
            self.fail(f"the objective is {value}")
            return False
        self._tell("COMPLETE", value)
        return True

    def prune(self) -> None:
        """Record that it was pruned; its value is the last that was reported."""
        self._tell("PRUNED", None)

    def fail(self, error: str) -> None:
        """Record that it has failed."""
        self.note(**{ERROR: error})
        self._tell("FAIL", None)

    def requeue(self, lost: bool = False) -> None:
        """Queue its values again, for another worker or the next command.

        Args:
            lost: Whether one of its processes died; else this worker has to leave.
        """
        self._search.requeue(self._search.frozen(self.id), lost)

    def _tell(self, state: str, value: float | None) -> None:
        if self.lease is not None:
            self.lease.check()
        states = import_optuna().trial.TrialState
        self._search.study.tell(self.number, value, states[state])


def open_study(
    folder: Path, pruning: Pruning | None = None, sampler: BaseSampler | None = None
) -> Study:
    """Open the study in a folder, or create it.

    All workers share one append-only journal, on a file system that all of them see: no server, and
    no SQLite, whose locks fail on network file systems. Writers take turns by a lock file created
    with O_EXCL, which NFS since version 3, Lustre, GPFS and local file systems do atomically.
    Optuna's other lock, a symbolic link, is for NFS version 2, and judges a dead holder by the
    journal's age instead of the lock's. A lock that a killed writer leaves is broken after 30 s.

    Args:
        folder: On a file system that all workers share.
        pruning: The rule by which trials are pruned; None: no pruning.
        sampler: Suggests the next values; by default at random.

    Raises:
        UserError: Optuna is missing, or the journal is damaged.
    """
    optuna = import_optuna()
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _JOURNAL
    lock = JournalFileOpenLock(str(path), grace_period=_GRACE_S)
    _remove_torn_line(path, lock)
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
        study_name=_STUDY_NAME,
        direction="maximize",
        load_if_exists=True,
    )


def study_exists(folder: Path) -> bool:
    """Return whether there is a study in a folder."""
    return (folder / _JOURNAL).is_file()


def import_optuna():  # type: ignore[no-untyped-def] # noqa: ANN201 - the module
    """Import Optuna and silence its messages.

    Raises:
        UserError: It is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "a study needs Optuna, which is not installed: `pip install optuna` (extra `sweeps`)"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def pruner_of(pruning: Pruning | None) -> BasePruner:
    """Return Optuna's pruner for a rule."""
    from optuna import pruners

    if pruning is None or pruning.rule == "none":
        return pruners.NopPruner()
    first = pruning.warmup + 1
    if pruning.rule == "asha":
        return pruners.SuccessiveHalvingPruner(min_resource=first)
    if pruning.rule == "hyperband":
        return pruners.HyperbandPruner(first, max_resource=max(first, pruning.evaluations))
    return pruners.MedianPruner(n_startup_trials=pruning.after, n_warmup_steps=first)


def sampler_of(startup: int, parallel: bool, stream: tuple[int, ...]) -> BaseSampler:
    """Return a TPE sampler (Bergstra et al. 2011), with all hyperparameters in one density.

    Args:
        startup: Trials drawn at random before results are used.
        parallel: Whether other trials run at the same time; TPE then avoids values near theirs.
        stream: Identifies the stream of random numbers.
    """
    seed = int(key_of({"stream": stream}), 16) % 2**32
    return import_optuna().samplers.TPESampler(
        n_startup_trials=startup, multivariate=True, constant_liar=parallel, seed=seed
    )


def distribution_of(
    bounds: tuple[float, float] | None,
    log: bool,
    step: float | None,
    choices: list[float] | None,
    integer: bool,
) -> BaseDistribution:
    """Return the distribution of one hyperparameter.

    Args:
        bounds: Smallest and largest value; `None` with `choices`.
        log: Whether the scale is logarithmic.
        step: Distance between values; `None`: 1 for integers, else continuous.
        choices: The values themselves; `None` with `bounds`.
        integer: Whether values are integers.
    """
    distributions = import_optuna().distributions
    if choices is not None:
        values = [int(choice) if integer else choice for choice in choices]
        return distributions.CategoricalDistribution(values)
    assert bounds is not None
    if integer:
        return distributions.IntDistribution(int(bounds[0]), int(bounds[1]), log, int(step or 1))
    return distributions.FloatDistribution(*bounds, log, step)


def round_values(values: Mapping[str, float]) -> dict[str, float]:
    """Return values rounded to four digits, so that they can be read and typed."""
    return {
        key: value if isinstance(value, int) else float(f"{value:.{_DIGITS}g}")
        for key, value in values.items()
    }


def values_in_space(
    values: Mapping[str, float], space: Mapping[str, BaseDistribution]
) -> dict[str, float]:
    """Return those of the values that the search space contains."""
    contained = {}
    for key, distribution in space.items():
        try:
            inside = distribution._contains(distribution.to_internal_repr(values[key]))
        except (KeyError, ValueError):
            inside = False
        if inside:
            contained[key] = values[key]
    return contained


def _remove_torn_line(path: Path, lock: JournalFileOpenLock) -> None:
    """Remove a last line that a killed writer left incomplete: later ones would be unreadable."""
    if not path.exists():
        return
    from optuna.storages.journal._file import get_lock_file  # noqa: PLC2701 - no public one

    with path.open("rb") as file:
        if _is_complete(file.read()):
            return
    with get_lock_file(lock), path.open("r+b") as file:
        content = file.read()
        if not _is_complete(content):
            file.truncate(content.rfind(b"\n") + 1)
            file.flush()
            os.fsync(file.fileno())


def _is_complete(content: bytes) -> bool:
    return not content or content.endswith(b"\n")


@dataclass(frozen=True)
class TrialView:
    """A trial, for display.

    Attributes:
        number: Its number in the study.
        state: `done`, `pruned`, `failed`, `running` or `waiting`.
        values: Its hyperparameters, by config key.
        objective: Its objective, or the last one reported.
        key: Key of its policy in the store.
        iterations: PPO iterations of a complete trial with these values.
        iterations_run: Iterations run for it; 0 if its policy was in the store.
        seconds: Time that these took.
        error: The error, if it failed.
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
    """The trials of a study, for display.

    Attributes:
        trials: Its trials, without those that were started again under another number.
        requeued: Number of trials that were started again.
    """

    trials: list[TrialView]
    requeued: int

    def count(self, state: str) -> int:
        """Return the number of trials in a state."""
        return sum(trial.state == state for trial in self.trials)

    @property
    def best(self) -> list[TrialView]:
        """The completed trials, the best first."""
        done = [trial for trial in self.trials if trial.state == "done"]
        return sorted(done, key=lambda trial: (-(trial.objective or 0.0), trial.number))

    @property
    def saved(self) -> int:
        """Iterations that pruning saved."""
        pruned = [trial for trial in self.trials if trial.state == "pruned"]
        return sum(trial.iterations - trial.iterations_run for trial in pruned)

    @property
    def planned(self) -> int:
        """Iterations of the completed and the pruned trials, had none been pruned."""
        ended = [trial for trial in self.trials if trial.state in ("done", "pruned")]
        return sum(trial.iterations for trial in ended)


def summary_of(study: Study) -> StudySummary:
    """Return a study's summary."""
    trials = study.get_trials(deepcopy=False)
    final = [trial for trial in trials if not trial.user_attrs.get(REQUEUED)]
    return StudySummary([_view(trial) for trial in final], len(trials) - len(final))


def best_trials(study: Study, count: int | None = None) -> list[FrozenTrial]:
    """Return the best `count` trials (`None`: all) with different policies, the best first."""
    trials = study.get_trials(deepcopy=False)
    done = [trial for trial in trials if trial.state.name == "COMPLETE"]
    done.sort(key=lambda trial: (-(trial.value or 0.0), trial.number))
    first: dict[str, FrozenTrial] = {}
    for trial in done:
        first.setdefault(trial.user_attrs["key"], trial)
    return list(first.values())[:count]


def best_value(study: Study) -> float | None:
    """Return the best objective so far; `None` before the first."""
    best = best_trials(study, 1)
    return best[0].value if best else None


_STATES = {
    "COMPLETE": "done",
    "PRUNED": "pruned",
    "FAIL": "failed",
    "RUNNING": "running",
    "WAITING": "waiting",
}


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
