"""A worker of a study: it runs trials until there are enough, then evaluates the best ones.

Only the leader asks the study. Processes that something else has started live as long as the worker
and learn each trial's values together with its jobs; workers that the leader starts live as long as
one trial.

At the end of the study its best trials answer the test prompts, on which nothing was chosen, and
beside them the first trial, which has the config's own values: the gain of the search.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from rlhf_exp import experiment
from rlhf_exp.config.evaluation import Suite
from rlhf_exp.config.experiment import Config, StageName
from rlhf_exp.config.search_space import TrialValues, trial_config
from rlhf_exp.config.study import StudyConfig
from rlhf_exp.errors import JobsFailed, WorkerSpent
from rlhf_exp.launchers.optuna.table import study_text
from rlhf_exp.launchers.optuna.trial import (
    ExecutorFactory,
    TrialResult,
    TrialRun,
    search_of,
    trial_overrides,
)
from rlhf_exp.pipeline.executor import (
    LeaderExecutor,
    StageExecutor,
    checked_launch_environment,
    executor_for,
    work_for_leader,
)
from rlhf_exp.pipeline.hub import pinned
from rlhf_exp.pipeline.precision import with_precision
from rlhf_exp.processes.environment import is_leader
from rlhf_exp.processes.leader import Leader, joined_leader
from rlhf_exp.search.study import Search, TrialHandle, best_trials, best_value, import_optuna
from rlhf_exp.store.run_records import Status

if TYPE_CHECKING:
    from optuna import Study


def run_worker(config: Config, overrides: list[str]) -> float | None:
    """Run trials of a study until there are as many as the config asks for.

    Args:
        config: The study's config.
        overrides: The command line.

    Returns:
        The best objective of the study so far.

    Raises:
        UserError: An error that the user can mend, outside of any trial.
        JobsFailed: The last trials of this worker have all failed.
        KeyboardInterrupt: The user stopped the worker; the next command continues the trial.
    """
    config = pinned(config)
    if is_leader():  # the others are given its choice
        config, choice = with_precision(config)
        if choice is not None:
            overrides = choice.overrides(overrides)
            Console(stderr=True).print(Text(str(choice)))
    if config.plan:
        return experiment.run(_shared(config, StageName.ppo), overrides)
    import_optuna()
    environment = checked_launch_environment(config)
    if environment is None:
        return _Worker(config, None).run(overrides)
    if environment.rank:
        return work_for_leader(config, environment)
    leader = joined_leader(environment)
    try:
        best = _Worker(config, leader).run(overrides)
    except BaseException as error:
        leader.end(error)
        raise
    leader.end(None, objective=best)
    return best


def _shared(config: Config, stage: StageName) -> Config:
    """Return the experiment that makes the models that all trials start from."""
    return replace(config, stage=stage, study=StudyConfig())


class _Worker:
    """The leader's part of a study.

    Args:
        config: The study's config.
        leader: The leader of the processes that joined; `None` if this process is alone.
    """

    def __init__(self, config: Config, leader: Leader | None) -> None:
        self.config, self.leader = config, leader
        self.console = Console(stderr=True)

    def run(self, overrides: list[str]) -> float | None:
        # An error in the shared models is no trial's fault, and must not cost any.
        stage = StageName.reward if self.config.ppo.reward.model_scores else StageName.sft
        shared = _shared(self.config, stage)
        experiment.run(shared, overrides, recorded=False, executor=self._executor(shared, {}))
        search = search_of(self.config)
        failures = 0
        while (result := self._run_trial(search)) is not None:
            failures = failures + 1 if result.status is Status.failed else 0
            if failures >= self.config.study.max_failures:
                raise JobsFailed(
                    f"the last {failures} trials of this worker have failed, so it gives up "
                    f"(study.max_failures); the last one:\n{result.error}"
                )
            self._check_processes(result.status)
        if search.running() == 0:
            name = self.config.name or experiment.UNNAMED
            evaluate_best(self.config, search.study, self._executor, self._tell)
            Console().print(Text(study_text(Path(self.config.output_dir), name)), soft_wrap=True)
        return best_value(search.study)

    def _executor(self, config: Config, values: TrialValues) -> StageExecutor:
        """Return the executor of an experiment.

        Args:
            config: The experiment.
            values: The values of the trial; empty for the models that all trials share.
        """
        if self.leader is None:
            return executor_for(config, None)
        return LeaderExecutor(config, self.leader, study=self.config, values=dict(values))

    def _check_processes(self, status: Status) -> None:
        """Raise if the processes that joined have exited with a trial.

        Raises:
            WorkerSpent: They have.
        """
        if self.leader is not None and status in (Status.failed, Status.interrupted):
            raise WorkerSpent(
                "the processes of the trial have ended with it, and only who started them can "
                "start others: give the same command again, and the study goes on"
            )

    def _run_trial(self, search: Search) -> TrialResult | None:
        """Run the next trial; return `None` if there are enough."""
        with search.ask() as handle:
            if handle is None:
                return None
            result = self._planned(search, handle).run()
        best = best_value(search.study)
        so_far = "" if best is None else f"; best so far {best:.4g}"
        value = "" if result.value is None else f", {result.value:.4g}"
        self._tell(f"trial {handle.number}: {result.status}{value}{so_far}")
        if result.error is not None:
            self._tell(f"  {result.error.strip().splitlines()[-1]}")
        return result

    def _planned(self, search: Search, handle: TrialHandle) -> TrialRun:
        try:
            return TrialRun(self.config, search, handle, self._executor, self._tell)
        except BaseException:
            handle.requeue()
            raise

    def _tell(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)


def has_final_evaluation(config: Config) -> bool:
    """Whether the best trials answer the test prompts at the end of the study."""
    evaluated = (
        config.stage in (StageName.eval, StageName.pipeline) and config.eval.suite is not Suite.none
    )
    return evaluated and config.study.finalists > 0


def evaluate_best(
    config: Config, study: Study, executor_of: ExecutorFactory, tell: Callable[[str], None]
) -> None:
    """Evaluate the best trials, and the config's own values, as runs with a record and a report.

    Args:
        config: The study's config.
        study: The study.
        executor_of: Returns the executor of an evaluation.
        tell: Prints a line for the user.
    """
    if not has_final_evaluation(config):
        return
    ranked, count = best_trials(study), config.study.finalists
    own_values = [trial for trial in ranked[count:] if trial.number == 0]
    for trial in [*ranked[:count], *own_values]:
        values = json.loads(trial.user_attrs["values"])
        evaluation = replace(trial_config(config, values), stage=config.stage, eval=config.eval)
        tell(f"trial {trial.number} answers the test prompts")
        executor = executor_of(evaluation, values)
        experiment.run(evaluation, trial_overrides(config, values), executor=executor)
