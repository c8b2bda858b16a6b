"""A worker of a study: asks for trials until there are as many as wanted, then for the table.

Who trains the trials of a worker: this process, workers that it starts, or all that joined.

Only the process that leads asks the study. With processes that something else has started, the
others learn each trial's values together with its orders.

The end of a study: its best trials answer the test prompts, which nothing was chosen by.

Beside them the first trial does, which has the config's own values: what the search was worth.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.text import Text

from rlhf_exp import experiment
from rlhf_exp.config.evaluation import Suite
from rlhf_exp.config.experiment import Config, StageName
from rlhf_exp.config.search_space import TrialValues, trial_config
from rlhf_exp.config.study import StudyConfig
from rlhf_exp.errors import JobsFailed, UserError, WorkerSpent
from rlhf_exp.launchers.optuna.table import study_text
from rlhf_exp.launchers.optuna.trial import TrialResult, TrialRun, search_of, trial_overrides
from rlhf_exp.pipeline.executor import (
    Check,
    StageExecutor,
    StageJob,
    StageRunner,
    digest_of,
    executor_for,
    polite_interrupts,
    settled_place,
    silence_console,
    with_threads,
)
from rlhf_exp.pipeline.hub import pinned
from rlhf_exp.processes import leader
from rlhf_exp.processes.environment import LaunchEnvironment
from rlhf_exp.search.study import Search, TrialHandle, best_trials, best_value, import_optuna
from rlhf_exp.stages.context import StageResult
from rlhf_exp.store.run_records import Status

if TYPE_CHECKING:
    from optuna import Study


def work(config: Config, overrides: list[str]) -> float | None:
    """Run trials of a study until there are as many as wanted.

    Args:
        config: The study's.
        overrides: The command line.

    Returns:
        The best objective of the study so far.

    Raises:
        UserError: Something the user can mend, not of a trial.
        JobsFailed: The last trials of this worker have all failed.
        KeyboardInterrupt: The user stopped it; the trial goes on with the next command.
    """
    config = pinned(config)
    if config.plan:
        return experiment.run(_shared(config, StageName.ppo), overrides)
    import_optuna()
    with TrialExecutors(config) as crews:
        if crews.follows:
            return crews.follow()
        return _Worker(config, crews).run(overrides)


def _shared(config: Config, stage: StageName) -> Config:
    """Return the experiment that makes what all trials start from."""
    return replace(config, stage=stage, study=StudyConfig())


class _Worker:
    def __init__(self, config: Config, crews: TrialExecutors) -> None:
        self.config, self.crews = config, crews
        self.console = Console(stderr=True)

    def run(self, overrides: list[str]) -> float | None:
        # What fails here is no trial's fault, and must not cost any.
        stage = StageName.reward if self.config.ppo.reward.model_scores else StageName.sft
        shared = _shared(self.config, stage)
        experiment.run(shared, overrides, recorded=False, crew=self.crews.of(shared, {}))
        search = search_of(self.config)
        failures = 0
        while (ending := self._next(search)) is not None:
            failures = failures + 1 if ending.status is Status.failed else 0
            if failures >= self.config.study.max_failures:
                raise JobsFailed(
                    f"the last {failures} trials of this worker have failed, so it gives up "
                    f"(study.max_failures); the last one:\n{ending.error}"
                )
            self.crews.go_on(ending.status)
        if search.running() == 0:
            name = self.config.name or experiment.UNNAMED
            evaluate_best(self.config, search.study, self.crews.of, self._tell)
            Console().print(Text(study_text(Path(self.config.output_dir), name)), soft_wrap=True)
        self.crews.best = best_value(search.study)
        return self.crews.best

    def _next(self, search: Search) -> TrialResult | None:
        """Run the next trial; return `None` if there are as many as wanted."""
        with search.ask() as asked:
            if asked is None:
                return None
            run = self._planned(search, asked)
            ending = run.run()
        best = best_value(search.study)
        so_far = "" if best is None else f"; best so far {best:.4g}"
        value = "" if ending.value is None else f", {ending.value:.4g}"
        self._tell(f"trial {asked.number}: {ending.status}{value}{so_far}")
        if ending.error is not None:
            self._tell(f"  {ending.error.strip().splitlines()[-1]}")
        return ending

    def _planned(self, search: Search, asked: TrialHandle) -> TrialRun:
        try:
            return TrialRun(self.config, search, asked, self.crews.of, self._tell)
        except BaseException:
            asked.requeue()
            raise

    def _tell(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)


class TrialExecutors:
    """The crews of one worker, and the end of them.

    Args:
        config: The study's.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.best: float | None = None
        self.place: LaunchEnvironment | None = settled_place(config)
        self.follows = self.place is not None and self.place.rank > 0

    def __enter__(self) -> Self:
        """Meet the other processes, which wait for this one."""
        if self.place is not None and not self.follows:
            leader.leader(self.place)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let the others go: the study is over, or this worker."""
        if self.place is not None and not self.follows:
            leader.leader(self.place).end(error, objective=self.best)

    def follow(self) -> float | None:
        """Do what rank 0 says until the study is over; return its best objective."""
        place, hands = self.place, dict[str, StageRunner]()
        assert place is not None
        silence_console()
        member, store = leader.member(place)

        def work(words: dict[str, Any]) -> dict[str, Any]:
            if words["config"] != digest_of(self.config):
                raise UserError(
                    f"rank {place.rank} was given another command than rank 0: start all with one"
                )
            name = str(words["values"])
            if name not in hands:
                hands.clear()
                trained = _trained(self.config, words["values"])
                hands[name] = StageRunner(with_threads(trained, place.local_processes))
            return hands[name].answer(words["order"], partial(polite_interrupts, tell=False))

        objective: float | None = member.serve(store, work)["objective"]
        return objective

    def of(self, config: Config, values: TrialValues) -> StageExecutor:
        """Return who runs an experiment.

        Args:
            config: The experiment.
            values: Of the trial that it is; empty if it makes what all of them start from.
        """
        if self.place is None:
            return executor_for(config, None)
        return _Together(self.config, config, values, self.place)

    def go_on(self, status: Status) -> None:
        """Go on after a trial.

        Raises:
            WorkerSpent: The processes that joined have ended with it.
        """
        if self.place is not None and status in (Status.failed, Status.interrupted):
            raise WorkerSpent(
                "the processes of the trial have ended with it, and only who started them can "
                "start others: give the same command again, and the study goes on"
            )


class _Together:
    """This process, rank 0, and all others that were started with it, for one trial."""

    def __init__(
        self, study: Config, config: Config, values: TrialValues, place: LaunchEnvironment
    ) -> None:
        self.study, self.values = study, dict(values)
        self.leader = leader.leader(place)
        self.hand = StageRunner(with_threads(config, place.local_processes))

    def run(self, order: StageJob, check: Check) -> StageResult:
        """See `StageExecutor`."""

        def work(_: object) -> dict[str, Any]:
            return asdict(self.hand.do(order, polite_interrupts, check))

        words = {
            "order": asdict(order),
            "config": digest_of(self.study),
            "values": self.values,
        }
        return StageResult(**self.leader.run(words, work))

    def end(self, error: BaseException | None, objective: float | None = None) -> None:
        """Keep the others for the next trial, unless this one has failed."""
        if error is not None:
            self.leader.end(error)


def _trained(config: Config, values: TrialValues) -> Config:
    """Return the config that the stages of a trial see, from the study's."""
    if not values:
        return replace(config, study=StudyConfig())
    return replace(trial_config(config, values), eval=config.eval)


CrewOf = Callable[[Config, TrialValues], StageExecutor]


def tests(config: Config) -> bool:
    """Whether there is a table of test prompts at the end."""
    wanted = (
        config.stage in (StageName.eval, StageName.pipeline) and config.eval.suite is not Suite.none
    )
    return wanted and config.study.finalists > 0


def evaluate_best(
    config: Config, study: Study, crew_of: CrewOf, tell: Callable[[str], None]
) -> None:
    """Evaluate the best trials, and the config's own values, as runs with a record and a report.

    Args:
        config: The study's.
        study: The study.
        crew_of: Returns who evaluates.
        tell: Says something to the user.
    """
    if not tests(config):
        return
    ranked, count = best_trials(study), config.study.finalists
    for trial in [*ranked[:count], *(one for one in ranked[count:] if one.number == 0)]:
        values = json.loads(trial.user_attrs["values"])
        chosen = replace(trial_config(config, values), stage=config.stage, eval=config.eval)
        tell(f"trial {trial.number} answers the test prompts")
        crew = crew_of(chosen, values)
        experiment.run(chosen, trial_overrides(config, values), crew=crew)
