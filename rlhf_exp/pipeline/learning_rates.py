"""Learning rates that would undo what a pretrained model has learned.

The defaults of the stages suit models of a few million parameters, made from scratch. A plan, a run
and `rlhf-exp doctor` say where they, or rates like them, train a larger model that is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rlhf_exp.config.experiment import UNTRAINED, Config
from rlhf_exp.config.training import TrainingConfig
from rlhf_exp.models.architecture import count_parameters
from rlhf_exp.pipeline.plan import Step, StepState
from rlhf_exp.pipeline.plan_table import count_text, shape_for

LARGEST = 1e-4
"""Rates above it are not used for whole weights of pretrained models; published ones are 1e-6 to
2e-5."""

ADAPTER = 1e-3
"""The same for adapters (LoRA), whose published rates are 1e-4 to 3e-4."""

SMALL_PARAMETERS = 20_000_000
"""Models up to so many parameters are pretrained with such rates themselves."""


def learning_rate_warnings(config: Config, steps: Sequence[Step]) -> Iterator[str]:
    """Yield a sentence for each stage that would train a pretrained model too fast.

    Args:
        config: The experiment.
        steps: Its plan.
    """
    trained = [step.stage for step in steps if step.needs_work and step.stage not in UNTRAINED]
    fast = [stage for stage in trained if _section(config, stage).lr > _largest(config, stage)]
    source = _pretrained(config, steps)
    if not fast or source is None:
        return
    option, path = source
    size = _parameters(config, path)
    if Path(path).is_dir() and size is not None and size <= SMALL_PARAMETERS:
        return
    # A hub id that nobody has described has the shape of the default model, which is small.
    model = "a pretrained model"
    if size is not None and size > SMALL_PARAMETERS:
        model += f" of {count_text(size)} parameters"
    for stage in fast:
        section = _section(config, stage)
        default = section.lr == TrainingConfig.lr
        blocks = section.train_blocks
        what = "every layer" if blocks is None else f"the last {blocks} blocks"
        yield (
            f"{stage}.lr={section.lr:g}"
            f"{' (the default, for small models made from scratch)' if default else ''} trains "
            f"{'an adapter' if section.lora.rank else what} of {model} ({option}={path}) and is "
            f"likely to destroy what it has learned. Add {stage}=recipe for the published "
            f"hyperparameters, or {stage}.lr={_largest(config, stage) / 10:g} or less"
        )


def _section(config: Config, stage: str) -> TrainingConfig:
    section: TrainingConfig = getattr(config, stage)
    return section


def _largest(config: Config, stage: str) -> float:
    return ADAPTER if _section(config, stage).lora.rank else LARGEST


def _pretrained(config: Config, steps: Sequence[Step]) -> tuple[str, str] | None:
    """Return option and name of the pretrained model that training starts from, if there is one."""
    if config.model.path is not None:
        return "model.path", config.model.path
    given = [step for step in steps if step.stage == "sft" and step.state is StepState.given]
    if not given or config.sft.use is None:
        return None
    artifact = given[0].artifact
    scratch = artifact is not None and not artifact.manifest.config.get("model", {}).get("path")
    return None if scratch else ("sft.use", given[0].model or config.sft.use)


def _parameters(config: Config, path: str) -> int | None:
    """Return the number of a model's parameters, `None` if it cannot be known."""
    shape = shape_for(replace(config.model, path=path))
    return None if shape is None else count_parameters(shape).total
