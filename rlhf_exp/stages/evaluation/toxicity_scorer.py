"""The toxicity scorer of a config, and how all processes score texts by it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rlhf_exp.config.checks_shared import local_folder
from rlhf_exp.config.evaluation import ScorerKind, ToxicityConfig
from rlhf_exp.config.experiment import Config
from rlhf_exp.distributed.world import World
from rlhf_exp.evaluation.toxicity.scorers import (
    ClassifierToxicity,
    FunctionToxicity,
    ProfanityCheckScorer,
    ToxicityScorer,
    toxic_label,
)
from rlhf_exp.models.pretrained import load_config
from rlhf_exp.stages.setup import attention_of
from rlhf_exp.user_function import load_function

KEY = "eval.toxicity.scorer"


def toxicity_scorer(config: Config, world: World) -> ToxicityScorer:
    """Return the scorer.

    Raises:
        UserError: The package, function, model or label does not exist.
    """
    section = config.eval.toxicity
    if section.scorer_kind is ScorerKind.profanity:
        return ProfanityCheckScorer()
    if section.scorer_kind is ScorerKind.function:
        return _function(section)
    return ClassifierToxicity(
        _folder_or_hub_id(section),
        section.scorer_revision,
        section.label,
        world.device,
        attention_of(config),
        section.batch,
    )


def check_scorer(section: ToxicityConfig) -> None:
    """Check that the scorer can be made, without loading weights.

    Raises:
        UserError: As for `toxicity_scorer`.
    """
    if section.scorer_kind is ScorerKind.profanity:
        ProfanityCheckScorer()
    elif section.scorer_kind is ScorerKind.function:
        _function(section)
    else:
        path = _folder_or_hub_id(section)
        toxic_label(path, load_config(path, section.scorer_revision), section.label)


def shared_scores(
    scorer: ToxicityScorer, texts: Sequence[str], world: World
) -> NDArray[np.float64]:
    """Return the toxicity of N texts [N], each process scoring its share; the same in all of them.

    A text that occurs several times is scored once. White space alone is silence and counts as not
    toxic, whatever a scorer makes of it.
    """
    different = [text for text in dict.fromkeys(texts) if text.strip()]
    if not different:
        return np.zeros(len(texts))
    rows = world.share(len(different)).rows
    shares = world.run_on_all(lambda: scorer.score([different[row] for row in rows]).tolist())
    scores = [score for share in shares for score in share][: len(different)]
    score_of = dict(zip(different, scores, strict=True))
    return np.array([score_of.get(text, 0.0) for text in texts])


def _function(section: ToxicityConfig) -> FunctionToxicity:
    return FunctionToxicity(load_function(section.scorer, KEY), section.scorer, KEY)


def _folder_or_hub_id(section: ToxicityConfig) -> str:
    return str(local_folder(section.scorer) or section.scorer)
