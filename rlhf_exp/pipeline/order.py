"""One stage's work as plain values, which cross processes, and doing it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_exp.config.root import Config
from rlhf_exp.stages.result import StageResult
from rlhf_exp.store.lease import Claim

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
        claim: The lease under which it is made.
    """

    stage: str
    key: str
    folder: str
    models: dict[str, str]
    parents: dict[str, str]
    inputs: dict[str, str]
    claim: Claim

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Order:
        """Return the order that `asdict` made JSON values of."""
        return cls(**{**values, "claim": Claim(**values["claim"])})


class Hand:
    """Does one stage after another in this process, with the data loaded once.

    Args:
        config: The experiment.
    """

    def __init__(self, config: Config) -> None:
        from rlhf_exp.stages.materials import Materials

        self.config = config
        self.materials = Materials(config.data)

    def do(
        self, order: Order, interrupts: Interrupts, check: Callable[[], None] | None = None
    ) -> StageResult:
        """Run the stage.

        Args:
            order: What to do.
            interrupts: What Ctrl-C means meanwhile.
            check: Raises if this process may no longer write; by default it reads the claim.
        """
        from rlhf_exp.stages.context import StageContext

        context = StageContext(
            stage=order.stage,
            key=order.key,
            folder=Path(order.folder),
            cache=Path(self.config.output_dir) / "cache",
            models=order.models,
            parents=order.parents,
            inputs=order.inputs,
            materials=self.materials,
            before_write=check or order.claim.check,
            polite_interrupts=interrupts,
        )
        # By name and late: a plan must not load torch.
        stage = importlib.import_module(f"rlhf_exp.stages.{order.stage}")
        result: StageResult = stage.run(self.config, context)
        return result

    def answer(self, values: dict[str, Any], interrupts: Interrupts) -> dict[str, Any]:
        """Run the stage of an order that came as JSON values; return its result as such."""
        return asdict(self.do(Order.from_json(values), interrupts))
