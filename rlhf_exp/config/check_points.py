"""What is wrong with the points of a multirun: all of it at once, and where."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rlhf_exp.config.checks import problems
from rlhf_exp.config.overrides import differences
from rlhf_exp.config.problems import Problem
from rlhf_exp.config.root import Config
from rlhf_exp.errors import UserError

SHOWN = 3


def check_points(
    points: Sequence[Sequence[str]], compose: Callable[[Sequence[str]], Config]
) -> tuple[list[Config], list[str]]:
    """Compose every point and check it.

    Args:
        points: The overrides of each.
        compose: Returns the config of overrides, or raises a `UserError`.

    Returns:
        The configs of those that can be composed, and what is wrong, each once: with the points
        that have it, unless all do.
    """
    configs: list[Config] = []
    where: dict[str, list[int]] = {}
    for index, overrides in enumerate(points):
        found: list[Problem | UserError] = []
        try:
            config = compose(overrides)
        except UserError as error:
            found.append(error)
        else:
            configs.append(config)
            found += problems(config, multirun=True)
        for text in dict.fromkeys(str(problem) for problem in found):
            where.setdefault(text, []).append(index)
    return configs, [text + place_of(points, set(at)) for text, at in where.items()]


def place_of(points: Sequence[Sequence[str]], at: set[int]) -> str:
    """Return in which points something is wrong, to be put after what it is; nothing for all.

    They are told by what only they have, else by their names.

    Args:
        points: The overrides of each.
        at: The numbers of those that are meant, from 0.
    """
    if len(at) == len(points):
        return ""
    count = f"{len(at)} of {len(points)} points"
    others = {text for index, point in enumerate(points) if index not in at for text in point}
    common = set.intersection(*(set(points[index]) for index in at)) - others
    if common:
        return f" ({count}: all with {' '.join(sorted(common))})"
    names = [name for index, name in enumerate(differences(points)) if index in at]
    more = f"; and {len(at) - SHOWN} more" if len(at) > SHOWN else ""
    return f" ({count}: {'; '.join(names[:SHOWN])}{more})"
