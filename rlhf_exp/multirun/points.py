"""The points of a multirun: each one's config and plan, and what they share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from rlhf_exp.config.check_points import place_of
from rlhf_exp.config.problems import refuse
from rlhf_exp.config.root import Config, Stage
from rlhf_exp.config.study import StudyConfig
from rlhf_exp.errors import UserError
from rlhf_exp.pipeline.hub import pinned
from rlhf_exp.pipeline.plan import State, Step, plan, refuse_changed
from rlhf_exp.store.records import RunRecord


@dataclass(frozen=True)
class Point:
    """One job of a multirun: an experiment, or a worker of a study.

    Attributes:
        overrides: Its command line.
        config: Its config.
        steps: Its plan; a worker's ends with the study as its last step.
    """

    overrides: tuple[str, ...]
    config: Config
    steps: tuple[Step, ...]

    @property
    def key(self) -> str:
        """The final key; `worker-N` of a worker."""
        return self.steps[-1].key

    @property
    def is_worker(self) -> bool:
        """Whether it is a worker of a study, whose trials have records of their own."""
        return self.config.study.trials is not None

    def record(self, name: str) -> RunRecord:
        """Return the record of a point that has not run yet."""
        return RunRecord(
            name=name,
            stage=self.config.stage.name,
            keys={step.stage: step.key for step in self.steps},
            overrides=self.overrides,
            seed=self.config.seed,
        )

    def brought_to(self, stage: str) -> Point:
        """Return the point that stops after one of its stages."""
        names = [step.stage for step in self.steps]
        steps = self.steps[: names.index(stage) + 1]
        config = replace(self.config, stage=Stage[stage], study=StudyConfig())
        return replace(self, config=config, steps=steps)


def point_of(overrides: Sequence[str], config: Config) -> Point:
    """Return the point of a job.

    Args:
        overrides: Its command line.
        config: Its config.

    Raises:
        UserError: What it would reuse was made by other code.
    """
    settled = pinned(config)
    if settled.study.trials is None:
        steps = plan(settled)
    else:
        # What trials start from; the values that they try are not known yet.
        begin = replace(settled, study=StudyConfig(), stage=Stage.ppo)
        steps = [step for step in plan(begin) if step.stage != "ppo"]
        steps.append(Step("study", f"worker-{settled.study.worker}", State.run))
    refuse_changed(steps)
    return Point(tuple(overrides), settled, tuple(steps))


def points_of(jobs: Sequence[tuple[list[str], Config]]) -> list[Point]:
    """Return the point of each job with its plan; several may have one key.

    Args:
        jobs: Command line and config of each.

    Raises:
        UserError: What is wrong with any of them: a file that is missing, a result that other code
            has made.
    """
    found: list[Point] = []
    wrong: dict[str, list[int]] = {}
    for index, (overrides, config) in enumerate(jobs):
        try:
            point = point_of(overrides, config)
        except UserError as error:
            wrong.setdefault(str(error), []).append(index)
        else:
            found.append(point)
    lines = [overrides for overrides, _ in jobs]
    refuse(text + place_of(lines, set(at)) for text, at in wrong.items())
    return found


def distinct(points: Sequence[Point]) -> list[Point]:
    """Return the points without those whose key an earlier one has: they have one result."""
    found: dict[str, Point] = {}
    for point in points:
        found.setdefault(point.key, point)
    return list(found.values())


def shared_work(points: Sequence[Point]) -> list[list[Point]]:
    """Return what several points need and nobody has made, as points that stop there.

    A job that found another one at work would wait for it with all its GPUs idle. So these come
    first, one list after the other; those of one list do not need each other.
    """
    needed = Counter(key for point in points for key in _work(point))
    # The stages of a point that others need too, in order.
    chains: dict[tuple[tuple[str, str], ...], Point] = {}
    for point in points:
        shared = tuple(key for key in _work(point)[:-1] if needed[key] > 1)
        if shared:
            chains.setdefault(shared, point)
    met = Counter(chain.from_iterable(chains))
    if all(count == 1 for count in met.values()):
        alone = [point.brought_to(keys[-1][0]) for keys, point in chains.items()]
        return [alone] if alone else []
    levels: dict[str, dict[str, Point]] = {}
    for keys, point in chains.items():
        for stage, key in keys:
            levels.setdefault(stage, {}).setdefault(key, point.brought_to(stage))
    order = [stage.value for stage in Stage]
    return [list(levels[stage].values()) for stage in sorted(levels, key=order.index)]


def _work(point: Point) -> list[tuple[str, str]]:
    """Return stage and key of each step that would run; of the last one in any case."""
    last = point.steps[-1]
    return [(step.stage, step.key) for step in point.steps if step.needs_work or step is last]
