"""A sweep, or any set of runs, as plain values: what its page, its JSON and its CSV are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rlhf_exp.report.curves import Row


@dataclass(frozen=True)
class Point:
    """One run.

    Attributes:
        name: Of the run or sweep.
        key: Its final key.
        status: `done`, `failed`, `pruned`, `running`, ...
        overrides: Its command line.
        settings: Its value of each hyperparameter that varies.
        seed: Its seeds in words, those that vary.
        objective: What a sweep maximises, if it is known.
        metrics: Final metrics of all its stages: `ppo eval/reward_mean`.
        rows: What the stage that the curves show has logged.
        published: Step of the published weights, if known.
        keys: The key of each stage.
        seconds: Time of the stages that no other run shares, as far as they are done.
        error: What ended it, if it failed.
        log: File with what it printed, if it has one.
    """

    name: str
    key: str
    status: str
    overrides: tuple[str, ...]
    settings: Mapping[str, str]
    seed: str
    objective: float | None
    metrics: Mapping[str, float]
    rows: Sequence[Row] = ()
    published: float | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    seconds: float | None = None
    error: str | None = None
    log: str = ""

    @property
    def done(self) -> bool:
        """Whether its numbers are final."""
        return self.status == "done"

    @property
    def label(self) -> str:
        """Its settings and seed in words."""
        words = label_of(self.settings) or self.name
        return f"{words}, seed {self.seed}" if self.seed else words


@dataclass(frozen=True)
class Work:
    """What one stage made: its key, the seconds it took, and how many of the runs use it."""

    stage: str
    key: str
    seconds: float
    users: int


@dataclass(frozen=True)
class Importance:
    """How much of the objective's variance each hyperparameter explains (fANOVA).

    Attributes:
        trials: Complete trials of the study.
        shares: (hyperparameter, share of the variance), the largest first; empty if not computed.
        reason: Why it was not.
        objective: What the study maximises, in words, if it says so.
    """

    trials: int
    shares: Sequence[tuple[str, float]] = ()
    reason: str = ""
    objective: str = ""


@dataclass(frozen=True)
class Sweep:
    """Runs that are compared.

    Attributes:
        title: The sweep's name, or the names of the runs.
        points: The runs, the oldest first.
        varied: The hyperparameters that vary.
        stage: The stage that the curves show: the last that trains.
        objective: What the objective is, in words.
        works: What was made, each once.
        importance: Of the hyperparameters.
        disk: (name, disk space in words).
        kl_budget: Nats per answer within which the objective was taken, if it was.
        warnings: What the reader must know before believing the numbers.
    """

    title: str
    points: Sequence[Point]
    varied: Sequence[str]
    stage: str
    objective: str
    works: Sequence[Work] = ()
    importance: Importance = field(default_factory=lambda: Importance(0))
    disk: Sequence[tuple[str, str]] = ()
    kl_budget: float | None = None
    warnings: Sequence[str] = ()


def label_of(settings: Mapping[str, str]) -> str:
    """Return settings in words: `lr 0.001, kl.coef 0.1`."""
    return ", ".join(f"{short_key(key)} {value}" for key, value in settings.items())


def short_key(key: str) -> str:
    """Return a key without its section: `kl.coef` for `ppo.kl.coef`."""
    section, dot, rest = key.partition(".")
    return rest if dot and section == "ppo" else key
