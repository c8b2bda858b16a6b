"""Rules for `engine`: what trlx cannot do is refused, and its interpreter is looked at."""

from __future__ import annotations

import json
import os
import subprocess
from functools import cache
from pathlib import Path

from rlhf_exp.config.check_model import model_family
from rlhf_exp.config.model import Dtype
from rlhf_exp.config.ppo import ValueInit, ValueTrunk
from rlhf_exp.config.problems import Findings
from rlhf_exp.config.running import Strategy

SETUP = "bash rlhf_exp/engines/trlx/setup.sh .venv-trlx"
TRANSFORMERS = "4.32.0"
"""With a later one, trlx's reference is wrong: it sees future tokens from 4.46 at the latest."""
FAMILIES = ("gpt2", "gptj", "gpt_neox", "llama")
_ASK = """
import json
from importlib.metadata import PackageNotFoundError, version
found = {}
for name in ("trlx", "transformers"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""
_ASK_S = 60.0


def check_trlx(found: Findings) -> None:
    """Report what PPO by trlx cannot do, and an interpreter without trlx."""
    _check_size(found)
    _check_training(found)
    _check_algorithm(found)
    if not found.config.plan:
        _check_interpreter(found)


def _check_size(found: Findings) -> None:
    config = found.config
    strategy, dtype = config.distributed.strategy, config.model.dtype
    message = "PPO by trlx runs in one process; make SFT and reward model with stage=reward first, "
    message += "then use distributed=single."
    found.unless(strategy is Strategy.single, "distributed.strategy", message)
    message = "PPO by trlx computes in float32 only."
    precision = config.distributed.precision
    found.unless(precision is Dtype.float32, "distributed.precision", message)
    found.unless(dtype is Dtype.float32, "model.dtype", message)
    found.unless(not config.probe, "probe", "a probe measures engine=native only.")
    family = model_family(config.model)
    message = f"trlx trains {', '.join(FAMILIES)}; use engine=native."
    key = "model.path" if config.model.path else "model.architecture.type"
    found.unless(family in FAMILIES, key, message)


def _check_training(found: Findings) -> None:
    ppo = found.config.ppo
    native = "trlx has none; leave it out, or use engine=native."
    found.unless(ppo.lora.rank == 0, "ppo.lora.rank", "not with trlx; use ppo.train_blocks.")
    found.unless(ppo.warmup_steps == 0, "ppo.warmup_steps", f"a warm-up: {native}")
    found.unless(not ppo.gradient_checkpointing, "ppo.gradient_checkpointing", native)
    found.unless(not ppo.keep, "ppo.keep", f"snapshots: {native}")
    found.unless(ppo.keep_every is None, "ppo.keep_every", f"snapshots: {native}")
    found.unless(not ppo.keep_state, "ppo.keep_state", f"checkpoints: {native}")
    found.unless(ppo.continue_from is None, "ppo.continue_from", f"checkpoints: {native}")
    message = (
        "trlx adds up the gradients of micro-batches without dividing by their number; use null."
    )
    found.unless(ppo.micro_batch in (None, ppo.batch), "ppo.micro_batch", message)
    message = "trlx divides by the standard deviation of a part's scores; use at least 2."
    found.unless(ppo.rollouts >= 2, "ppo.rollouts", message)
    found.unless(ppo.generation.batch >= 2, "ppo.generation.batch", message)


def _check_algorithm(found: Findings) -> None:
    ppo = found.config.ppo
    message = "trlx's value head is small and reads the policy's states; use "
    found.unless(ppo.value_init is ValueInit.small, "ppo.value_init", f"{message}small.")
    found.unless(ppo.value_trunk is ValueTrunk.shared, "ppo.value_trunk", f"{message}shared.")
    found.unless(ppo.entropy_coef == 0, "ppo.entropy_coef", "trlx has no entropy bonus; use 0.")
    found.unless(ppo.kl.stop is None, "ppo.kl.stop", "trlx does not stop by KL; use null.")
    message = "trlx takes log-probabilities at temperature 1, whatever it samples at; use 1."
    found.unless(ppo.generation.temperature == 1, "ppo.generation.temperature", message)


def _check_interpreter(found: Findings) -> None:
    python = found.config.engine.python
    remedy = f"`{SETUP}` makes one (docs/trlx.md): engine.python=.venv-trlx/bin/python."
    if python is None:
        found.add("engine.python", f"engine=trlx needs an interpreter that has trlx; {remedy}")
        return
    path = Path(python).expanduser()
    if not path.is_file() or not os.access(path, os.X_OK):
        found.add("engine.python", f"there is no interpreter {path.absolute()}; {remedy}")
        return
    versions = _versions(path.absolute(), path.stat().st_mtime_ns)
    if versions is None:
        found.add("engine.python", f"is no Python that runs; {remedy}")
    elif versions["trlx"] is None:
        found.add("engine.python", f"has no trlx; {remedy}")
    elif versions["transformers"] != TRANSFORMERS:
        message = f"has transformers {versions['transformers']}, with which trlx's reference is "
        found.add("engine.python", f"{message}wrong; it needs {TRANSFORMERS}; {remedy}")


@cache
def _versions(python: Path, changed: int) -> dict[str, str | None] | None:
    """Return what an interpreter has; `None` if it does not answer.

    Asked once for all points of a multirun and all corners of a study.
    """
    command = [str(python), "-I", "-c", _ASK]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_S, check=True)
        found: dict[str, str | None] = json.loads(ended.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return found
