"""A worker of a study: asks for trials until there are as many as wanted, then for the table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from rlhf_exp import experiment
from rlhf_exp.config.root import Config, Stage
from rlhf_exp.config.study import StudyConfig
from rlhf_exp.errors import JobsFailed
from rlhf_exp.pipeline.hub import pinned
from rlhf_exp.search.journal import imported
from rlhf_exp.search.search import Asked, Search
from rlhf_exp.search.summary import best_value
from rlhf_exp.store.records import Status
from rlhf_exp.study.crews import Crews
from rlhf_exp.study.finals import evaluate_best
from rlhf_exp.study.setup import search_of
from rlhf_exp.study.table import study_text
from rlhf_exp.study.trial import Ending, TrialRun


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
        return experiment.run(_shared(config, Stage.ppo), overrides)
    imported()
    with Crews(config) as crews:
        if crews.follows:
            return crews.follow()
        return _Worker(config, crews).run(overrides)


def _shared(config: Config, stage: Stage) -> Config:
    """Return the experiment that makes what all trials start from."""
    return replace(config, stage=stage, study=StudyConfig())


class _Worker:
    def __init__(self, config: Config, crews: Crews) -> None:
        self.config, self.crews = config, crews
        self.console = Console(stderr=True)

    def run(self, overrides: list[str]) -> float | None:
        # What fails here is no trial's fault, and must not cost any.
        stage = Stage.reward if self.config.ppo.reward.model_scores else Stage.sft
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

    def _next(self, search: Search) -> Ending | None:
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

    def _planned(self, search: Search, asked: Asked) -> TrialRun:
        try:
            return TrialRun(self.config, search, asked, self.crews.of, self._tell)
        except BaseException:
            asked.put_back()
            raise

    def _tell(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)
