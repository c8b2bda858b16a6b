"""Overrides by which an experiment fits into the memory of a GPU, with the same results.

They are searched among the settings that are in no key: rows of a forward and of a decode,
recomputed activations, and then how weights and optimizer state are spread. Whether they are enough
is asked of the same estimate as a plan's (`plan_table.stage_memory`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

from rlhf_exp.config.checks import config_problems
from rlhf_exp.config.experiment import Config, EngineName, StrategyName
from rlhf_exp.config.training import TrainingConfig
from rlhf_exp.models.architecture import Architecture
from rlhf_exp.pipeline.plan_table import GPUS, fits, shape_for, stage_memory, trained_stages

FEWEST_DECODED = 8
"""Fewer rows decoded together are not proposed: sampling would take for ever."""

_SPREADS: tuple[dict[str, Any], ...] = (
    {},
    {"offload": True},
    {"strategy": StrategyName.zero3},
    {"strategy": StrategyName.zero3, "offload": True},
)
"""Changes of `distributed`, the cheaper in time first."""


class Fit(NamedTuple):
    """How an experiment fits into a GPU.

    Attributes:
        size: Memory of the GPU in GB.
        overrides: What to add to the command line; `None` if nothing was found.
        stages: The stages that do not fit as they are.
    """

    size: int
    overrides: tuple[str, ...] | None
    stages: tuple[str, ...]

    def __str__(self) -> str:
        """Return the sentence of a plan."""
        if self.overrides is None:
            return f"{self.size} GB: no override was found with which {_listed(self.stages)} fit"
        return f"fits {self.size} GB, with the same results, with: {' '.join(self.overrides)}"


def fits_of(config: Config) -> Iterator[Fit]:
    """Yield, for each size of GPU that an experiment does not fit into, what makes it fit.

    Nothing for a model of a family whose memory is not estimated.
    """
    shape = shape_for(config.model)
    if shape is None:
        return
    for size in GPUS:
        too_large = tuple(
            stage
            for stage in trained_stages(config)
            if not fits(stage_memory(config, stage, shape), size)
        )
        if too_large:
            yield Fit(size, fitting_overrides(config, shape, size), too_large)


def fitting_overrides(config: Config, shape: Architecture, size: int) -> tuple[str, ...] | None:
    """Return overrides with which every training stage fits into a GPU; `None` if none were found.

    Args:
        config: The experiment.
        shape: The model's shape.
        size: Memory of a GPU in GB.
    """
    before = set(map(str, config_problems(config)))
    for spread in _SPREADS:
        found = _with_spread(config, shape, size, spread)
        if found is not None:
            changed, overrides = found
            if set(map(str, config_problems(changed))) <= before:
                return overrides
    return None


def _with_spread(
    config: Config, shape: Architecture, size: int, spread: dict[str, Any]
) -> tuple[Config, tuple[str, ...]] | None:
    """Return the config that fits with these changes of `distributed`, and its overrides."""
    changes = {
        name: value
        for name, value in spread.items()
        if getattr(config.distributed, name) is not value
    }
    changed = replace(config, distributed=replace(config.distributed, **changes))
    overrides = [f"distributed.{name}={_text(value)}" for name, value in changes.items()]
    for stage in trained_stages(config):
        variants = _variants(changed, stage)
        fitting = (
            (section, added)
            for section, added in variants
            if fits(stage_memory(_with_section(changed, stage, section), stage, shape), size)
        )
        found = next(fitting, None)
        if found is None:
            return None
        section, added = found
        changed = _with_section(changed, stage, section)
        overrides += added
    return changed, tuple(overrides)


def _with_section(config: Config, stage: str, section: TrainingConfig) -> Config:
    sections: dict[str, Any] = {stage: section}
    return replace(config, **sections)


def _variants(config: Config, stage: str) -> Iterator[tuple[TrainingConfig, list[str]]]:
    """Yield a stage's section as it is and in ways that need less memory, with their overrides.

    The fewer halvings the earlier, and all of them before activations are recomputed.
    """
    section: Any = getattr(config, stage)
    if stage == "ppo" and config.engine.name is EngineName.trlx:
        yield section, []  # trlx has none of these ways
        return
    share = -(-section.batch // config.distributed.processes)
    rows = _halves(min(section.micro_batch or share, share), 1)
    samples = stage in ("dpo", "ppo")
    decoded = _halves(section.generation.batch, FEWEST_DECODED) if samples else [0]
    options = product(
        sorted({section.gradient_checkpointing, True}), range(len(rows)), range(len(decoded))
    )
    for recompute, row, batch in sorted(options, key=lambda way: (way[0], way[1] + way[2], way[2])):
        changes: dict[str, Any] = {}
        added = []
        if row:
            changes["micro_batch"] = rows[row]
            added.append(f"{stage}.micro_batch={rows[row]}")
        if recompute != section.gradient_checkpointing:
            changes["gradient_checkpointing"] = recompute
            added.append(f"{stage}.gradient_checkpointing=true")
        if batch:
            changes["generation"] = replace(section.generation, batch=decoded[batch])
            added.append(f"{stage}.generation.batch={decoded[batch]}")
        yield replace(section, **changes), added


def _halves(number: int, least: int) -> list[int]:
    """Return a number, its half and so on, rounded up, down to `least`."""
    found = [number]
    while found[-1] > least:
        found.append(max(least, -(-found[-1] // 2)))
    return found


def _text(value: StrategyName | bool) -> str:
    return value.name if isinstance(value, StrategyName) else str(value).lower()


def _listed(stages: tuple[str, ...]) -> str:
    return " and ".join(stages)
