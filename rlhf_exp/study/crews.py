"""Who trains the trials of a worker: this process, workers that it starts, or all that joined.

Only the process that leads asks the study. With processes that something else has started, the
others learn each trial's values together with its orders.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from types import TracebackType
from typing import Any, Self

from rlhf_exp.config.root import Config
from rlhf_exp.config.study import StudyConfig
from rlhf_exp.config.trial import Values, trial_config
from rlhf_exp.distributed import joined
from rlhf_exp.distributed.place import Place
from rlhf_exp.errors import UserError, WorkerSpent
from rlhf_exp.pipeline.crew import (
    Check,
    Crew,
    crew_for,
    digest_of,
    hush,
    settled_place,
    with_threads,
)
from rlhf_exp.pipeline.interrupt import polite_interrupts
from rlhf_exp.pipeline.order import Hand, Order
from rlhf_exp.stages.result import StageResult
from rlhf_exp.store.records import Status


class Crews:
    """The crews of one worker, and the end of them.

    Args:
        config: The study's.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.best: float | None = None
        self.place: Place | None = settled_place(config)
        self.follows = self.place is not None and self.place.rank > 0

    def __enter__(self) -> Self:
        """Meet the other processes, which wait for this one."""
        if self.place is not None and not self.follows:
            joined.leader(self.place)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let the others go: the study is over, or this worker."""
        if self.place is not None and not self.follows:
            joined.leader(self.place).end(error, objective=self.best)

    def follow(self) -> float | None:
        """Do what rank 0 says until the study is over; return its best objective."""
        place, hands = self.place, dict[str, Hand]()
        assert place is not None
        hush()
        member, store = joined.member(place)

        def work(words: dict[str, Any]) -> dict[str, Any]:
            if words["config"] != digest_of(self.config):
                raise UserError(
                    f"rank {place.rank} was given another command than rank 0: start all with one"
                )
            name = str(words["values"])
            if name not in hands:
                hands.clear()
                trained = _trained(self.config, words["values"])
                hands[name] = Hand(with_threads(trained, place.local_processes))
            return hands[name].answer(words["order"], partial(polite_interrupts, tell=False))

        objective: float | None = member.serve(store, work)["objective"]
        return objective

    def of(self, config: Config, values: Values) -> Crew:
        """Return who runs an experiment.

        Args:
            config: The experiment.
            values: Of the trial that it is; empty if it makes what all of them start from.
        """
        if self.place is None:
            return crew_for(config, None)
        return _Together(self.config, config, values, self.place)

    def go_on(self, status: Status) -> None:
        """Go on after a trial.

        Raises:
            WorkerSpent: The processes that joined have ended with it.
        """
        if self.place is not None and status in (Status.failed, Status.interrupted):
            raise WorkerSpent(
                "the processes of the trial have ended with it, and only who started them can "
                "start others: give the same command again, and the study goes on"
            )


class _Together:
    """This process, rank 0, and all others that were started with it, for one trial."""

    def __init__(self, study: Config, config: Config, values: Values, place: Place) -> None:
        self.study, self.values = study, dict(values)
        self.leader = joined.leader(place)
        self.hand = Hand(with_threads(config, place.local_processes))

    def run(self, order: Order, check: Check) -> StageResult:
        """See `Crew`."""

        def work(_: object) -> dict[str, Any]:
            return asdict(self.hand.do(order, polite_interrupts, check))

        words = {
            "order": asdict(order),
            "config": digest_of(self.study),
            "values": self.values,
        }
        return StageResult(**self.leader.run(words, work))

    def end(self, error: BaseException | None, objective: float | None = None) -> None:
        """Keep the others for the next trial, unless this one has failed."""
        if error is not None:
            self.leader.end(error)


def _trained(config: Config, values: Values) -> Config:
    """Return the config that the stages of a trial see, from the study's."""
    if not values:
        return replace(config, study=StudyConfig())
    return replace(trial_config(config, values), eval=config.eval)
