"""One trial: PPO with chosen values, through the store as any run, and what becomes of it."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace

from rlhf_exp.config.problems import written
from rlhf_exp.config.root import Config
from rlhf_exp.config.study import StudyConfig
from rlhf_exp.config.trial import Values, differences, iterations, trial_config, updates
from rlhf_exp.distributed.failure import WorkerGone
from rlhf_exp.errors import UserError
from rlhf_exp.experiment import UNNAMED
from rlhf_exp.pipeline.crew import Crew
from rlhf_exp.pipeline.plan import Step, plan, records_of, refuse_changed
from rlhf_exp.pipeline.run import Pruned, run_steps
from rlhf_exp.search.judge import Trial, report
from rlhf_exp.search.sampling import rounded
from rlhf_exp.search.search import Asked, Search
from rlhf_exp.store.lease import LeaseLost
from rlhf_exp.store.records import RunRecord, Status
from rlhf_exp.study.setup import folder_of, measure_of, pruning_of, read_command
from rlhf_exp.tracking.local import METRICS, read_metrics

Tell = Callable[[str], None]
CrewOf = Callable[[Config, Values], Crew]
PRUNED = "pruned"


@dataclass(frozen=True)
class Ending:
    """How a trial ended.

    Attributes:
        status: Done, pruned or failed; interrupted if a process of it was killed.
        value: Its objective, as far as it came.
        error: What ended it, if it failed.
    """

    status: Status
    value: float | None = None
    error: str | None = None


def trial_overrides(config: Config, values: Values) -> list[str]:
    """Return the command line that runs a trial by itself."""
    plain = replace(config, study=StudyConfig())
    changed = differences(plain, trial_config(config, values))
    tried = [f"{key}={written(value)}" for key, value in values.items()]
    others = [text for text in changed if text.partition("=")[0] not in values]
    new = [*tried, *others]
    set_anew = {text.partition("=")[0] for text in new}
    kept = [text for text in read_command(config) if text.partition("=")[0] not in set_anew]
    return [*kept, *new]


class TrialRun:
    """A trial that this worker was given.

    Args:
        config: The study's.
        search: The study.
        asked: The trial.
        crew_of: Returns who trains.
        tell: Says something to the user.

    Raises:
        UserError: The plan refuses it.
    """

    def __init__(
        self, config: Config, search: Search, asked: Asked, crew_of: CrewOf, tell: Tell
    ) -> None:
        self.search, self.asked, self.crew_of, self.tell = search, asked, crew_of, tell
        self.values = rounded(asked.values)
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

    def run(self) -> Ending:
        """Train, report, and tell the study how it went.

        Raises:
            KeyboardInterrupt: The user stopped it; it comes next again. So for `SystemExit`.
            LeaseLost: Another worker has taken it.
        """
        ppo, number = self.config.ppo, self.asked.number
        self._write(Status.running)
        self.asked.note(
            key=self.record.key,
            values=json.dumps(self.values),
            iterations=iterations(ppo),
            steps=iterations(ppo) * updates(ppo),
        )
        shown = " ".join(f"{key}={value:g}" for key, value in self.values.items())
        self.tell(f"trial {number}: {shown}")
        crew = self.crew_of(self.config, self.values)
        try:
            ending = self._train(crew)
        except BaseException as error:
            crew.end(error)
            return self._ended(error)
        crew.end(None, ending.value)
        return ending

    def _train(self, crew: Crew) -> Ending:
        trial = Trial(str(folder_of(self.study)), self.asked.id, self.measure, self.pruning)
        try:
            done = run_steps(self.config, self.steps, crew, self.tell, trial)
        except Pruned as pruned:
            return self._pruned(pruned)
        artifact, trained = done[-1].artifact, done[-1].trained
        assert artifact is not None, "a trial trains PPO"
        rows = read_metrics(artifact.path / METRICS)
        ppo = self.config.ppo
        report(self.search.study, trial, rows, iterations(ppo) * updates(ppo))
        value = self.measure.value(rows)
        seconds = artifact.manifest.duration_s if trained else 0.0
        self.asked.note(iterations_run=iterations(ppo) if trained else 0, seconds=seconds)
        if not self.asked.complete(value):
            error = f"the objective is {value}"
            self._write(Status.failed, error=error)
            return Ending(Status.failed, error=error)
        self._write(Status.done, value)
        return Ending(Status.done, value)

    def _pruned(self, pruned: Pruned) -> Ending:
        ran = pruned.step // updates(self.config.ppo)
        value = self.measure.value(pruned.rows)
        path = folder_of(self.study) / PRUNED / f"{self.record.key}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in pruned.rows), "utf-8")
        self.asked.note(iterations_run=ran, seconds=pruned.seconds)
        self.asked.prune()
        self._write(Status.pruned, value)
        return Ending(Status.pruned, value)

    def _ended(self, error: BaseException) -> Ending:
        """Return how an exception ends the trial, unless it ends the worker."""
        if isinstance(error, LeaseLost):
            raise error
        if isinstance(error, WorkerGone):
            self.asked.put_back(lost=True)
            self._write(Status.interrupted, error=str(error))
            return Ending(Status.interrupted, error=str(error))
        if not isinstance(error, Exception):
            self.asked.put_back()
            self._write(Status.interrupted)
            raise error
        known = isinstance(error, UserError)
        text = str(error) if known else "".join(traceback.format_exception(error))
        self.asked.fail(text)
        self._write(Status.failed, error=text)
        return Ending(Status.failed, error=text)

    def _write(
        self, status: Status, objective: float | None = None, error: str | None = None
    ) -> None:
        record = replace(self.record, status=status, objective=objective, error=error)
        records_of(self.study).write(record)
