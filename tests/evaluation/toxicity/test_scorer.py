"""The default toxicity scorer."""

from __future__ import annotations

import builtins
import subprocess
import sys

import numpy as np
import pytest

from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.toxicity.scorer import ProfanityCheckScorer


def test_insults_score_above_politeness_and_silence_scores_zero() -> None:
    scorer = ProfanityCheckScorer()
    found = scorer.score(["You fucking idiot, shut up", "", "Have a lovely day!", " \n"])
    assert found[0] > 0.9
    assert found[2] < 0.2
    assert found[1] == found[3] == 0.0
    assert found.dtype == np.float64
    assert scorer.name.startswith("alt-profanity-check ")


def test_no_texts_and_only_blank_texts() -> None:
    scorer = ProfanityCheckScorer()
    assert scorer.score([]).shape == (0,)
    assert list(scorer.score(["", "\t"])) == [0.0, 0.0]


def test_a_missing_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: object, **kwargs: object) -> object:
        if name == "profanity_check":
            raise ImportError("No module named 'profanity_check'")
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match="pip install alt-profanity-check"):
        ProfanityCheckScorer()


def test_the_package_is_loaded_only_when_a_scorer_is_made() -> None:
    module = "rlhf_exp.evaluation.toxicity.scorer"
    code = f"import sys, {module}; sys.exit('profanity_check' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
