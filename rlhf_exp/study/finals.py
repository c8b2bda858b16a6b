"""The end of a study: its best trials answer the test prompts, which nothing was chosen by.

Beside them the first trial does, which has the config's own values: what the search was worth.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from rlhf_exp import experiment
from rlhf_exp.config.evaluation import Suite
from rlhf_exp.config.root import Config, Stage
from rlhf_exp.config.trial import Values, trial_config
from rlhf_exp.pipeline.crew import Crew
from rlhf_exp.search.summary import best_trials
from rlhf_exp.study.trial import trial_overrides

if TYPE_CHECKING:
    from optuna import Study

CrewOf = Callable[[Config, Values], Crew]


def tests(config: Config) -> bool:
    """Whether there is a table of test prompts at the end."""
    wanted = config.stage in (Stage.eval, Stage.pipeline) and config.eval.suite is not Suite.none
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
