"""`rlhf-exp fetch`: downloads what a run needs from the hub, on a machine that has a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf_exp.config.compose import compose
from rlhf_exp.config.groups import CONF, read_groups
from rlhf_exp.config.overrides import override_problems, points, with_lists
from rlhf_exp.config.problems import refuse
from rlhf_exp.pipeline import hub
from rlhf_exp.pipeline.plan import plan


def fetch(
    overrides: Sequence[str], folder: Path | None, update: bool, tell: Callable[[str], None]
) -> None:
    """Fetch and pin the models and data of a run, or of each point of a multirun.

    Args:
        overrides: As on `launch.py`'s command line.
        folder: A further config folder.
        update: Whether to forget earlier pins and take the newest revisions.
        tell: Says what was fetched.

    Raises:
        UserError: Something cannot be fetched, or the command line is wrong.
    """
    folders = [CONF, *([folder.expanduser().resolve()] if folder else [])]
    wanted = with_lists(overrides)
    refuse(override_problems(wanted, read_groups(folders)))
    found: dict[hub.Need, Path] = {}
    for point in points(wanted):
        config = compose(point, folders).config
        found |= dict.fromkeys(hub.needs(config, plan(config)), Path(config.output_dir))
    for need, output_dir in found.items():
        pin = hub.fetch(output_dir, need, update)
        tell(f"{need}: revision {pin.commit}, {len(pin.files)} files")
    if not found:
        tell("nothing of this run comes from the hub")
