"""Rules for `ppo.continue_from`: whether more steps are more of the same."""

from __future__ import annotations

from rlhf_exp.config.problems import Findings
from rlhf_exp.config.training import Schedule


def check_continuing(found: Findings) -> None:
    """Report what keeps a finished PPO run from being extended; the run itself is not looked at."""
    config, key = found.config, "ppo.continue_from"
    if config.ppo.continue_from is None:
        return
    if config.ppo.schedule is not Schedule.constant:
        message = (
            "its learning rate depends on ppo.steps, so a longer run is another from the start; "
            "ppo.continue_from needs ppo.schedule=constant."
        )
        found.add("ppo.schedule", message)
    found.unless(config.ppo.use is None, key, "ppo.use is set too, and nothing would train.")
    found.unless(config.study.trials is None, key, "a study's trials begin at the beginning.")
