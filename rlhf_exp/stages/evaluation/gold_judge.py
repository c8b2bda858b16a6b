"""The rule-based judge of the bundled toy data, on which nothing is trained."""

from __future__ import annotations

from collections.abc import Callable

from rlhf_exp.config.experiment import Config, DataSource


def gold_judge(config: Config) -> Callable[[str, str], float] | None:
    """Return the judge, (prompt, answer) to a score from 0 to 1; `None` for other data."""
    if config.data.source != DataSource.toy:
        return None
    from rlhf_exp.data.toy.gold_judge import gold_score

    return lambda prompt, answer: gold_score(prompt, answer).total
