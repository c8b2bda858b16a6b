"""The command line that runs the settings of some runs again."""

from __future__ import annotations

import shlex

from rlhf_exp.report.sweep.groups import Group
from rlhf_exp.report.sweep.settings import is_seed

# What made it a part of a multirun, and not what was trained.
_LEFT_OUT = ("name", "hydra", "launcher", "study", "sweep")


def command_of(group: Group) -> str:
    """Return the command of a group's settings, without a seed; empty if it is not recorded."""
    point = next((one for one in (*group.done, *group.points) if one.overrides), None)
    if point is None:
        return ""
    seeds = {one.seed for one in group.points}
    kept = []
    for text in point.overrides:
        key = text.partition("=")[0].lstrip("+~")
        varied_seed = is_seed(key) and len(seeds) > 1
        if key.replace("/", ".").split(".")[0] not in _LEFT_OUT and not varied_seed:
            kept.append(text)
    return f"python launch.py {shlex.join([f'name={point.name}-best', *kept])}"
