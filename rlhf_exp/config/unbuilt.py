"""Options that compose and can be planned, but that no code computes yet."""

from __future__ import annotations

from rlhf_exp.config.problems import Findings
from rlhf_exp.config.running import EngineName


def not_built(found: Findings) -> None:
    """Report values that cannot be run yet; a plan may have them."""
    config = found.config
    if config.plan:
        return
    later = "is not built yet; plan=true works with it, and engine=native runs."
    found.unless(config.engine.name is EngineName.native, "engine.name", later)
