"""What every stage is given and gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rlhf_exp.config.root import Config
from rlhf_exp.engines.native.probe import Recorder
from rlhf_exp.stages.materials import Materials
from rlhf_exp.stages.result import StageResult

MODEL = "model"
"""Folder of the model in an artifact."""

SNAPSHOTS = "snapshots"
"""Folder of the models of other steps in an artifact."""


def snapshot_name(step: int) -> str:
    """Return the name of a step's folder in `SNAPSHOTS`."""
    return f"step-{step:08d}"


@dataclass(frozen=True)
class StageContext:
    """Where a stage works and what it starts from.

    Attributes:
        stage: Its name.
        key: Its key in the store.
        folder: Its staging folder.
        cache: Folder of what can be computed again: tokenized sets, scores of original responses.
        models: Model folder or hub id by role (`sft`, `reward`, `ppo`).
        parents: The keys of what it starts from, by role.
        inputs: Digests of their weights, of those that are in the store.
        materials: The data, shared by the stages of one process.
        before_write: Raises if this process may no longer write.
        polite_interrupts: While entered, Ctrl-C only asks to stop; yields whether it has.
        probe: Measures a few iterations, after which the stage is left.
        given_up: Whether a search gives the run up: asked after each of PPO's evaluations, in the
            main process, with the step and the number of steps.
    """

    stage: str
    key: str
    folder: Path
    cache: Path
    models: Mapping[str, str]
    parents: Mapping[str, str]
    inputs: Mapping[str, str]
    materials: Materials
    before_write: Callable[[], None]
    polite_interrupts: Callable[[], AbstractContextManager[Callable[[], bool]]]
    probe: Recorder | None = None
    given_up: Callable[[int, int], bool] | None = None


class Stage(Protocol):
    """A stage."""

    def __call__(self, config: Config, context: StageContext) -> StageResult:
        """Do the work in `context.folder`."""
