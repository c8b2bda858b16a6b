"""Names of metrics where runs of several stages share a chart: at W&B and in TensorBoard.

`metrics.jsonl` has a stage's metrics under their own names. A dashboard overlays the runs of a
group by the metric's name, so that the loss of SFT, in nats per token, would share a chart with
those of the reward model, in nats per pair, and of PPO. There such names begin with the stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

# The first parts of names that more than one stage logs. `reward/` and `kl/` are known by these
# names wherever PPO is watched; the reward model's own two are apart.
_SHARED = ("loss/", "eval/", "optim/", "memory/", "throughput/")
_OF_REWARD_MODEL = ("reward/accuracy", "reward/margin")


def chart_name(stage: str | None, name: str) -> str:
    """Return the name of a metric, a table or a histogram on a dashboard.

    Args:
        stage: The stage that logs it; `None` leaves it as it is.
        name: Its name in `metrics.jsonl`.
    """
    # An evaluation's run has only numbers of its own: `eval/...` says so already.
    if stage in (None, "eval") or not name.startswith((*_SHARED, *_OF_REWARD_MODEL)):
        return name
    return f"{stage}/{name}"


def chart_names(stage: str | None, values: Mapping[str, T]) -> dict[str, T]:
    """Return values by their names on a dashboard (see `chart_name`)."""
    return {chart_name(stage, name): value for name, value in values.items()}
