"""Models that a user brings are compared with themselves before anything trains with them.

What is asked of a model follows from the config (`use_of`); whether it can do that is looked at in
`stages/model_check.py`. What was found is kept in `cache/model_checks/`, by the digest of the
model, of what is asked and of the code: a second run looks nothing up but that.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_exp.config.experiment import Config, EngineName
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


def model_problems(config: Config, work: Collection[str], given: Mapping[str, str]) -> list[str]:
    """Return what the models that a user brings cannot be used for, one sentence each.

    Args:
        config: The experiment.
        work: The stages that will run.
        given: Folder or hub id by role, of the models that the user brings.
    """
    problems = []
    for brought in brought_models(config, work, given):
        try:
            texts = [problem.text for problem in _kept_or_found(config, brought)]
        except UserError as error:  # it cannot be loaded
            texts = [str(error)]
        problems += [f"{brought.option}: {text}" for text in texts]
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
    to_do = [stage for stage in ("sft", "reward", "dpo", "ppo", "eval") if stage in work]
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

    native = config.engine.name is EngineName.native
    ours = {"sft", "reward", "dpo", *(["ppo"] if native else [])}
    trained = [name for name in stages if name in ours]
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
    asked = "dpo" in stages and config.dpo.eval_prompts > 0
    samples = asked or "eval" in stages or ("ppo" in stages and native)
    return ModelUse(
        tuple(uses),
        cache_of(config) if samples else None,
        attention_of(config),
        max(lengths, default=config.ppo.seq_length),
    )


def _kept_or_found(config: Config, brought: BroughtModel) -> list[Problem]:
    """Return the problems of a model, as they were found before or as they are found now."""
    from rlhf_exp.stages.model_check import Problem, check_model

    use = use_of(config, brought.stages)
    cache = Path(config.output_dir) / "cache"
    content: dict[str, Any] = {
        "model": Keys(config, DigestCache(cache / "digests.json")).given(brought.path),
        "revision": brought.revision,
        "use": asdict(use),
        "versions": package_versions(),
        "code": code_digests(_CHECK, PACKAGE, notes=cache / "code.json"),
    }
    path = cache / "model_checks" / f"{key_of(content)}.json"
    kept = _read(path)
    if kept is None:
        kept = [list(problem) for problem in check_model(brought.path, brought.revision, use)]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, {"problems": kept, "digest": key_of({"problems": kept})})
    return [Problem(*entry) for entry in kept]


def _read(path: Path) -> list[list[str]] | None:
    """Return the problems kept in a file; `None` if there is none, or it is damaged."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        problems: list[list[str]] = kept["problems"]
        return problems if key_of({"problems": problems}) == kept["digest"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
