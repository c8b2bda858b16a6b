"""`ppo.continue_from`: a finished PPO run is extended by more steps.

The result is what one run of all the steps would have been, so all else that counts must be equal.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_exp.config.fields import key_content
from rlhf_exp.config.load import from_dict
from rlhf_exp.config.ppo import CONTINUED
from rlhf_exp.config.root import Config
from rlhf_exp.errors import UserError
from rlhf_exp.pipeline.given import Finder, Given
from rlhf_exp.pipeline.keys import Keys
from rlhf_exp.store.artifact import MANIFEST, Artifact, Manifest

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in an artifact that keeps its state, and in a staging folder."""

_ITS_OWN = ("ppo.steps", "ppo.continue_from")


def continued(config: Config, keys: Keys, finder: Finder, parents: Mapping[str, str]) -> Given:
    """Return the run that PPO is to go on from.

    Args:
        config: The experiment.
        keys: Makes its keys.
        finder: Finds runs.
        parents: The keys of what PPO starts from, by role.

    Raises:
        UserError: There is no such run, it is another one but for its steps, or not a shorter one.
    """
    use = config.ppo.continue_from
    assert use is not None, "asked for"
    folder, option = Path(use), _option(config)
    if (folder / MANIFEST).is_file():
        found = Artifact(folder.absolute(), Manifest.read(folder))
        if found.stage != "ppo":
            raise UserError(f"{option}: that is a result of {found.stage}, not of ppo")
    else:
        found = finder.artifact(option, use, ("ppo",))
    before = from_dict(found.manifest.config)
    same = copy.copy(config)
    same.ppo = copy.copy(config.ppo)
    same.ppo.steps = before.ppo.steps
    grandparent = found.manifest.parents.get(CONTINUED)
    if Keys(same, keys.digests).ppo(dict(parents), grandparent) != found.key:
        raise UserError(
            f"{option}: only ppo.steps may differ from that run, and these do as well:"
            + "".join(f"\n  {line}" for line in _differences(config, parents, before, found))
        )
    if config.ppo.steps <= before.ppo.steps:
        raise UserError(
            f"{option}: that run has ppo.steps={before.ppo.steps}, and ppo.steps="
            f"{config.ppo.steps} is the number of all steps, those included; give more"
        )
    return Given(found.key, str(found.path), found)


def check_state(config: Config, parent: Artifact, stale: Sequence[str]) -> None:
    """Make sure that a run can be gone on from.

    Args:
        config: The experiment.
        parent: The run.
        stale: What it was made with and is another now, but for what is trusted.

    Raises:
        UserError: It kept no state, or what it was made with has changed.
    """
    if not any((parent.path / CHECKPOINTS).glob("step-*")):
        raise UserError(
            f"{_option(config)}: ppo {parent.key} did not keep its state; make it again with "
            "ppo.keep_state=true rerun=[ppo] (and its own ppo.steps, without ppo.continue_from)"
        )
    if stale:
        raise UserError(
            f"{_option(config)}: what ppo {parent.key} was made with has changed since: "
            f"{', '.join(stale)}. Make it again (rerun=[ppo], without ppo.continue_from), or go "
            "on from it as it is with cache=trust"
        )


def _option(config: Config) -> str:
    return f"ppo.continue_from={config.ppo.continue_from}"


def _differences(
    config: Config, parents: Mapping[str, str], before: Config, found: Artifact
) -> list[str]:
    """Return what counts for the key and differs, in words."""
    old, new = dict(_counting(before)), dict(_counting(config))
    lines = [
        f"{name}: {old.get(name)} there, {new.get(name)} here"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and name not in _ITS_OWN
    ]
    was = {role: key for role, key in found.manifest.parents.items() if role != CONTINUED}
    lines += [
        f"the {role} model: {was.get(role)} there, {parents.get(role)} here"
        for role in sorted(was.keys() | parents.keys())
        if was.get(role) != parents.get(role)
    ]
    return lines or ["the content of a file of data, or of ppo.reward.function"]


def _counting(config: Config) -> Iterator[tuple[str, Any]]:
    """Yield the values that may count for PPO's key, by dotted name."""
    yield from _flat("ppo", key_content(config.ppo))
    yield from _flat("data", key_content(config.data))
    yield "model.dtype", config.model.dtype.name
    yield "distributed.precision", config.distributed.precision.name
    yield "engine.name", config.engine.name.name
    yield "reward.seq_length", config.reward.seq_length


def _flat(prefix: str, content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}.{name}", value)
        else:
            yield f"{prefix}.{name}", value
