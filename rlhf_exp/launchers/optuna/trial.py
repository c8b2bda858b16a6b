"""A trial of a study: a PPO run with the search's values, through the store as any run.

Here too: the search that belongs to a study's config, and the check that all its trials can be
compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_exp.config.experiment import Config
from rlhf_exp.config.fields import key_content
from rlhf_exp.config.problems import format_value
from rlhf_exp.config.search_space import (
    TrialValues,
    axis_bounds,
    base_values,
    bounded_space,
    is_integer,
    overrides_between,
    trial_config,
    with_values,
)
from rlhf_exp.config.study import Axis, StudyConfig
from rlhf_exp.config.text_values import override_of
from rlhf_exp.config.training import Scale
from rlhf_exp.errors import UserError
from rlhf_exp.experiment import UNNAMED
from rlhf_exp.pipeline.executor import StageExecutor
from rlhf_exp.pipeline.plan import Step, plan, records_of, refuse_changed, store_of
from rlhf_exp.pipeline.run import Pruned, run_steps
from rlhf_exp.processes.failures import WorkerGone
from rlhf_exp.redaction import formatted_exception
from rlhf_exp.search.pruning import RunningTrial, TrialObjective, report_evaluations
from rlhf_exp.search.study import (
    Pruning,
    Search,
    SearchSettings,
    TrialHandle,
    distribution_of,
    round_values,
)
from rlhf_exp.store.atomic_files import write_json_atomic, write_text_atomic
from rlhf_exp.store.lease import LeaseLost
from rlhf_exp.store.run_records import RunRecord, Status
from rlhf_exp.tracking.local import METRICS, read_metrics

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution

Tell = Callable[[str], None]
ExecutorFactory = Callable[[Config, TrialValues], StageExecutor]
"""Returns the executor of an experiment, given the values of its trial."""
PRUNED = "pruned"


@dataclass(frozen=True)
class TrialResult:
    """The result of a trial.

    Attributes:
        status: Done, pruned or failed; interrupted if one of its processes was killed.
        value: The objective so far.
        error: The error that ended the trial, if it failed.
    """

    status: Status
    value: float | None = None
    error: str | None = None


def trial_overrides(config: Config, values: TrialValues) -> list[str]:
    """Return the command line that runs a trial by itself."""
    plain = replace(config, study=StudyConfig())
    changed = overrides_between(plain, trial_config(config, values))
    searched = [override_of(key, value) for key, value in values.items()]
    others = [text for text in changed if text.partition("=")[0] not in values]
    new = [*searched, *others]
    replaced = {text.partition("=")[0] for text in new}
    kept = [text for text in read_command(config) if text.partition("=")[0] not in replaced]
    return [*kept, *new]


class TrialRun:
    """A trial that this worker runs.

    Args:
        config: The study's config.
        search: The study.
        handle: The trial.
        executor_of: Returns the executor of the trial.
        tell: Prints a line for the user.

    Raises:
        UserError: The trial cannot be planned.
    """

    def __init__(
        self,
        config: Config,
        search: Search,
        handle: TrialHandle,
        executor_of: ExecutorFactory,
        tell: Tell,
    ) -> None:
        self.search, self.handle, self.tell = search, handle, tell
        self.executor_of = executor_of
        self.values = round_values(handle.values)
        self.study, self.config = config, trial_config(config, self.values)
        self.pruning, self.measure = pruning_of(config), measure_of(config)
        self.steps: list[Step] = plan(self.config)
        refuse_changed(self.steps)
        self.record = RunRecord(
            name=config.name or UNNAMED,
            stage=self.config.stage.name,
            keys={step.stage: step.key for step in self.steps},
            overrides=tuple(trial_overrides(config, self.values)),
            seed=config.seed,
            status=Status.running,
        )

    def run(self) -> TrialResult:
        """Train, and report the result to the study.

        Raises:
            KeyboardInterrupt: The user stopped the trial, which is queued again.
            SystemExit: The process was told to exit; the trial is queued again.
            LeaseLost: Another worker has taken the trial.
        """
        ppo, number = self.config.ppo, self.handle.number
        self._write(Status.running)
        self.handle.note(
            key=self.record.key,
            values=json.dumps(self.values),
            iterations=ppo.iterations,
            steps=ppo.iterations * ppo.updates,
        )
        shown = " ".join(f"{key}={value:g}" for key, value in self.values.items())
        self.tell(f"trial {number}: {shown}")
        executor = self.executor_of(self.config, self.values)
        try:
            result = self._train(executor)
        except BaseException as error:
            executor.end(error)
            return self._result_of_error(error)
        executor.end(None, result.value)
        return result

    def _train(self, executor: StageExecutor) -> TrialResult:
        trial = RunningTrial(str(folder_of(self.study)), self.handle.id, self.measure, self.pruning)
        try:
            overrides = self.record.overrides
            done = run_steps(
                self.config, self.steps, executor, self.tell, trial, overrides=overrides
            )
        except Pruned as pruned:
            return self._pruned(pruned)
        artifact, trained = done[-1].artifact, done[-1].trained
        assert artifact is not None, "a trial trains PPO"
        rows = read_metrics(artifact.file(METRICS) or artifact.path / METRICS)
        ppo = self.config.ppo
        report_evaluations(self.search.study, trial, rows, ppo.iterations * ppo.updates)
        value = self.measure.value(rows)
        seconds = artifact.manifest.duration_s if trained else 0.0
        self.handle.note(iterations_run=ppo.iterations if trained else 0, seconds=seconds)
        if not self.handle.complete(value):
            error = f"the objective is {value}"
            self._write(Status.failed, error=error)
            return TrialResult(Status.failed, error=error)
        self._write(Status.done, value)
        return TrialResult(Status.done, value)

    def _pruned(self, pruned: Pruned) -> TrialResult:
        ran = pruned.step // self.config.ppo.updates
        value = self.measure.value(pruned.rows)
        path = folder_of(self.study) / PRUNED / f"{self.record.key}.jsonl"
        path.parent.mkdir(exist_ok=True)
        write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in pruned.rows))
        self.handle.note(iterations_run=ran, seconds=pruned.seconds)
        self.handle.prune()
        self._write(Status.pruned, value)
        return TrialResult(Status.pruned, value)

    def _result_of_error(self, error: BaseException) -> TrialResult:
        """Return the result of a trial that raised; raise again what ends the worker."""
        if isinstance(error, LeaseLost):
            raise error
        if isinstance(error, WorkerGone):
            self.handle.requeue(lost=True)
            self._write(Status.interrupted, error=str(error))
            return TrialResult(Status.interrupted, error=str(error))
        if not isinstance(error, Exception):
            self.handle.requeue()
            self._write(Status.interrupted)
            raise error
        is_user_error = isinstance(error, UserError)
        text = str(error) if is_user_error else formatted_exception(error)
        self.handle.fail(text)
        self._write(Status.failed, error=text)
        return TrialResult(Status.failed, error=text)

    def _write(
        self, status: Status, objective: float | None = None, error: str | None = None
    ) -> None:
        record = replace(self.record, status=status, objective=objective, error=error)
        records_of(self.study).write(record)


ABOUT = "about"  # attribute of a study, in its journal
_COMMAND = "command.json"


def study_folder(output_dir: Path, name: str) -> Path:
    """Return the folder of a study's journal."""
    return output_dir / "sweeps" / name / "study"


def folder_of(config: Config) -> Path:
    """Return the folder of the journal of a config's study."""
    return study_folder(Path(config.output_dir), config.name or UNNAMED)


def measure_of(config: Config) -> TrialObjective:
    """Return the objective that the study maximises."""
    study = config.study
    scaled = config.ppo.reward.scale is not Scale.none
    return TrialObjective(study.objective.value, study.kl_budget, study.kl_coef, scaled)


def pruning_of(config: Config) -> Pruning:
    """Return the pruning rule, with the number of evaluations of a trial."""
    study, ppo = config.study, config.ppo
    evaluations = -(-ppo.iterations * ppo.updates // ppo.eval_every)
    return Pruning(study.pruner.value, study.prune_after, study.warmup, evaluations)


def search_of(config: Config) -> Search:
    """Return the config's study, opened by its worker.

    Raises:
        UserError: The study under that name is another one than the config's.
    """
    study = config.study
    assert study.trials is not None, "checked with the config"
    space = {axis.key: _distribution(axis) for axis in bounded_space(config)}
    first = base_values(config)
    settings = SearchSettings(study.trials, space, first, study.startup, study.workers, study.seed)
    name, pruning = config.name or UNNAMED, pruning_of(config)
    search = Search(
        folder_of(config), store_of(config), name, settings, pruning, worker=study.worker
    )
    _refuse_another(search.study, config)
    return search


def write_command(config: Config, overrides: list[str]) -> None:
    """Save the command line of a trial, without the values that are searched."""
    folder = folder_of(config)
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / _COMMAND, overrides)


def read_command(config: Config) -> list[str]:
    """Return the command line that `write_command` saved."""
    try:
        overrides = json.loads((folder_of(config) / _COMMAND).read_text("utf-8"))
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise _damaged_command(config, str(error)) from error
    if not isinstance(overrides, list) or not all(isinstance(text, str) for text in overrides):
        raise _damaged_command(config, "no list of texts")
    return overrides


def _damaged_command(config: Config, reason: str) -> UserError:
    return UserError(
        f"{folder_of(config) / _COMMAND}: not the command line of a study ({reason}); the command "
        "that started the study writes it again"
    )


def _distribution(axis: Axis) -> BaseDistribution:
    limits = axis_bounds(axis)
    return distribution_of(
        (limits[0], limits[1]), axis.log, axis.step, axis.choices, is_integer(axis)
    )


def _common_settings(config: Config) -> dict[str, str]:
    """Return the settings that all trials of a study have in common, as text by name."""
    searched = {axis.key: 0 for axis in config.study.space}
    steps = plan(with_values(trial_config(config, {}), searched))
    settings = {f"{step.stage} model": step.key for step in steps if step.stage != "ppo"}
    settings["objective"] = format_value(config.study.objective)
    settings["length"] = format_value(config.study.length)
    settings["searched"] = ", ".join(sorted(searched))
    for key, value in _flat(key_content(trial_config(config, {}).ppo), "ppo.").items():
        if key not in searched:
            settings[key] = str(value)
    return settings | {"data and rest": steps[-1].key}


def _refuse_another(study: Study, config: Config) -> None:
    """Raise if the study's trials cannot be compared with the config's.

    Raises:
        UserError: Names the settings that differ.
    """
    ours, theirs = _common_settings(config), study.user_attrs.get(ABOUT)
    if theirs is None:
        study.set_user_attr(ABOUT, ours)
        return
    if theirs == ours:
        return
    names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    listed = "".join(
        f"\n  {name}: {theirs.get(name, 'none')} in the study, {ours.get(name, 'none')} now"
        for name in names
        if name != "data and rest" or len(names) == 1
    )
    raise UserError(
        f"name={config.name}: that study is of something else, and its trials cannot be compared "
        f"with new ones:{listed}\nUse another name, or give the study's own values"
    )


def _flat(content: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            values |= _flat(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values
