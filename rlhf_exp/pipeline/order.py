"""One stage's work as plain values, which cross processes, and doing it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_exp.config.root import Config
from rlhf_exp.distributed.place import leads
from rlhf_exp.pipeline.needed import module_of
from rlhf_exp.search.judge import Judge, Trial
from rlhf_exp.stages.result import StageResult
from rlhf_exp.store.lease import Claim
from rlhf_exp.tracking.opening import get_ready

if TYPE_CHECKING:
    from rlhf_exp.stages.materials import Materials

Interrupts = Callable[[], AbstractContextManager[Callable[[], bool]]]
"""While entered, Ctrl-C only asks to stop; yields whether it has."""


@dataclass(frozen=True)
class Order:
    """What a process needs to take part in a stage, beside the config.

    Attributes:
        stage: Its name.
        key: Its key.
        folder: Its staging folder.
        models: Model folder or hub id by role.
        parents: The keys of what it starts from, by role.
        inputs: Digests of their weights.
        claim: The lease under which it is made; `None` for what is not to be kept.
        cache: Folder of what can be computed again.
        probe: Whether only to measure a few iterations.
        trial: The trial of a search that this is, which may give it up.
    """

    stage: str
    key: str
    folder: str
    models: dict[str, str]
    parents: dict[str, str]
    inputs: dict[str, str]
    claim: Claim | None
    cache: str
    probe: bool = False
    trial: Trial | None = None

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Order:
        """Return the order that `asdict` made JSON values of."""
        claim, trial = values["claim"], values["trial"]
        given = {
            "claim": None if claim is None else Claim(**claim),
            "trial": None if trial is None else Trial.from_json(trial),
        }
        return cls(**values | given)


class Hand:
    """Does one stage after another in this process, with the data loaded once.

    Args:
        config: The experiment.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    @cached_property
    def materials(self) -> Materials:
        """The data; late, for a run that finds everything done must not load torch."""
        from rlhf_exp.stages.materials import Materials

        return Materials(self.config.data)

    def do(
        self, order: Order, interrupts: Interrupts, check: Callable[[], None] | None = None
    ) -> StageResult:
        """Run the stage.

        Args:
            order: What to do.
            interrupts: What Ctrl-C means meanwhile.
            check: Raises if this process may no longer write; by default it reads the claim.
        """
        if leads() and not order.probe:
            get_ready(self.config.tracking.mode.value)
        from rlhf_exp.engines.native.probe import Probed, Recorder
        from rlhf_exp.stages.context import StageContext

        # By name and late: a plan must not load torch.
        stage = importlib.import_module(f"rlhf_exp.stages.{module_of(self.config, order.stage)}")
        context = StageContext(
            stage=order.stage,
            key=order.key,
            folder=Path(order.folder),
            cache=Path(order.cache),
            models=order.models,
            parents=order.parents,
            inputs=order.inputs,
            materials=self.materials,
            before_write=check or (order.claim.check if order.claim else _allowed),
            polite_interrupts=_at_once if order.probe else interrupts,
            probe=Recorder() if order.probe else None,
            given_up=Judge(order.trial, Path(order.folder)) if order.trial else None,
        )
        try:
            result: StageResult = stage.run(self.config, context)
        except Probed as end:
            return StageResult({}, measured=end.measured)
        return result

    def answer(self, values: dict[str, Any], interrupts: Interrupts) -> dict[str, Any]:
        """Run the stage of an order that came as JSON values; return its result as such."""
        return asdict(self.do(Order.from_json(values), interrupts))


@contextmanager
def _at_once() -> Iterator[Callable[[], bool]]:
    """Leave Ctrl-C as it is: there is nothing to save."""
    yield lambda: False


def _allowed() -> None:
    """Writing is always allowed."""
