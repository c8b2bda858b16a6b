"""Models that a user brings are compared with themselves before anything trains with them.

A language model with `model(...)`, a reward model with the library's classifier or with its trunk
and head by themselves.

What is asked of a model follows from the config (`use_of`); whether it can do that is looked at in
`stages/model_check.py`. What was found is kept in `cache/model_checks/`, by the digest of the
model, of what is asked and of the code: a second run looks nothing up but that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_exp.config.evaluation import REFEREE
from rlhf_exp.config.experiment import STAGES, UNTRAINED, Config
from rlhf_exp.config.training import RewardInit, TrainingConfig
from rlhf_exp.errors import UserError
from rlhf_exp.pipeline.keys import Keys
from rlhf_exp.pipeline.plan import PACKAGE
from rlhf_exp.store.artifact import package_versions
from rlhf_exp.store.atomic_files import write_json_atomic
from rlhf_exp.store.code_digest import code_digests
from rlhf_exp.store.fingerprint import DigestCache, key_of

if TYPE_CHECKING:
    from rlhf_exp.stages.model_check import ModelUse, Problem

_CHECK = "rlhf_exp.stages.model_check"


class BroughtModel(NamedTuple):
    """A causal language model that a run starts from and did not make.

    Attributes:
        option: the option that names it, as the user wrote it.
        path: a folder or a hub id.
        revision: of a hub id.
        stages: the stages that train, score or sample with it or with what becomes of it.
    """

    option: str
    path: str
    revision: str | None
    stages: tuple[str, ...]


def model_problems(
    config: Config,
    work: Collection[str],
    given: Mapping[str, str],
    known: Sequence[str] = (),
) -> list[str]:
    """Return what the models that a user brings cannot be used for, one sentence each.

    Args:
        config: The experiment.
        work: The stages that will run.
        given: Folder or hub id by role, of the models that the user brings.
        known: Problems that were found already: a reward model that has one is not compared.
    """
    problems = []
    for brought in brought_models(config, work, given):
        try:
            texts = [problem.text for problem in _kept_or_found(config, brought)]
        except UserError as error:  # it cannot be loaded
            texts = [str(error)]
        problems += [f"{brought.option}: {text}" for text in texts]
    for role, named in _reward_options(config).items():
        if role in given and {"ppo", "eval"} & set(work):
            if any(problem.startswith(f"{named}:") for problem in known):
                continue
            try:
                texts = _reward_problems(config, given[role])
            except UserError as error:  # it cannot be loaded
                texts = [str(error)]
            problems += [f"{named}: {text}" for text in texts]
    return problems


def brought_models(
    config: Config, work: Collection[str], given: Mapping[str, str]
) -> list[BroughtModel]:
    """Return the language models that stages start from, with these stages.

    Args:
        config: The experiment.
        work: The stages that will run.
        given: Folder or hub id by role.
    """
    to_do = [stage for stage in STAGES if stage in work]
    if config.eval.samples is not None and "eval" in to_do:
        to_do.remove("eval")  # answers that are stored need no model
    base = [name for name in to_do if name == "sft"]
    if "reward" in to_do and config.reward.init == RewardInit.base:
        base.append("reward")
    after_sft = [name for name in to_do if name not in base]
    if config.sft.use is None:
        base += after_sft
    samples = tuple(name for name in to_do if name == "eval")
    stages = {"base": tuple(base), "sft": tuple(after_sft)}
    stages |= dict.fromkeys(["dpo", "ppo", *config.eval.models], samples) | stages
    options = {"base": f"model.path={config.model.path}"}
    options |= {role: f"{role}.use={getattr(config, role).use}" for role in ("sft", "dpo", "ppo")}
    revision = config.model.revision
    return [
        BroughtModel(
            options.get(role, f"eval.models: {role}"),
            path,
            revision if role == "base" else None,
            stages[role],
        )
        for role, path in given.items()
        if stages.get(role)
    ]


def use_of(config: Config, stages: Sequence[str]) -> ModelUse:
    """Return what the given stages of an experiment ask of a model."""
    from rlhf_exp.stages.model_check import ModelUse, StageUse
    from rlhf_exp.stages.setup import attention_of, cache_of
    from rlhf_exp.stages.training import lora_of

    others = (*config.engine.name.stages, *UNTRAINED)
    trained = [name for name in stages if name not in others]
    uses, lengths = [], []
    for name in trained:
        section: TrainingConfig = getattr(config, name)
        uses.append(
            StageUse(
                name,
                section.train_blocks,
                lora_of(section),
                packing=name in ("sft", "dpo") and getattr(config, name).packing,
                checkpointing=section.gradient_checkpointing,
            )
        )
        lengths.append(getattr(config, name).seq_length)
    asked = "dpo" in trained and config.dpo.eval_prompts > 0
    samples = asked or set(UNTRAINED) & set(stages) or "ppo" in trained
    return ModelUse(
        tuple(uses),
        cache_of(config) if samples else None,
        attention_of(config),
        max(lengths, default=config.ppo.seq_length),
    )


def _kept_or_found(config: Config, brought: BroughtModel) -> list[Problem]:
    """Return the problems of a model, as they were found before or as they are found now."""
    from rlhf_exp.stages.model_check import check_model

    use = use_of(config, brought.stages)
    content = {"revision": brought.revision, "use": asdict(use)}
    return _kept(
        config,
        brought.path,
        content,
        lambda: check_model(brought.path, brought.revision, use),
    )


def _reward_options(config: Config) -> dict[str, str]:
    """Return the option of each reward model that a config may name, as the user wrote it."""
    options = {
        "reward": f"reward.use={config.reward.use}",
        REFEREE: f"eval.reward_quality.referee={config.eval.reward_quality.referee}",
    }
    terms = config.ppo.reward.term_models
    return options | {role: f"ppo.reward.terms: {spec}" for role, spec in terms.items()}


def _reward_problems(config: Config, path: str) -> list[str]:
    """Return why a reward model cannot score, as it was found before or as it is found now."""
    from rlhf_exp.stages.model_check import check_reward_model
    from rlhf_exp.stages.setup import attention_of

    attention = attention_of(config)
    content = {"reward": True, "attention": attention}
    found = _kept(config, path, content, lambda: check_reward_model(path, attention))
    return [problem.text for problem in found]


def _kept(
    config: Config, path: str, content: Mapping[str, Any], check: Callable[[], list[Problem]]
) -> list[Problem]:
    """Return what a check of a model finds, or found before.

    Args:
        config: The experiment.
        path: The model's folder or hub id.
        content: What else its outcome depends on.
        check: The check.
    """
    from rlhf_exp.stages.model_check import Problem

    cache = Path(config.output_dir) / "cache"
    key = key_of(
        {
            "model": Keys(config, DigestCache(cache / "digests.json")).given(path),
            "versions": package_versions(),
            "code": code_digests(_CHECK, PACKAGE, notes=cache / "code.json"),
            **content,
        }
    )
    file = cache / "model_checks" / f"{key}.json"
    kept = _read(file)
    if kept is None:
        kept = [list(problem) for problem in check()]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(file, {"problems": kept, "digest": key_of({"problems": kept})})
    return [Problem(*entry) for entry in kept]


def _read(path: Path) -> list[list[str]] | None:
    """Return the problems kept in a file; `None` if there is none, or it is damaged."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        problems: list[list[str]] = kept["problems"]
        return problems if key_of({"problems": problems}) == kept["digest"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
