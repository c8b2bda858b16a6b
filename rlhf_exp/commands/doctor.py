"""`rlhf-exp doctor OVERRIDES` lists what will not work of a run, in seconds and without training.

It looks at config, data, models, tokenizers, templates, reward model and judges together, as a run
does before its first stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rlhf_exp.commands.runs import composed_points
from rlhf_exp.config.checks import config_problems
from rlhf_exp.config.experiment import Config
from rlhf_exp.errors import UserError
from rlhf_exp.pipeline.hub import pinned
from rlhf_exp.pipeline.learning_rates import learning_rate_warnings
from rlhf_exp.pipeline.plan import plan
from rlhf_exp.pipeline.precision import with_precision
from rlhf_exp.pipeline.preflight import preflight_problems
from rlhf_exp.stages.data_module import DataModule

HEALTHY = "nothing was found that will not work"


def doctor(overrides: Sequence[str], config_dir: Path | None) -> str:
    """Look at a run, or at each point of a multirun.

    Args:
        overrides: As on `launch.py`'s command line.
        config_dir: A further config folder.

    Returns:
        The good news, and what works but is likely a mistake.

    Raises:
        UserError: Lists everything that will not work, each with its remedy.
    """
    problems: dict[str, None] = {}  # in order, each once
    warnings: dict[str, None] = {}
    for config in composed_points(overrides, config_dir):
        found, doubtful = _problems(config)
        problems |= dict.fromkeys(found)
        warnings |= dict.fromkeys(doubtful)
    warned = "".join(f"\n- warning: {warning}" for warning in warnings)
    if problems:
        listed = "".join(f"\n- {problem}" for problem in problems)
        raise UserError(f"{len(problems)} will not work:{listed}{warned}")
    return f"{HEALTHY}{warned}\n"


def _problems(config: Config) -> tuple[list[str], list[str]]:
    """Return what will not work of one run, and what works but is likely a mistake."""
    problems, warnings = list(map(str, config_problems(config))), list[str]()
    try:
        config, _ = with_precision(pinned(config))
        steps = plan(config)
        warnings += learning_rate_warnings(config, steps)
    except UserError as error:
        problems, steps = [*problems, str(error)], None
    try:
        problems += preflight_problems(config, steps, partial(DataModule.of_run, config))
    except Exception:
        if not problems:
            raise  # else one of them may be the reason
    return problems, warnings
