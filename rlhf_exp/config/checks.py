"""Rules across the fields of a config: everything that can be known before anything is loaded."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from rlhf_exp.config.check_continuing import check_continuing
from rlhf_exp.config.check_data import check_data
from rlhf_exp.config.check_engine import check_trlx
from rlhf_exp.config.check_eval import check_eval
from rlhf_exp.config.check_model import check_model
from rlhf_exp.config.check_scoring import check_scoring
from rlhf_exp.config.check_study import check_study
from rlhf_exp.config.check_training import check_ppo, check_sequence, check_training
from rlhf_exp.config.problems import Findings, Problem
from rlhf_exp.config.reward import RewardInit
from rlhf_exp.config.root import Config, Stage
from rlhf_exp.config.running import EngineName, Strategy

_NEEDS = {
    Stage.sft: ("sft",),
    Stage.reward: ("sft", "reward"),
    Stage.ppo: ("sft", "reward", "ppo"),
    Stage.eval: ("sft", "reward", "ppo", "eval"),
    Stage.pipeline: ("sft", "reward", "ppo", "eval"),
}


def problems(config: Config, multirun: bool = False) -> list[Problem]:
    """Return everything that is wrong with a config, all at once.

    Sections that the chosen stage does not need are not looked at; neither is the training of a
    stage whose result is given by `use`. Relative paths start at the current directory.

    Args:
        config: The experiment.
        multirun: Whether it is one point of a multirun.
    """
    found = Findings(config)
    needed = ("eval",) if _recomputes(config) else _NEEDS[config.stage]
    _check_root(found, multirun)
    check_model(found)
    check_data(found)
    for stage in ("sft", "reward", "ppo"):
        if stage in needed and found.value(f"{stage}.use") is None:
            check_training(found, stage)
            check_sequence(found, stage)
    if "reward" in needed and config.reward.use is None:
        _check_reward(found)
    if "ppo" in needed and config.ppo.use is None:
        check_ppo(found)
        if config.engine.name is EngineName.trlx:
            check_trlx(found)
    if "ppo" in needed:
        check_scoring(found)
        check_continuing(found)
    if "eval" in needed:
        check_eval(found)
    _check_running(found)
    if config.study.trials is not None:
        check_study(found, problems)
    return found.problems


def _recomputes(config: Config) -> bool:
    """Whether only stored answers are evaluated."""
    return config.stage is Stage.eval and config.eval.samples is not None


def _check_root(found: Findings, multirun: bool) -> None:
    config = found.config
    if multirun and config.name is None:
        found.add("name", "a multirun needs a name, for its report: name=my_sweep.")
    if config.name is not None:
        valid = re.fullmatch(r"[A-Za-z0-9][\w.-]*", config.name, re.ASCII)
        found.unless(valid is not None, "name", "use letters, digits, and . _ - inside.")
        found.unless(config.name != "latest", "name", "`latest` always means the latest run.")
    found.at_least(0, "seed")
    stages = [stage.name for stage in Stage if stage is not Stage.pipeline]
    unknown = [stage for stage in config.rerun if stage not in stages]
    found.unless(not unknown, "rerun", f"the stages are {', '.join(stages)}.")
    output = Path(config.output_dir).expanduser().resolve()
    found.unless(output.is_dir() or not output.exists(), "output_dir", f"{output} is not a folder.")


def _check_reward(found: Findings) -> None:
    config = found.config
    part = config.reward.part
    if part is not None:
        match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", part)
        if match is None or int(match[1]) > int(match[2]):
            found.add("reward.part", "expected one part of how many, such as 1/2.")
    if config.reward.init is RewardInit.base and config.model.path is None:
        found.add("reward.init", "a model from scratch has no base weights; use reward.init=sft.")


def _check_running(found: Findings) -> None:
    config = found.config
    found.at_least(1, "distributed.processes", "distributed.threads")
    strategy = config.distributed.strategy
    if strategy is Strategy.single and config.distributed.processes > 1:
        message = "distributed.strategy=single has one process; choose a strategy, such as "
        found.add("distributed.processes", message + "distributed=ddp.")
    if config.distributed.offload and strategy in (Strategy.single, Strategy.ddp):
        message = f"distributed.strategy={strategy.name} cannot offload; zero1 to 3 and fsdp can."
        found.add("distributed.offload", message)
    if strategy.name.startswith("zero") and not config.plan:
        message = "needs DeepSpeed; run `pip install 'rlhf-exp[deepspeed]'`."
        found.unless(find_spec("deepspeed") is not None, "distributed.strategy", message)
    found.unless(bool(config.tracking.project.strip()), "tracking.project", "must not be empty.")
    alerts = "tracking.alerts."
    found.positive(*(alerts + name for name in ("kl_factor", "reward_drop", "entropy_fraction")))
