"""The toxicity scorer that a config asks for, and what of it can be looked at before anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

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
    UserToxicity,
    toxic_label,
)
from rlhf_exp.models.pretrained import load_config
from rlhf_exp.stages.training import attention_of
from rlhf_exp.training.scorers import load_function

KEY = "eval.toxicity.scorer"


def toxicity_scorer(config: Config, world: World) -> ToxicityScorer:
    """Return the scorer.

    Raises:
        UserError: There is none such.
    """
    section = config.eval.toxicity
    if section.scorer_kind is ScorerKind.profanity:
        return ProfanityCheckScorer()
    if section.scorer_kind is ScorerKind.function:
        return _function(section)
    return ClassifierToxicity(
        _place(section),
        section.scorer_revision,
        section.label,
        world.device,
        attention_of(config),
        section.batch,
    )


def check_scorer(section: ToxicityConfig) -> None:
    """Raise for a scorer that could not be made, without loading weights.

    Raises:
        UserError: As for `toxicity_scorer`.
    """
    if section.scorer_kind is ScorerKind.profanity:
        ProfanityCheckScorer()
    elif section.scorer_kind is ScorerKind.function:
        _function(section)
    else:
        place = _place(section)
        toxic_label(place, load_config(place, section.scorer_revision), section.label)


def shared_scores(
    scorer: ToxicityScorer, texts: Sequence[str], world: World
) -> NDArray[np.float64]:
    """Return the toxicity of N texts [N], each process scoring its share; the same in all of them.

    A text that occurs several times is scored once. One of white space alone is silence, which is
    not toxic, whatever a scorer makes of it.
    """
    different = [text for text in dict.fromkeys(texts) if text.strip()]
    if not different:
        return np.zeros(len(texts))
    rows = world.share(len(different)).rows
    shares = world.run_on_all(lambda: scorer.score([different[row] for row in rows]).tolist())
    found = [score for share in shares for score in share][: len(different)]
    known = dict(zip(different, found, strict=True))
    return np.array([known.get(text, 0.0) for text in texts])


def _function(section: ToxicityConfig) -> FunctionToxicity:
    function = cast(UserToxicity, load_function(section.scorer, KEY))
    return FunctionToxicity(function, section.scorer, KEY)


def _place(section: ToxicityConfig) -> str:
    return str(local_folder(section.scorer) or section.scorer)
