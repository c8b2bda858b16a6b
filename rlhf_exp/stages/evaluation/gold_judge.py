"""The bundled data's rule-based judge, which nothing is trained on."""

from __future__ import annotations

from collections.abc import Callable

from rlhf_exp.config.experiment import Config, DataSource


def gold_judge(config: Config) -> Callable[[str, str], float] | None:
    """Return the toy data's rule-based judge of (prompt, answer); other data has none."""
    if config.data.source != DataSource.toy:
        return None
    from rlhf_exp.data.toy.gold_judge import gold_score

    return lambda prompt, answer: gold_score(prompt, answer).total
