"""The number format that `distributed.precision=auto` stands for.

It is chosen before anything is planned, by the process that plans: keys hold what was chosen, so a
run with `auto` shares its results with one that names the same format. Jobs and other processes are
given the choice.

A processor is measured once for an output folder, whose `cache/precision.json` keeps the rates: the
next command chooses the same, on a busy machine too.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from rlhf_exp.config.experiment import Config, Dtype, PrecisionName
from rlhf_exp.pipeline.plan_table import shape_for
from rlhf_exp.store.atomic_files import write_json_atomic

log = logging.getLogger(__name__)

KEY = "distributed.precision"
FASTER = 1.5
"""So many times as fast as float32 must bfloat16 be on a processor, to be worth its rounding."""
_LARGEST_WIDTH = 1024
"""Wider layers have the same rates, and take longer to measure."""
_BF16_CAPABILITY = (8, 0)
"""The first compute capability with bfloat16 units (NVIDIA Ampere)."""


@dataclass(frozen=True)
class PrecisionChoice:
    """What `auto` stands for, and why.

    Attributes:
        precision: The number format.
        reason: Why, in words.
    """

    precision: PrecisionName
    reason: str

    def __str__(self) -> str:
        """Return `precision: bfloat16, measured 214 against 89 GFLOP/s`."""
        return f"precision: {self.precision.name}, {self.reason}"

    def overrides(self, given: Sequence[str]) -> list[str]:
        """Return a command line with the choice in place of `auto`."""
        others = [text for text in given if text.lstrip("+").partition("=")[0] != KEY]
        return [*others, f"{KEY}={self.precision.name}"]


def with_precision(config: Config) -> tuple[Config, PrecisionChoice | None]:
    """Return the config with a number format, and the choice if it was `auto`."""
    if config.distributed.precision is not PrecisionName.auto:
        return config, None
    choice = _choose(config)
    return replace_precision(config, choice.precision), choice


def replace_precision(config: Config, precision: PrecisionName) -> Config:
    """Return the config with another number format."""
    return replace(config, distributed=replace(config.distributed, precision=precision))


def slow_bfloat16(config: Config) -> str | None:
    """Return a warning where this machine has no bfloat16 units and the config asks for them.

    The machine that chooses may be another than the one that runs.
    """
    if config.computes_in is not Dtype.bfloat16:
        return None
    # Late, here and below: torch takes a second to import.
    import torch

    from rlhf_exp.hardware import processor_has_bf16, processor_name

    if torch.cuda.is_available() or processor_has_bf16() is not False:
        return None
    return (
        f"bfloat16 on {processor_name()}, which has no units for it, is likely slower than "
        f"float32: {KEY}=float32 and model.dtype=float32, or {KEY}=auto"
    )


def _choose(config: Config) -> PrecisionChoice:
    if config.model.dtype is Dtype.bfloat16:
        return PrecisionChoice(PrecisionName.bfloat16, "as model.dtype=bfloat16")
    import torch

    if torch.cuda.is_available():
        # Of each GPU: a run may use all. Asking makes no context.
        count = torch.cuda.device_count()
        worst = min(range(count), key=torch.cuda.get_device_capability)
        has = torch.cuda.get_device_capability(worst) >= _BF16_CAPABILITY
        name = torch.cuda.get_device_name(worst)
        if has:
            return PrecisionChoice(PrecisionName.bfloat16, f"for which {name} has units")
        return PrecisionChoice(PrecisionName.float32, f"as {name} has no units for bfloat16")
    rates = _rates(config)
    half, single = rates["bfloat16"], rates["float32"]
    if half >= FASTER * single:
        reason = f"measured {half / 1e9:.0f} against {single / 1e9:.0f} GFLOP/s"
        return PrecisionChoice(PrecisionName.bfloat16, reason)
    reason = f"measured {single / 1e9:.0f} GFLOP/s, and bfloat16 only {half / 1e9:.0f}"
    return PrecisionChoice(PrecisionName.float32, reason)


def _rates(config: Config) -> dict[str, float]:
    """Return the FLOP/s of each number format on the processor, as the output folder has them."""
    import torch

    from rlhf_exp.hardware import linear_rates, processor_name

    shape = shape_for(config.model)
    width = _LARGEST_WIDTH if shape is None else shape.width
    inner = 4 * width if shape is None else shape.ffn_width
    if width > _LARGEST_WIDTH:
        width, inner = _LARGEST_WIDTH, inner * _LARGEST_WIDTH // width
    layer = f"{processor_name()}: linear layers {width} x {inner}"
    path = Path(config.output_dir) / "cache" / "precision.json"
    known = _read(path)
    if layer not in known:
        known[layer] = linear_rates(width, inner, torch.device("cpu"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(path, known)
        except OSError as error:
            # Only the choice may differ next time, where the formats are nearly as fast.
            log.info("%s: the measurement is not kept (%s)", path, error)
    return known[layer]


def _read(path: Path) -> dict[str, dict[str, float]]:
    """Return the rates that are kept, of what can be read of them."""
    kept: object = {}
    with suppress(OSError, ValueError):
        kept = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(kept, dict):
        return {}
    return {
        layer: {name: float(rates[name]) for name in ("float32", "bfloat16")}
        for layer, rates in kept.items()
        if isinstance(rates, dict)
        and all(isinstance(rates.get(name), int | float) for name in ("float32", "bfloat16"))
    }
