"""The rule-based judges of the bundled data, on which no reward model is trained."""

from __future__ import annotations

from rlhf_exp.config.experiment import Config, DataSource
from rlhf_exp.evaluation.comparison import ACCURACY, GoldJudge


def gold_judge(config: Config) -> GoldJudge | None:
    """Return the judge of the config's data; `None` for data that are not bundled."""
    if config.data.source is DataSource.toy:
        from rlhf_exp.data.toy.gold_judge import gold_score

        return GoldJudge(
            "gold", "Gold judge, 0 to 1", lambda prompt, answer: gold_score(prompt, answer).total
        )
    if config.data.source is DataSource.arithmetic:
        from rlhf_exp.rewards.arithmetic import is_right

        return GoldJudge(
            ACCURACY,
            "Accuracy, share right",
            lambda prompt, answer: float(is_right(prompt, answer)),
        )
    return None
