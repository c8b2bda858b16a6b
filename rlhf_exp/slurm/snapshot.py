"""The code as it was submitted: copied once, so that jobs that start later run the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from rlhf_exp.config.eval_toxicity import ScorerKind
from rlhf_exp.config.evaluation import scores_toxicity
from rlhf_exp.config.groups import CONF
from rlhf_exp.config.root import Config
from rlhf_exp.pipeline.plan import PACKAGE
from rlhf_exp.store.artifact import GIT_STATE, git_state
from rlhf_exp.store.fingerprint import file_digest

LAUNCH = "launch.py"


def copy_code(target: Path) -> None:
    """Copy `launch.py`, `conf/` and `rlhf_exp/` to a new folder, and note the state of git."""
    root = PACKAGE.parent
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    target.mkdir(parents=True)
    for folder in (PACKAGE, CONF):
        shutil.copytree(folder, target / folder.name, ignore=ignored)
    if (root / LAUNCH).is_file():
        shutil.copy2(root / LAUNCH, target / LAUNCH)
    (target / GIT_STATE).write_text(json.dumps(git_state(root)), encoding="utf-8")


def with_own_code(config: Config, target: Path) -> Config:
    """Copy the user's own functions beside the code; return the config that names the copies.

    A function's content is in the key and its path is not, so the key stays.
    """
    reward, toxicity = config.ppo.reward, config.eval.toxicity
    if reward.function is not None:
        reward = replace(reward, function=_copied(reward.function, target))
    if toxicity.scorer_kind is ScorerKind.function and scores_toxicity(config.eval.suite):
        toxicity = replace(toxicity, scorer=_copied(toxicity.scorer, target))
    return replace(
        config,
        ppo=replace(config.ppo, reward=reward),
        eval=replace(config.eval, toxicity=toxicity),
    )


def _copied(reference: str, target: Path) -> str:
    file, _, name = reference.rpartition(":")
    copy = target / "functions" / file_digest(Path(file))[:16] / Path(file).name
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(file, copy)
    return f"{copy}:{name}"
