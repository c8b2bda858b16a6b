"""Checks of engines other than the native one: what their libraries cannot do, interpreters."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rlhf_exp.config.checks_shared import model_family
from rlhf_exp.config.experiment import Dtype, EngineName, PrecisionName, StrategyName
from rlhf_exp.config.problems import ConfigChecker
from rlhf_exp.config.training import (
    AdvantageEstimator,
    DpoLoss,
    KlEstimator,
    KlPlace,
    LossMean,
    ValueInit,
    ValueTrunk,
)


@dataclass(frozen=True)
class Interpreter:
    """What an engine's interpreter has to have.

    Attributes:
        setup: Command that makes one.
        page: Where that is told.
        folder: Where it then is.
        needs: The version that a distribution must have, or begin with, and why.
    """

    setup: str
    page: str
    folder: str
    needs: dict[str, tuple[str, str]]


INTERPRETERS = {
    EngineName.trlx: Interpreter(
        "bash rlhf_exp/trlx/setup.sh .venv-trlx",
        "docs/how-to/trlx.md",
        ".venv-trlx",
        # It sees future tokens from 4.46 at the latest.
        {"transformers": ("4.32.0", "with which trlx's reference is wrong")},
    ),
    EngineName.trl: Interpreter(
        "bash rlhf_exp/trl/setup.sh .venv-trl-engine",
        "docs/how-to/trl.md",
        ".venv-trl-engine",
        {"trl": ("1.16.", "whose trainers are others")},
    ),
}
LABELS = {EngineName.trlx: "trlx", EngineName.trl: "TRL"}


def check_engine(check: ConfigChecker, trained: Collection[str]) -> None:
    """Report what the library of an engine cannot do, and an interpreter that lacks it.

    Args:
        check: The config, and the problems found in it.
        trained: The stages that may be trained.
    """
    engine = check.config.engine.name
    stages = [stage for stage in engine.stages if stage in trained]
    if not stages:
        return
    _check_scale(check, stages)
    if engine is EngineName.trlx:
        _check_trlx(check)
    for stage in stages if engine is EngineName.trl else ():
        _check_trl_training(check, stage)
        {"ppo": _check_trl_rollouts, "dpo": _check_trl_pairs}[stage](check)
    if not check.config.plan:
        _check_interpreter(check, engine)


def _check_scale(check: ConfigChecker, stages: Collection[str]) -> None:
    config = check.config
    strategy, dtype = config.distributed.strategy, config.model.dtype
    what = f"{' and '.join(stage.upper() for stage in stages)} by {LABELS[config.engine.name]}"
    message = f"{what} runs in one process; make SFT and reward model with stage=reward first, "
    message += "then use distributed=single."
    check.require(strategy is StrategyName.single, "distributed.strategy", message)
    message = f"{what} computes in float32 only."
    precision = config.distributed.precision
    check.require(precision is PrecisionName.float32, "distributed.precision", message)
    check.require(dtype is Dtype.float32, "model.dtype", message)
    check.require(not config.probe, "probe", "a probe measures engine=native only.")


TRLX_FAMILIES = ("gpt2", "gptj", "gpt_neox", "llama")


def _check_trlx(check: ConfigChecker) -> None:
    family = model_family(check.config.model)
    message = f"trlx trains {', '.join(TRLX_FAMILIES)}; use engine=native."
    key = "model.path" if check.config.model.path else "model.architecture.type"
    check.require(family in TRLX_FAMILIES, key, message)
    _check_trlx_training(check)
    _check_trlx_algorithm(check)


def _check_trlx_training(check: ConfigChecker) -> None:
    ppo = check.config.ppo
    native = "trlx has none; leave it out, or use engine=native."
    check.require(ppo.lora.rank == 0, "ppo.lora.rank", "not with trlx; use ppo.train_blocks.")
    check.require(ppo.warmup_steps == 0, "ppo.warmup_steps", f"a warm-up: {native}")
    check.require(not ppo.gradient_checkpointing, "ppo.gradient_checkpointing", native)
    check.require(not ppo.keep, "ppo.keep", f"snapshots: {native}")
    check.require(ppo.keep_every is None, "ppo.keep_every", f"snapshots: {native}")
    check.require(not ppo.keep_state, "ppo.keep_state", f"checkpoints: {native}")
    check.require(ppo.continue_from is None, "ppo.continue_from", f"checkpoints: {native}")
    message = (
        "trlx adds up the gradients of micro-batches without dividing by their number; use null."
    )
    check.require(ppo.micro_batch in (None, ppo.batch), "ppo.micro_batch", message)
    message = "trlx divides by the standard deviation of a part's scores; use at least 2."
    check.require(ppo.rollouts >= 2, "ppo.rollouts", message)
    check.require(ppo.generation.batch >= 2, "ppo.generation.batch", message)


def _check_trlx_algorithm(check: ConfigChecker) -> None:
    ppo = check.config.ppo
    message = "trlx's value head is small and reads the policy's states; use "
    check.require(ppo.value_init is ValueInit.small, "ppo.value_init", f"{message}small.")
    check.require(ppo.value_trunk is ValueTrunk.shared, "ppo.value_trunk", f"{message}shared.")
    message = "PPO by trlx takes one reward; use engine=native."
    check.require(not ppo.reward.terms, "ppo.reward.terms", message)
    message = "trlx has one response to a prompt, and advantages by gae; use engine=native."
    check.require(ppo.uses_values, "ppo.advantage", message)
    check.require(ppo.samples_per_prompt == 1, "ppo.samples_per_prompt", message)
    message = "trlx means over the tokens of a minibatch; use tokens."
    check.require(ppo.loss_mean is LossMean.tokens, "ppo.loss_mean", message)
    message = "trlx has the penalty k1 in the reward; leave it out, or use engine=native."
    check.require(ppo.kl.where is KlPlace.reward, "ppo.kl.where", message)
    check.require(ppo.kl.estimator is KlEstimator.k1, "ppo.kl.estimator", message)
    check.require(ppo.entropy_coef == 0, "ppo.entropy_coef", "trlx has no entropy bonus; use 0.")
    check.require(ppo.kl.stop is None, "ppo.kl.stop", "trlx does not stop by KL; use null.")
    message = "trlx takes log-probabilities at temperature 1, whatever it samples at; use 1."
    check.require(ppo.generation.temperature == 1, "ppo.generation.temperature", message)


def _check_trl_training(check: ConfigChecker, stage: str) -> None:
    key = f"{stage}.".__add__
    native = "engine=trl has none; leave it out, or use engine=native."
    message = f"not with engine=trl; use {stage}.train_blocks."
    check.require(check.value(key("lora.rank")) == 0, key("lora.rank"), message)
    check.require(not check.value(key("keep")), key("keep"), f"snapshots: {native}")
    check.require(check.value(key("keep_every")) is None, key("keep_every"), f"snapshots: {native}")
    batch, micro = check.value(key("batch")), check.value(key("micro_batch"))
    message = f"TRL has equal micro-batches; use a divisor of {stage}.batch={batch}."
    whole = micro is None or micro < 1 or batch % micro == 0
    check.require(whole, key("micro_batch"), message)


def _check_trl_rollouts(check: ConfigChecker) -> None:
    ppo = check.config.ppo
    if not ppo.advantage.groups:
        message = "TRL has RLOO and GRPO; use ppo=rloo or ppo=grpo, or engine=native."
        check.add("ppo.advantage", message)
        return
    message = "TRL pads prompts on the left without telling positions, which a gpt2 learns; use "
    key = "model.path" if check.config.model.path else "model.architecture.type"
    learned = model_family(check.config.model) == "gpt2"
    check.require(not learned, key, f"{message}engine=native, or a model with rotary positions.")
    checkpoints = "checkpoints: engine=trl has none; leave it out, or use engine=native."
    check.require(not ppo.keep_state, "ppo.keep_state", checkpoints)
    check.require(ppo.continue_from is None, "ppo.continue_from", checkpoints)
    whole = ppo.batch < 1 or ppo.rollouts % ppo.batch == 0
    message = f"TRL has equal minibatches; use a divisor of ppo.rollouts={ppo.rollouts}."
    check.require(whole, "ppo.batch", message)
    message = "engine=trl takes one reward; use engine=native."
    check.require(not ppo.reward.terms, "ppo.reward.terms", message)
    message = "TRL's penalty has a fixed weight; use null."
    check.require(ppo.kl.target is None, "ppo.kl.target", message)
    check.require(ppo.kl.stop is None, "ppo.kl.stop", "TRL does not stop by KL; use null.")
    message = "not with engine=trl; use 0."
    check.require(ppo.entropy_coef == 0, "ppo.entropy_coef", message)
    rloo = ppo.advantage is AdvantageEstimator.rloo
    place, estimator = (KlPlace.reward, KlEstimator.k1) if rloo else (KlPlace.loss, KlEstimator.k3)
    name = "RLOO" if rloo else "GRPO"
    message = f"TRL's {name} has the penalty {estimator.name} in the {place.name}; use "
    check.require(ppo.kl.where is place, "ppo.kl.where", f"{message}{place.name}.")
    check.require(ppo.kl.estimator is estimator, "ppo.kl.estimator", f"{message}{estimator.name}.")
    by_token = ppo.loss_mean is LossMean.tokens
    if rloo:
        message = "TRL's RLOO has the ratio of whole responses, and means over these; leave it out."
        check.require(by_token, "ppo.loss_mean", message)
    elif by_token and ppo.micro_batch not in (None, ppo.batch):
        message = "TRL takes the mean over tokens in each micro-batch; use null."
        check.add("ppo.micro_batch", message)


def _check_trl_pairs(check: ConfigChecker) -> None:
    dpo = check.config.dpo
    check.require(not dpo.packing, "dpo.packing", "not with engine=trl; leave it out.")
    message = "TRL 1.16 smooths no labels of this loss; use 0."
    check.require(dpo.label_smoothing == 0, "dpo.label_smoothing", message)
    if dpo.loss is DpoLoss.ipo:
        message = "TRL's IPO takes means over tokens; use true."
        check.require(dpo.length_normalised, "dpo.length_normalised", message)
    elif dpo.loss is DpoLoss.hinge:
        message = "TRL's hinge loss takes sums over tokens; use false."
        check.require(not dpo.length_normalised, "dpo.length_normalised", message)


def _check_interpreter(check: ConfigChecker, engine: EngineName) -> None:
    python, needed, label = check.config.engine.python, INTERPRETERS[engine], LABELS[engine]
    remedy = f"`{needed.setup}` makes one ({needed.page}): "
    remedy += f"engine.python={needed.folder}/bin/python."
    if python is None:
        message = f"engine={engine.name} needs an interpreter that has {label}; {remedy}"
        check.add("engine.python", message)
        return
    path = Path(python).expanduser()
    if not path.is_file() or not os.access(path, os.X_OK):
        check.add("engine.python", f"there is no interpreter {path.absolute()}; {remedy}")
        return
    names = tuple(sorted({engine.name, *needed.needs}))
    versions = installed_versions(path.absolute(), path.stat().st_mtime_ns, names)
    if versions is None:
        check.add("engine.python", f"is no Python that runs; {remedy}")
        return
    if versions[engine.name] is None:
        check.add("engine.python", f"has no {label}; {remedy}")
        return
    for name, (version, why) in needed.needs.items():
        if not (versions[name] or "").startswith(version):
            message = f"has {name} {versions[name]}, {why}; it needs {version.rstrip('.')}; "
            check.add("engine.python", f"{message}{remedy}")


_VERSIONS_SCRIPT = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
versions = {}
for name in sys.argv[1:]:
    try:
        versions[name] = version(name)
    except PackageNotFoundError:
        versions[name] = None
print(json.dumps(versions))
"""
_VERSIONS_TIMEOUT_S = 60.0


@cache
def installed_versions(
    python: Path, changed: int, names: tuple[str, ...]
) -> dict[str, str | None] | None:
    """Return the versions that an interpreter has of distributions; `None` if it fails.

    Cached by path and modification time: a multirun and a study check the same interpreter often.
    """
    command = [str(python), "-I", "-c", _VERSIONS_SCRIPT, *names]
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, timeout=_VERSIONS_TIMEOUT_S, check=True
        )
        versions: dict[str, str | None] = json.loads(process.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return versions
