"""A sweep, or any set of runs, as plain values: the content of its page, its JSON and its CSV.

Runs are told apart by the hyperparameters that vary among them. A finished run's config is in its
manifest; a failed one has only its command line, so that a value it does not name is taken from the
runs that do not name it either. Runs that differ in their seeds alone form a group, with means and
intervals over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy  # its parts are imported on first use
from numpy.typing import ArrayLike

from rlhf_exp.evaluation.statistics import LEVEL, Estimate, Floats
from rlhf_exp.report.chart import Row
from rlhf_exp.report.sweep.settings import format_override, override_values, sort_key

# Sections that do not make a run another experiment: storage, tracking, launching.
IGNORED_SECTIONS = (
    "name",
    "output_dir",
    "plan",
    "probe",
    "cache",
    "rerun",
    "stage",
    "tracking",
    "hydra",
    "launcher",
    "study",
    "sweep",
)
UNKNOWN = "–"
# An interval of two values is 13 times as long as their distance; the values themselves say more.
FEWEST_SEEDS = 3


@dataclass(frozen=True)
class Sweep:
    """Runs that are compared.

    Attributes:
        title: The sweep's name, or the names of the runs.
        points: The runs, the oldest first.
        varied: The hyperparameters that vary.
        stage: The stage that the curves show: the last that trains.
        objective: The objective in words.
        works: The stages made, each once.
        importance: Importance of the hyperparameters.
        disk: (name, disk space in words).
        kl_budget: Nats per answer within which the objective was taken, if it was.
        warnings: Reservations that the reader must know before believing the numbers.
    """

    title: str
    points: Sequence[RunPoint]
    varied: Sequence[str]
    stage: str
    objective: str
    works: Sequence[StageWork] = ()
    importance: Importance = field(default_factory=lambda: Importance(0))
    disk: Sequence[tuple[str, str]] = ()
    kl_budget: float | None = None
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class RunPoint:
    """One run.

    Attributes:
        name: Name of the run or sweep.
        key: Its final key.
        status: `done`, `failed`, `pruned`, `running`, ...
        overrides: Its command line.
        settings: Its value of each hyperparameter that varies.
        seed: Its seeds in words, those that vary.
        objective: Value of the quantity that the sweep maximises, if known.
        metrics: Final metrics of all its stages: `ppo eval/reward_mean`.
        rows: Logged metrics of the stage that the curves show.
        published: Step of the published weights, if known.
        keys: The key of each stage.
        seconds: Time of the stages that no other run shares, as far as they are done.
        error: The error that ended it, if it failed.
        log: File with its output, if it has one.
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
class StageWork:
    """One stage's result: its key, the seconds it took, and the number of runs that use it."""

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
        objective: The study's objective in words, if it has one on record.
    """

    trials: int
    shares: Sequence[tuple[str, float]] = ()
    reason: str = ""
    objective: str = ""


def label_of(settings: Mapping[str, str]) -> str:
    """Return settings in words: `lr 0.001, kl.coef 0.1`."""
    return ", ".join(f"{short_key(key)} {value}" for key, value in settings.items())


def short_key(key: str) -> str:
    """Return a key without its section: `kl.coef` for `ppo.kl.coef`."""
    section, dot, rest = key.partition(".")
    return rest if dot and section == "ppo" else key


@dataclass(frozen=True)
class VariedSettings:
    """The settings that vary among runs.

    Attributes:
        varied: Their keys, in the order of the command line.
        settings: For each run its value of each key, as text.
        seeds: For each run its seeds in words, as far as seeds vary.
    """

    varied: tuple[str, ...]
    settings: tuple[dict[str, str], ...]
    seeds: tuple[str, ...]


@dataclass(frozen=True)
class SettingsSource:
    """The sources of a run's settings.

    Attributes:
        overrides: Its command line.
        config: Its resolved config, flat; `None` if it left none.
    """

    overrides: tuple[str, ...]
    config: Mapping[str, Any] | None


def varied_settings(origins: Sequence[SettingsSource]) -> VariedSettings:
    """Return the settings that vary among runs.

    The keys of the command line are used if they tell the runs apart just as the configs do:
    `model=a,b` is one key there and many in the config.
    """
    values = _RunValues(origins)
    command, config = values.varied_by_command(), values.varied_by_config()
    known = [number for number, origin in enumerate(origins) if origin.config is not None]
    same_partition = _partition(values, command, known) == _partition(values, config, known)
    keys = command if (same_partition and len(command) <= len(config)) or not config else config
    settings = tuple({key: values.text(n, key) for key in keys} for n in range(len(origins)))
    return VariedSettings(tuple(keys), settings, tuple(values.seed(n) for n in range(len(origins))))


class _RunValues:
    """Every run's value of every key, as far as it is known."""

    def __init__(self, origins: Sequence[SettingsSource]) -> None:
        self.origins = origins
        self.overrides = [override_values(origin.overrides) for origin in origins]
        self.configs = [
            None
            if origin.config is None
            else {key: format_override(item) for key, item in origin.config.items()}
            for origin in origins
        ]
        self.seed_keys = [key for key in self._keys() if is_seed(key) and self._varies(key)]

    def varied_by_command(self) -> list[str]:
        """Return the keys of command lines whose values differ, in their order."""
        keys = dict.fromkeys(key for overrides in self.overrides for key in overrides)
        return [key for key in keys if _is_hyperparameter(key) and self._varies(key)]

    def varied_by_config(self) -> list[str]:
        """Return the keys of configs whose values differ."""
        configs = [config for config in self.configs if config is not None]
        keys = sorted({key for config in configs for key in config if _is_hyperparameter(key)})
        return [key for key in keys if len({config.get(key) for config in configs}) > 1]

    def text(self, number: int, key: str) -> str:
        """Return a run's value of a key."""
        config = self.configs[number]
        if config is not None and key in config:
            return config[key]
        return self.overrides[number].get(key) or self._default(key)

    def seed(self, number: int) -> str:
        """Return a run's seeds in words, those that vary."""
        seeds = {key: self.text(number, key) for key in self.seed_keys}
        if len(set(seeds.values())) == 1:
            return next(iter(seeds.values()))
        return ", ".join(f"{key.partition('.')[0]} {value}" for key, value in seeds.items())

    def _default(self, key: str) -> str:
        """Return the value in runs that do not name the key, if it is the same in all of them."""
        pairs = zip(self.configs, self.overrides, strict=True)
        values = {
            config[key]
            for config, overrides in pairs
            if config is not None and key not in overrides and key in config
        }
        return values.pop() if len(values) == 1 else UNKNOWN

    def _keys(self) -> list[str]:
        known = [*self.overrides, *(values for values in self.configs if values is not None)]
        return sorted({key for values in known for key in values})

    def _varies(self, key: str) -> bool:
        return len({self.text(number, key) for number in range(len(self.origins))}) > 1


def _is_hyperparameter(key: str) -> bool:
    return not is_ignored(key) and not is_seed(key)


def _partition(values: _RunValues, keys: Sequence[str], numbers: Sequence[int]) -> list[int]:
    """Return the number of the part each run falls into, by its values of `keys`."""
    numbers_by_values: dict[tuple[str, ...], int] = {}
    return [
        numbers_by_values.setdefault(
            tuple(values.text(n, key) for key in keys), len(numbers_by_values)
        )
        for n in numbers
    ]


def is_ignored(key: str) -> bool:
    """Whether a key does not belong to the experiment itself."""
    return key.replace("/", ".").split(".")[0] in IGNORED_SECTIONS


def is_seed(key: str) -> bool:
    """Whether a key is a seed: runs that differ in no other are replicates."""
    return key == "seed" or key.endswith(".seed")


@dataclass(frozen=True)
class SeedSummary:
    """A number over seeds.

    Attributes:
        values: The value of each seed.
        estimate: Mean and interval; the interval is infinite for fewer than `FEWEST_SEEDS` seeds.
    """

    values: tuple[float, ...]
    estimate: Estimate

    @property
    def has_interval(self) -> bool:
        """Whether the seeds suffice for an interval."""
        return math.isfinite(self.estimate.low) and math.isfinite(self.estimate.high)

    def to_json(self) -> dict[str, Any]:
        """Return plain values; without an interval its ends are null."""
        low, high = (self.estimate.low, self.estimate.high) if self.has_interval else (None, None)
        values = list(self.values)
        return {
            "n": len(values),
            "mean": self.estimate.mean,
            "low": low,
            "high": high,
            "values": values,
        }


def summarise_seeds(values: Iterable[float | None]) -> SeedSummary | None:
    """Return mean and Student's t interval of the finite values; `None` without any."""
    known = tuple(float(value) for value in values if value is not None and math.isfinite(value))
    if not known:
        return None
    if len(known) < FEWEST_SEEDS:
        return SeedSummary(known, Estimate(sum(known) / len(known), -math.inf, math.inf))
    mean, low, high = intervals(np.array(known)[:, None])
    return SeedSummary(known, Estimate(float(mean[0]), float(low[0]), float(high[0])))


@dataclass(frozen=True)
class RunGroup:
    """Runs of the same settings."""

    settings: Mapping[str, str]
    points: tuple[RunPoint, ...]

    @property
    def label(self) -> str:
        """The settings in words."""
        return label_of(self.settings) or "all runs"

    @property
    def done(self) -> tuple[RunPoint, ...]:
        """The runs whose numbers are final."""
        return tuple(point for point in self.points if point.done)

    def objective(self) -> SeedSummary | None:
        """Return the objective over seeds."""
        return summarise_seeds(point.objective for point in self.done)

    def metric(self, name: str) -> SeedSummary | None:
        """Return a final metric over seeds."""
        return summarise_seeds(point.metrics.get(name) for point in self.done)


def group_runs(points: Sequence[RunPoint]) -> list[RunGroup]:
    """Return the groups, ordered by their settings, numbers by size."""
    members_by_settings: dict[tuple[str, ...], list[RunPoint]] = {}
    for point in points:
        members_by_settings.setdefault(tuple(point.settings.values()), []).append(point)
    groups = [
        RunGroup(members[0].settings, tuple(members)) for members in members_by_settings.values()
    ]
    return sorted(
        groups, key=lambda group: tuple(sort_key(text) for text in group.settings.values())
    )


def rank_groups(groups: Sequence[RunGroup]) -> list[tuple[RunGroup, SeedSummary]]:
    """Return the groups by their mean objective, the best first.

    A group whose seeds have mostly failed is left out: it needs half as many as the fullest.
    """
    known = [(group, objective) for group in groups if (objective := group.objective()) is not None]
    most = max((len(objective.values) for _, objective in known), default=0)
    enough = [(group, objective) for group, objective in known if 2 * len(objective.values) >= most]
    return sorted(enough, key=lambda pair: -pair[1].estimate.mean)


def intervals(values: Floats) -> tuple[Floats, Floats, Floats]:
    """Return mean and Student's t interval over seeds at each of T steps.

    Args:
        values: [n, T], one row a seed; NaN where a seed has no value.

    Returns:
        (mean, low, high), each [T]; low and high are NaN for fewer than `FEWEST_SEEDS` values.
    """
    known = np.isfinite(values)
    count = known.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, values, 0).sum(axis=0) / np.where(count, count, np.nan)
        squares = np.where(known, values - mean, 0) ** 2
        error = np.sqrt(squares.sum(axis=0) / (count - 1) / count)
        half = np.where(count >= FEWEST_SEEDS, _t_quantile(count - 1) * error, np.nan)
    return mean, mean - half, mean + half


def difference(a: SeedSummary, b: SeedSummary) -> Estimate:
    """Return the difference of means, b - a, with its interval over seeds.

    The interval is Welch's (1947): the two sides' variances and numbers of seeds may differ. It is
    infinite where a side has fewer than `FEWEST_SEEDS`.
    """
    left, right = np.array(a.values), np.array(b.values)
    mean = float(right.mean() - left.mean())
    if min(len(left), len(right)) < FEWEST_SEEDS:
        return Estimate(mean, -math.inf, math.inf)
    errors = [float(side.var(ddof=1)) / len(side) for side in (left, right)]
    if not sum(errors):
        return Estimate(mean, mean, mean)
    # Welch and Satterthwaite's degrees of freedom.
    parts = [error**2 / (len(side) - 1) for error, side in zip(errors, (left, right), strict=True)]
    half = float(_t_quantile(sum(errors) ** 2 / sum(parts))) * math.sqrt(sum(errors))
    return Estimate(mean, mean - half, mean + half)


def _t_quantile(freedom: ArrayLike) -> Floats:
    """Return the upper end of `LEVEL` of Student's t distribution, in standard errors."""
    quantile: Floats = scipy.special.stdtrit(freedom, (1 + LEVEL) / 2)
    return quantile
