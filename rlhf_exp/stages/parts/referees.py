"""Who judges answers in the reward-quality part: the reward itself, and who was not maximised."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_exp.config.evaluation import REFEREE
from rlhf_exp.config.load import to_dict
from rlhf_exp.config.root import Config
from rlhf_exp.evaluation.answers import Answer
from rlhf_exp.stages.bench import Bench
from rlhf_exp.stages.gold import gold_judge
from rlhf_exp.stages.reward import pairs_of
from rlhf_exp.store.artifact import MANIFEST, Manifest

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Judge:
    """Gives answers a number.

    Attributes:
        key: In names of metrics.
        name: In the report.
        score: The number of one answer.
    """

    key: str
    name: str
    score: Callable[[Answer], float | None]

    def scores(self, answers: Sequence[Answer]) -> Floats:
        """Return the scores [N] of answers."""
        return np.array([self.score(answer) for answer in answers], dtype=np.float64)


def judges_of(config: Config, answers: Sequence[Answer]) -> list[Judge]:
    """Return the reward first, then the judges that nothing was trained on.

    Args:
        config: The experiment.
        answers: Some answers, whose scores say whether there is a second reward model.
    """
    found = [Judge("reward", config.ppo.reward.kind, lambda answer: answer.score)]
    if answers[0].referee is not None:
        found.append(Judge(REFEREE, "referee", lambda answer: answer.referee))
    gold = gold_judge(config)
    if gold is not None:
        found.append(Judge("gold", "gold judge", lambda answer: gold(answer.prompt, answer.text)))
    return found


def about_referee(bench: Bench) -> dict[str, Any] | None:
    """Return what is known of the second reward model: name, seed, part, and what pairs it shares.

    `shared` is the share of the reward model's training pairs that the referee was trained on too;
    `None` where either is not this project's, or they were trained on different data.
    """
    if REFEREE not in bench.context.models:
        return None
    configs = [_config(bench.context.models.get(role)) for role in (REFEREE, "reward")]
    referee, reward = configs
    known: dict[str, Any] = {"name": str(bench.config.eval.reward_quality.referee)}
    known |= {name: (referee or {}).get("reward", {}).get(name) for name in ("seed", "part")}
    return {**known, "shared": _shared(bench, referee, reward)}


def _config(model: str | None) -> Mapping[str, Any] | None:
    path = None if model is None else Path(model).parent / MANIFEST
    return Manifest.read(path.parent).config if path is not None and path.is_file() else None


def _shared(
    bench: Bench, referee: Mapping[str, Any] | None, reward: Mapping[str, Any] | None
) -> float | None:
    here = to_dict(bench.config)["data"]
    if referee is None or reward is None or not referee["data"] == reward["data"] == here:
        return None
    rows = bench.context.materials.corpus.preferences.train
    own, other = (
        {row.origin for row in pairs_of(rows, config["reward"].get("part"))}
        for config in (reward, referee)
    )
    return len(own & other) / len(own)
